"""A folder of images per class, as ImageNet is usually unpacked."""

from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from lineara.tasks.image_classification.data import ImageClassificationData
from lineara.tasks.image_files import is_image, read_image
from lineara.tasks.random_numbers import held_out

# Of ImageNet's colours in 0..1; networks that torchvision publishes expect them whatever they are trained on.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LAYOUT = "a split is a folder with one folder of images per class, such as train/n01440764/n01440764_18.JPEG"


class ImageFolderData(ImageClassificationData):
    """ImageNet, or another set in its form:

        <data_root>/
          train/<class>/*.JPEG     such as n01440764/n01440764_18.JPEG; jpg, png, bmp, tif, webp and others likewise
          val/<class>/*.JPEG       the same class folders; ImageNet's come as one flat folder, to be sorted first

    Classes are numbered in the order of their folders' names. A training image is a random crop of 8 to 100 % of the
    area and a ratio of 3/4 to 4/3, resized, and flipped in half of the cases; others are resized to `resize_size` on
    their short side and cropped in the centre.

    Args:
        data_root: folder of the set.
        train_folder, val_folder: of the splits, in it.
        val_share: where it is above 0, this share of the training images validates in place of val_folder, always the
            same ones, and none of them is trained on.
        test_folder: of the test split; None takes the validation split, as ImageNet's results are reported on it.
        predict_folder: folder of images to predict.
        image_size: height and width of what the network is given, in pixels.
        resize_size: short side before the crop in the centre, in pixels.
        horizontal_flip: share of training images that are flipped.
        skip_broken: whether images that cannot be read are left out, with a warning, instead of ending the run. Images
            to predict always are.
        shuffle_seed: seed of the order of training images and of their augmentation.
        batch_size: images per batch and process.
        num_workers: processes that read images; 0 reads in this one.

    Source: Russakovsky et al., 2015, "ImageNet Large Scale Visual Recognition Challenge", arXiv 1409.0575; cropped as
    in Szegedy et al., CVPR 2015, arXiv 1409.4842. We differ from some harnesses in that colours are not jittered.
    """

    # Arguments that say nothing about the files of the set.
    only_in_training: ClassVar[tuple[str, ...]] = (
        "predict_folder",
        "image_size",
        "resize_size",
        "horizontal_flip",
        "shuffle_seed",
        "batch_size",
        "num_workers",
    )

    def __init__(
        self,
        data_root: str = "data/imagenet",
        train_folder: str = "train",
        val_folder: str = "val",
        test_folder: str | None = None,
        predict_folder: str | None = None,
        image_size: int = 224,
        resize_size: int = 256,
        horizontal_flip: float = 0.5,
        skip_broken: bool = False,
        shuffle_seed: int = 0,
        batch_size: int = 256,
        num_workers: int = 4,
        val_share: float = 0.0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            skip_broken=skip_broken,
            shuffle_seed=shuffle_seed,
            predict_folder=predict_folder,
        )
        if not 1 <= image_size <= resize_size:
            raise ValueError(
                f"image_size must be at least 1 and at most resize_size, got {image_size} and {resize_size}"
            )
        if not 0 <= horizontal_flip <= 1:
            raise ValueError(f"horizontal_flip must be a share from 0 to 1, got {horizontal_flip}")
        self.data_root = data_root
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share must be from 0 to below 1, got {val_share}")
        self.val_share = val_share
        val_folder = train_folder if val_share else val_folder
        self.folders = {"train": train_folder, "val": val_folder, "test": test_folder or val_folder}
        self._classes: list[str] = []
        self._read_first = Path()
        self.augment = v2.Compose([v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(horizontal_flip)])
        self.fit = v2.Compose([v2.Resize(resize_size), v2.CenterCrop(image_size)])
        self.to_input = v2.Compose(
            [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEAN, _STD), v2.ToPureTensor()]
        )

    @property
    def classes(self) -> list[str]:
        return self._classes

    def source(self) -> Path:
        return Path(self.data_root)

    def read(self, split: str) -> ImageFolder:
        """List the split, without opening its images.

        Raises:
            FileNotFoundError: there is no such folder, or no class in it.
            ValueError: a class is empty, or the classes are not those of the split that was read before.
        """
        folder = self.source() / self.folders[split]
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder} must be the {split} split, got no such folder; {_LAYOUT}; set --data.data_root"
            )
        images = _ClassFolders(folder, loader=read_image, allow_empty=True, is_valid_file=is_image)
        if self.val_share and self.folders[split] == self.folders["train"]:
            chosen = held_out(len(images), self.val_share, train=split == "train")
            images.samples = images.imgs = [images.samples[i] for i in chosen]
            images.targets = [label for _, label in images.samples]
        filled = set(images.targets)
        empty = [name for name, label in images.class_to_idx.items() if label not in filled]
        if empty and not (self.val_share and split != "train"):  # few images may leave a class without validation
            raise ValueError(
                f"{folder / empty[0]} must hold at least one image, got none ({len(empty)} such classes); fill or "
                "remove it"
            )
        if not self._classes:
            self._classes, self._read_first = images.classes, folder
        if different := sorted(set(images.classes) ^ set(self._classes)):
            lacking = folder if different[0] in self._classes else self._read_first
            raise ValueError(
                f"{folder} must have the class folders of {self._read_first}, got no {different[0]} in {lacking} "
                f"({len(different)} differences)"
            )
        return images


class _ClassFolders(ImageFolder):
    """torchvision's, without the hidden folders and files that other programs leave."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(path.name for path in Path(directory).iterdir() if path.is_dir())
        names = [name for name in names if not name.startswith(".")]
        if not names:
            raise FileNotFoundError(f"{directory} must hold one folder per class, got none; {_LAYOUT}")
        return names, {name: label for label, name in enumerate(names)}
