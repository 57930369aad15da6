"""Sets of images that a loader asks for batch by batch: annotated ones, and the files of a folder."""

import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from lineara.tasks.image_files import read_pixels
from lineara.tasks.instance_segmentation.batches import BrokenImage, Item
from lineara.tasks.instance_segmentation.coco_entries import Entry, decode
from lineara.tasks.instance_segmentation.coco_files import BrokenItems, without_garbage_collection
from lineara.tasks.random_numbers import random_numbers_from

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_NEEDED_KEYS = ("bbox", "segmentation")

Batch = dict[str, list[Any]]
Transform = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


class AnnotatedImages(Dataset["Batch | BrokenImage"]):
    """The images of one split and what is in them; indexed by a list of (index, seed), gives a batch.

    Args:
        folder: the images lie there.
        annotations: as `read_annotations` gives them.
        transform: what changes an image and its target, with random numbers of torch; None leaves them as they are.
        repeats: how often each image is in the set; with a random transform, each time it is another one.
        skip_broken: whether to warn of an image file that cannot be read, not to refuse it.
        replace_broken: whether the next image takes its place, so that a batch of training is never empty.
        apply_exif: whether images are turned upright by their EXIF orientation.
        with_crowds: whether objects with iscrowd = 1 are among the targets.
    """

    def __init__(
        self,
        folder: Path,
        annotations: Entry,
        transform: Transform | None = None,
        *,
        repeats: int = 1,
        skip_broken: bool = False,
        replace_broken: bool = False,
        apply_exif: bool = True,
        with_crowds: bool = False,
    ) -> None:
        self.folder = folder
        self.transform = transform
        self.repeats = repeats
        self.skip_broken = skip_broken
        self.replace_broken = replace_broken
        self.apply_exif = apply_exif
        self._broken = BrokenItems(are_counted=False)
        with without_garbage_collection():
            self._records = _Records(_records(annotations, with_crowds=with_crowds))
        sizes = np.array([[image["height"], image["width"]] for image in annotations["images"]]).reshape(-1, 2)
        self._is_wide = sizes[:, 1] >= sizes[:, 0]

    def __len__(self) -> int:
        return len(self._records) * self.repeats

    @property
    def is_wide(self) -> npt.NDArray[np.bool_]:
        """(images,): whether each is at least as wide as it is tall."""
        return np.repeat(self._is_wide, self.repeats)

    def __getitem__(self, items: list[Item]) -> "Batch | BrokenImage":
        try:
            pairs = [self._read(index // self.repeats, seed) for index, seed in items]
        except _Refused as refused:
            return BrokenImage(str(refused))
        return collate([pair for pair in pairs if pair is not None])

    def _read(self, index: int, seed: int) -> tuple[Tensor, dict[str, Any]] | None:
        for number in range(index, index + len(self._records)):
            image, annotations = self._records[number % len(self._records)]
            try:
                colours = self._colours(image)
            except (OSError, ValueError) as error:
                sentence = f"image {image['id']}: {error}"
                if not self.skip_broken:
                    raise _Refused(f"{sentence}; replace the file or set skip_broken") from error
                self._broken.add(sentence)
                if not self.replace_broken:
                    return None
            else:
                return self._pair(colours, image["id"], annotations, seed)
        raise _Refused(f"{self.folder} must hold an image that can be read, got none; get the images again")

    def _colours(self, image: Entry) -> Tensor:
        path = self.folder / image["file_name"]
        colours = read_pixels(path, apply_exif=self.apply_exif)
        annotated = image["height"], image["width"]
        if colours.shape[1:] != annotated:
            is_turned = read_pixels(path, apply_exif=not self.apply_exif).shape[1:] == annotated
            why = f" with apply_exif = {self.apply_exif}; set the other one" if is_turned else ""
            raise ValueError(
                f"{path} must have {annotated[0]} x {annotated[1]} pixels, as annotated, got "
                f"{colours.shape[1]} x {colours.shape[2]}{why}"
            )
        return colours

    def _pair(self, colours: Tensor, image_id: int, annotations: list[Entry], seed: int) -> tuple[Tensor, Any]:
        target = _target(annotations, image_id, *colours.shape[1:])
        image = tv_tensors.Image(colours)
        if self.transform is not None:
            with random_numbers_from(seed):
                image, target = self.transform(image, target)
        return _plain(image, target)


class FolderImages(Dataset[Batch]):
    """Image files to predict on; indexed by a list of (index, seed), gives a batch.

    A broken file is warned of and left out, so that a batch may be empty.

    Args:
        paths: the files; `image_id` counts them from 1.
        apply_exif: whether images are turned upright by their EXIF orientation.
    """

    def __init__(self, paths: Sequence[Path], *, apply_exif: bool = True) -> None:
        self.paths = list(paths)
        self.apply_exif = apply_exif

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def is_wide(self) -> npt.NDArray[np.bool_]:
        """(images,): all alike, so that they come in the order of their names."""
        return np.ones(len(self), np.bool_)

    def __getitem__(self, items: list[Item]) -> Batch:
        pairs = list[tuple[Tensor, dict[str, Any]]]()
        for index, _ in items:
            path = self.paths[index]
            try:
                image = read_pixels(path, apply_exif=self.apply_exif)
            except (OSError, ValueError) as error:
                # All are named: whoever asks for predictions misses each of them.
                warnings.warn(f"left out: {error}", RuntimeWarning, stacklevel=2)
                continue
            pairs.append((_as_shares(image), {"file_name": path.name, "image_id": index + 1}))
        return collate(pairs)


def collate(pairs: Sequence[tuple[Tensor, dict[str, Any]]]) -> Batch:
    """A batch of images of different sizes; of nothing, empty lists."""
    return {"images": [image for image, _ in pairs], "targets": [target for _, target in pairs]}


class _Refused(Exception):  # noqa: N818
    pass


class _Records:
    """Things kept as bytes in one array.

    Workers share the memory of the process that starts them until either writes to it, and Python writes to an object
    whenever it looks at it: 860,000 annotations as objects would soon be copied into every worker.
    """

    def __init__(self, things: Iterable[Any]) -> None:
        pickled = [pickle.dumps(thing, pickle.HIGHEST_PROTOCOL) for thing in things]
        self._stops = np.cumsum([len(part) for part in pickled], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(pickled), np.uint8)

    def __len__(self) -> int:
        return len(self._stops)

    def __getitem__(self, index: int) -> Any:
        start = 0 if index == 0 else self._stops[index - 1]
        return pickle.loads(self._bytes[start : self._stops[index]].tobytes())


def _records(annotations: Entry, *, with_crowds: bool) -> Iterator[tuple[Entry, list[Entry]]]:
    """Of each image, itself and its annotations: what a target needs of them, and their labels."""
    labels: dict[int, int] = annotations.get("labels", {})
    of_image = defaultdict[int, list[Entry]](list)
    for annotation in annotations["annotations"] or ():
        if with_crowds or not annotation["iscrowd"]:
            of_image[annotation["image_id"]].append(annotation)
    for image in annotations["images"]:
        needed = [
            {key: entry[key] for key in _NEEDED_KEYS}
            | {"label": labels.get(entry["category_id"], entry["category_id"])}
            for entry in of_image[image["id"]]
        ]
        yield {key: image[key] for key in _IMAGE_KEYS}, needed


def _target(annotations: list[Entry], image_id: int, height: int, width: int) -> dict[str, Any]:
    number = len(annotations)
    boxes = torch.tensor([annotation["bbox"] for annotation in annotations], dtype=torch.float64).reshape(number, 4)
    boxes[:, 2:] += boxes[:, :2]  # left, top, right, bottom
    boxes[:, 0::2].clamp_(0, width)
    boxes[:, 1::2].clamp_(0, height)
    masks = np.zeros((number, height, width), np.uint8)
    for mask, annotation in zip(masks, annotations):
        mask[:] = decode(annotation["segmentation"], height, width)
    return {
        "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=(height, width)),  # type: ignore[call-overload]
        "labels": torch.tensor([annotation["label"] for annotation in annotations], dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
        "image_id": image_id,
    }


def _plain(image: Any, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Plain tensors, without boxes that have no extent: detectors refuse those."""
    boxes = target["boxes"].as_subclass(Tensor)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return _as_shares(image.as_subclass(Tensor)), {
        "boxes": boxes[kept],
        "labels": target["labels"][kept],
        "masks": target["masks"].as_subclass(Tensor)[kept],
        "image_id": target["image_id"],
    }


def _as_shares(image: Tensor) -> Tensor:
    return v2.functional.to_dtype(image, torch.float32, scale=True)
