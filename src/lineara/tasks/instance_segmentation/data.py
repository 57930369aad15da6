"""Photographs and the objects in them, from COCO's files to batches. A batch is a dict of two lists:

images    float32 (3, height, width), colours from 0 to 1; each image has its own size
targets   dict:
    boxes       (n, 4)               float32  left, top, right, bottom in pixels, within the image
    labels      (n,)                 int64    the category ids where all lie in 1..num_classes - 1, as COCO's do, else
                                              their places from 1 on, in order; 0 is the background
    masks       (n, height, width)   uint8    1 where the object is
    image_id    int                           COCO's id of the image

n may be 0: an image without an object is an example too. Crowds, annotated as one, are in no target; scores account
for them. Of images to predict on a target holds file_name and image_id instead. Where files are broken and left out, a
batch may hold fewer images, or none.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torchvision.transforms import v2

from lineara.tasks.image_files import list_images
from lineara.tasks.instance_segmentation.batches import AspectRatioBatches, ImageLoader
from lineara.tasks.instance_segmentation.coco_entries import Entry
from lineara.tasks.instance_segmentation.coco_files import read_annotations
from lineara.tasks.instance_segmentation.image_sets import AnnotatedImages, FolderImages, Transform
from lineara.tasks.random_numbers import held_out

_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class CocoData(LightningDataModule):
    """A set in COCO's format, such as COCO 2017 itself, unpacked as it is published:

        <data_root>/
            train2017/000000000009.jpg, ...
            val2017/000000000139.jpg, ...
            annotations/instances_train2017.json, instances_val2017.json

    Training images are flipped at random. Detectors resize images themselves.

    Args:
        data_root: folder of the set.
        train_images, val_images: folders of images, within data_root.
        train_annotations, val_annotations: annotation files, within data_root.
        val_share: where it is above 0, this share of the training images validates in place of those of
            val_annotations, always the same ones, and none of them is trained on.
        test_images, test_annotations: the same for testing; None takes those of validation, since COCO keeps the
            annotations of its test images to itself.
        predict_folder: folder of images to predict on: all its jpg, jpeg, png, bmp, webp, tif and tiff files.
        num_classes: categories and the background. COCO's ids end at 90, so that it is 91 there.
        batch_size: images per batch and process.
        num_workers: processes that read images.
        horizontal_flip: probability that a training image is flipped.
        skip_broken: leave out broken annotations, and images that are missing or cannot be read, and warn of them; a
            training image that cannot be read is replaced by the next one. Otherwise the first one is refused. In
            prediction they are always left out.
        apply_exif: turn images upright by their EXIF orientation, as viewers and most label tools show them; False
            keeps stored pixels, as COCO's own tools do.
        train_on_crowds: also learn objects with iscrowd = 1, as which some label tools export all masks.
        shuffle_seed: seed of the order of training batches and of random changes to images.

    Source: Lin et al., 2014, "Microsoft COCO: Common Objects in Context", arXiv 1405.0312.
    """

    # Arguments that say nothing about the files of the set.
    only_in_training: ClassVar[tuple[str, ...]] = (
        "predict_folder",
        "batch_size",
        "num_workers",
        "horizontal_flip",
        "apply_exif",
        "train_on_crowds",
        "shuffle_seed",
    )

    def __init__(
        self,
        data_root: str = "data/coco",
        train_images: str = "train2017",
        train_annotations: str = "annotations/instances_train2017.json",
        val_images: str = "val2017",
        val_annotations: str = "annotations/instances_val2017.json",
        test_images: str | None = None,
        test_annotations: str | None = None,
        predict_folder: str | None = None,
        num_classes: int = 91,
        batch_size: int = 2,
        num_workers: int = 2,
        horizontal_flip: float = 0.5,
        skip_broken: bool = False,
        apply_exif: bool = True,
        train_on_crowds: bool = False,
        shuffle_seed: int = 0,
        val_share: float = 0.0,
    ) -> None:
        super().__init__()
        _check_numbers(num_classes, batch_size, num_workers, horizontal_flip)
        if (test_images is None) != (test_annotations is None):
            raise ValueError(
                "test_images and test_annotations must be given together, got "
                f"{test_images!r} and {test_annotations!r}; set both or neither"
            )
        self.data_root = data_root
        self.predict_folder = predict_folder
        self.num_classes = num_classes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.horizontal_flip = horizontal_flip
        self.skip_broken = skip_broken
        self.apply_exif = apply_exif
        self.train_on_crowds = train_on_crowds
        self.shuffle_seed = shuffle_seed
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must be from 0 to below 1, got {val_share}")
        self.val_share = val_share
        if val_share:
            val_images, val_annotations = train_images, train_annotations
        self._places = {
            "train": (train_images, train_annotations),
            "val": (val_images, val_annotations),
            "test": (test_images or val_images, test_annotations or val_annotations),
        }
        self._sets: dict[str, AnnotatedImages] = {}
        self._annotations: dict[str, Entry] = {}
        self._categories: dict[int, str] = {}  # names by labels
        self._trained: dict[int, str] = {}  # the same of the training split
        self._predicted: FolderImages | None = None
        self._batches_done = 0

    def setup(self, stage: str) -> None:
        """Read the annotations that the stage needs and look for their images, or list the folder to predict on."""
        if stage == "predict":
            if self.predict_folder is None:
                raise ValueError("predict_folder must be a folder of images, got none; set --data.predict_folder")
            self._predicted = FolderImages(list_images(self.predict_folder), apply_exif=self.apply_exif)
        for split in _STAGES.get(stage, ()):
            if len(self.images(split)) == 0:
                raise ValueError(
                    f"{self._annotation_file(split)} must hold at least 1 image, got none; name another file"
                )

    def annotations(self, split: str) -> Entry:
        """The checked annotations of "val" or "test", in COCO's format: images, annotations and categories."""
        if split not in self._annotations:
            content = self._read(split)
            # Those of training are large, and nothing asks for them again.
            self._annotations |= {
                name: content for name in ("val", "test") if self._places[name] == self._places[split]
            }
            return content
        return self._annotations[split]

    def images(self, split: str) -> AnnotatedImages:
        """The images of "train", "val" or "test", which are read and checked when they are first asked for."""
        if split not in self._sets:
            training = split == "train"
            self._sets[split] = AnnotatedImages(
                self._image_folder(split),
                self._read(split) if training else self.annotations(split),
                self.training_transform() if training else None,
                repeats=self.training_repeats() if training else 1,
                skip_broken=self.skip_broken,
                replace_broken=training,
                apply_exif=self.apply_exif,
                with_crowds=self.train_on_crowds,
            )
        return self._sets[split]

    @property
    def categories(self) -> dict[int, str]:
        """Names of the labels: those of the training, or of the set; empty where neither is there."""
        if not self._categories and self._annotation_file("val").is_file():
            self.annotations("val")
        return self._categories

    def training_transform(self) -> Transform:
        """What changes a training image and its target at random."""
        return v2.RandomHorizontalFlip(self.horizontal_flip)

    def training_repeats(self) -> int:
        """How often an epoch of training takes each image."""
        return 1

    def train_dataloader(self) -> ImageLoader:
        start, self._batches_done = self._batches_done, 0
        return self._loader("train", shuffle=True, start=start)

    def val_dataloader(self) -> ImageLoader:
        return self._loader("val")

    def test_dataloader(self) -> ImageLoader:
        return self._loader("test")

    def predict_dataloader(self) -> ImageLoader:
        return self._loader("predict")

    def summary(self) -> Iterator[str]:
        """Where the set lies, what each split holds, and the categories; a line each."""
        self.prepare_data()
        yield str(Path(self.data_root))
        splits = [split for split in self._places if split != "test" or self._places["test"] != self._places["val"]]
        names = dict[int, str]()
        for split in splits:
            content = self._read(split)
            yield f"{split}: {_described(content)}"
            names |= {category["id"]: category["name"] for category in content["categories"]}
        yield f"categories: {len(names)}: " + ", ".join(f"{number} {names[number]}" for number in sorted(names))

    def state_dict(self) -> dict[str, Any]:
        """How far into the epoch a checkpoint is, so that a resumed run goes on with the next batch, and the names."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.ready % int(self.trainer.num_training_batches)
        return {"batches_done": done, "categories": self.categories}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches_done = state_dict["batches_done"]
        self._categories = dict(state_dict["categories"])
        # What has been read before is compared with what the network was trained on.
        for split, content in self._annotations.items():
            content["labels"] = self._labels(self._annotation_file(split), content)
        if self._trained and {label: self._categories.get(label) for label in self._trained} != self._trained:
            raise ValueError(
                f"{self._annotation_file('train')} must have the categories that the run began with, "
                f"{self._categories}, got {self._trained}; name the file that it began with"
            )

    def _loader(self, split: str, *, shuffle: bool = False, start: int = 0) -> ImageLoader:
        images = self._predicted if split == "predict" else self.images(split)
        assert images is not None, "setup has listed the folder"
        trainer = self.trainer
        sampler = AspectRatioBatches(
            images.is_wide,
            self.batch_size,
            shuffle=shuffle,
            seed=self.shuffle_seed,
            start=start,
            num_processes=1 if trainer is None else trainer.world_size,
            rank=0 if trainer is None else trainer.global_rank,
        )
        # The sampler yields whole batches. A generator of its own keeps the loader from drawing on the random numbers
        # of the training.
        return ImageLoader(
            images,
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )

    def _image_folder(self, split: str) -> Path:
        return Path(self.data_root) / self._places[split][0]

    def _annotation_file(self, split: str) -> Path:
        return Path(self.data_root) / self._places[split][1]

    def _read(self, split: str) -> Entry:
        folder, file = self._image_folder(split), self._annotation_file(split)
        for path, kind, there in ((folder, "images", folder.is_dir()), (file, "annotations", file.is_file())):
            if not there:
                raise FileNotFoundError(
                    f"{path} must be the {kind} for {split}, got nothing there; unpack the set so that "
                    f"{self.data_root} holds {' and '.join(self._places[split])}, or set data_root, {split}_images "
                    f"and {split}_annotations"
                )
        content = read_annotations(file, image_folder=folder, skip_broken=self.skip_broken)
        if self.val_share and content["annotations"] is not None and self._places[split] == self._places["train"]:
            chosen = held_out(len(content["images"]), self.val_share, train=split == "train")
            content["images"] = [content["images"][i] for i in chosen]
            ids = {image["id"] for image in content["images"]}
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
        content["labels"] = self._labels(file, content)
        if content["annotations"] is None and split != "test":
            raise ValueError(
                f"{file} must hold the list annotations for {split}, got none; name a file of COCO's kind "
                "instances_*.json"
            )
        if split == "train":
            self._trained = {
                label: self._categories[label] for label in content["labels"].values() if label in self._categories
            }
            annotations = content["annotations"] or []
            if all(annotation["iscrowd"] and not self.train_on_crowds for annotation in annotations):
                crowds = len(annotations)
                advice = "; set train_on_crowds to learn them" if crowds else "; name another file"
                raise ValueError(
                    f"{file} must hold an object to learn, got {crowds} with iscrowd = 1 and no other{advice}"
                )
        return content

    def _labels(self, file: Path, content: Entry) -> dict[int, int]:
        """From the file's category ids to labels: by the names that are known, else as the class says.

        A category 0 that is the supercategory of the others, as Roboflow writes it, is none.
        """
        parents = {category.get("supercategory") for category in content["categories"] if category["id"] != 0}
        names = {
            category["id"]: category["name"]
            for category in sorted(content["categories"], key=lambda category: category["id"])
            if category["id"] != 0 or category["name"] not in parents
        }
        if not self._categories:
            are_labels = min(names) > 0 and max(names) < self.num_classes
            labels = {number: number if are_labels else place for place, number in enumerate(names, start=1)}
            if len(names) >= self.num_classes:
                raise ValueError(
                    f"num_classes must exceed the number of categories, {len(names)} in {file}, got "
                    f"{self.num_classes}; set it for data, task and network alike"
                )
            self._categories = {labels[number]: name for number, name in names.items()}
            return labels
        known = {name: label for label, name in self._categories.items()}
        used = {annotation["category_id"] for annotation in content["annotations"] or ()}
        for number, name in names.items():
            if name not in known and (number in used or number in self._categories):
                raise ValueError(
                    f"{file}, category {number}: its name must be that of a category of the other splits or of the "
                    f"training ({', '.join(known)}), got {name!r}; name files of one set"
                )
        return {number: known[name] for number, name in names.items() if name in known}


def _check_numbers(num_classes: int, batch_size: int, num_workers: int, horizontal_flip: float) -> None:
    for name, value, least in (
        ("num_classes", num_classes, 2),
        ("batch_size", batch_size, 1),
        ("num_workers", num_workers, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 0 <= horizontal_flip <= 1:
        raise ValueError(f"horizontal_flip must be a probability from 0 to 1, got {horizontal_flip}")


def _described(content: Entry) -> str:
    if content["annotations"] is None:
        return f"{len(content['images']):,} images without annotations"
    crowds = sum(annotation["iscrowd"] for annotation in content["annotations"])
    with_instances = Counter(a["image_id"] for a in content["annotations"] if not a["iscrowd"])
    images = len(content["images"])
    return (
        f"{images:,} images, {len(content['annotations']) - crowds:,} instances, {crowds:,} crowds, "
        f"{images - len(with_instances):,} images without instances"
    )
