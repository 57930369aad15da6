"""Coins: a small set from one photograph that comes with scikit-image, to stand in for COCO."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from lineara.tasks.instance_segmentation.coins_files import prepare_coins
from lineara.tasks.instance_segmentation.data import CocoData
from lineara.tasks.instance_segmentation.image_sets import Transform

# Of a coin that is cut by the edge of a crop, less than this share is left out: nobody could tell what it is.
_LEAST_VISIBLE_SHARE = 0.25


class CoinsData(CocoData):
    """A photograph of 24 coins: 12 to train on, 6 to validate, 6 to test; a single category. See `coins_files`.

    It needs no download, and shows whether a network learns to find objects at all. Training takes random crops of the
    training part, each around a coin; validation and testing take their parts whole, which are 75 and 78 pixels high.

    Args:
        data_root: folder of the set, which is written there unless it is there.
        predict_folder: as for `CocoData`.
        samples_per_epoch: crops that make an epoch of training.
        crop_height, crop_width: size of a crop in pixels; every second one is turned and has the height for width.
            Detectors resize images by their shorter side: at about 75 pixels coins keep their size from training to
            validation.
        min_scale, max_scale: a crop is magnified by a factor between these.
        brightness, contrast: each is changed by a factor between 1 - value and 1 + value.
        batch_size: images per batch and process.
        num_workers: processes that read images.
        shuffle_seed: seed of the crops.
    """

    only_in_training: ClassVar[tuple[str, ...]] = (
        *CocoData.only_in_training,
        *("samples_per_epoch", "crop_height", "crop_width", "min_scale", "max_scale", "brightness", "contrast"),
    )

    def __init__(
        self,
        data_root: str = "data/coins",
        predict_folder: str | None = None,
        samples_per_epoch: int = 64,
        crop_height: int = 80,
        crop_width: int = 160,
        min_scale: float = 0.8,
        max_scale: float = 1.25,
        brightness: float = 0.3,
        contrast: float = 0.3,
        batch_size: int = 4,
        num_workers: int = 0,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(
            data_root=data_root,
            train_images="images",
            train_annotations="annotations/train.json",
            val_images="images",
            val_annotations="annotations/val.json",
            test_images="images",
            test_annotations="annotations/test.json",
            predict_folder=predict_folder,
            num_classes=2,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle_seed=shuffle_seed,
        )
        if samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch must be at least 1, got {samples_per_epoch}")
        self.samples_per_epoch = samples_per_epoch
        self.crops = RandomCrops(
            (crop_height, crop_width), (min_scale, max_scale), brightness=brightness, contrast=contrast
        )

    def prepare_data(self) -> None:
        """Write the set, unless it is there."""
        prepare_coins(self.data_root)

    def training_transform(self) -> Transform:
        return self.crops

    def training_repeats(self) -> int:
        return self.samples_per_epoch  # of one image


class RandomCrops:
    """Crops around an object chosen at random, magnified, flipped, turned by right angles, brighter or darker.

    Args:
        size: (height, width) of a crop in pixels, before it is turned.
        scales: the least and the largest magnification.
        brightness, contrast: each is changed by a factor between 1 - value and 1 + value.
    """

    def __init__(
        self, size: tuple[int, int], scales: tuple[float, float], *, brightness: float = 0.0, contrast: float = 0.0
    ) -> None:
        if min(size) < 1:
            raise ValueError(f"crop_height and crop_width must be at least 1, got {size[0]} and {size[1]}")
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(f"min_scale must be above 0 and at most max_scale, got {scales[0]} and {scales[1]}")
        self.size = size
        self.scales = scales
        self.colours = v2.ColorJitter(brightness, contrast)

    def __call__(self, image: Any, target: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        top, left, height, width = self._window(target["boxes"], image.shape[-2:])
        masks = target["masks"]
        window = masks[:, top : top + height, left : left + width]
        visible = window.sum((1, 2)) >= _LEAST_VISIBLE_SHARE * masks.sum((1, 2))
        size = list(self.size)
        masks = v2.functional.resize(tv_tensors.Mask(window[visible]), size)
        image = v2.functional.resized_crop(image, top, left, height, width, size)
        image, masks = self._turned(self.colours(image), masks)
        shown = (masks != 0).flatten(1).any(1)  # not one that is lost by resizing
        return tv_tensors.Image(image), {
            "boxes": _boxes(masks[shown]),
            "labels": target["labels"][visible][shown],
            "masks": tv_tensors.Mask(masks[shown]),
            "image_id": target["image_id"],
        }

    def _window(self, boxes: Tensor, image_size: Sequence[int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a part of the image; an object chosen at random is whole in it, if it fits."""
        scale = _between(*self.scales)
        height, width = (min(round(length / scale), whole) for length, whole in zip(self.size, image_size))
        if len(boxes):
            first_x, first_y, last_x, last_y = boxes[int(torch.randint(len(boxes), ()))].round().int().tolist()
        else:
            first_y, first_x, last_y, last_x = 0, 0, *image_size
        return (
            _start(first_y, last_y, height, image_size[0]),
            _start(first_x, last_x, width, image_size[1]),
            height,
            width,
        )

    @staticmethod
    def _turned(image: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        quarters, flips = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        image, masks = (torch.rot90(part, quarters, (-2, -1)) for part in (image, masks))
        return (image.flip(-1), masks.flip(-1)) if flips else (image, masks)


def _start(first: int, end: int, length: int, whole: int) -> int:
    """Where a part of `length` out of `whole` begins, so that first to end lies in it, or it in first to end."""
    lowest, highest = sorted((end - length, first))
    lowest, highest = max(lowest, 0), min(highest, whole - length)
    lowest = min(lowest, whole - length)
    return int(torch.randint(lowest, max(highest, lowest) + 1, ()))


def _between(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _boxes(masks: Tensor) -> tv_tensors.BoundingBoxes:
    corners = masks_to_boxes(masks.as_subclass(Tensor))
    corners[:, 2:] += 1  # from the last pixel to its far edge
    return tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=tuple(masks.shape[-2:]))  # type: ignore[call-overload]
