"""Motorcycle: a real pair with its truth from scikit-image, to stand in for a set that must be downloaded."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lineara.tasks.stereo_depth.batches import PairsToPredict
from lineara.tasks.stereo_depth.block_matching import block_matching
from lineara.tasks.stereo_depth.calibration import Unit, read_calibration
from lineara.tasks.stereo_depth.data import StereoData
from lineara.tasks.stereo_depth.frames import Frame, Frames
from lineara.tasks.stereo_depth.motorcycle_files import motorcycle_paths, prepare_motorcycle, read_motorcycle
from lineara.tasks.stereo_depth.transforms import Augmentation

# Columns of the left view, the latter not included. A part to be scored is seen with `_MARGIN` more columns at its
# left, whose truths do not count: what is at column x of the left view is at x - disparity of the right one.
_COLUMNS = {"train": (0, 448), "val": (448, 576), "test": (576, 741)}
_MARGIN = 64
_MAX_DISPARITY = 64
_CROPS = Augmentation(
    crop_height=128, crop_width=256, vertical_flip=0.5, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05
)


class MotorcycleData(StereoData):
    """A photograph of a motorcycle from two places, with a truth that was measured; see `motorcycle_files`.

    It needs no download, and shows whether a network learns disparities at all. Columns 0 to 447 of the left view are
    trained on, 448 to 575 validate and 576 to 740 test. A pixel that is scored is in no left view of training. Both
    views are cut at the same columns. Validation and testing see 64 more columns at the left of their part, which is
    more than any disparity, so that every pixel that counts has its partner within the right view unless it is hidden;
    those columns are not valid, so that they are not scored. The last columns of training's right view show what is up
    to 60 columns further right in the left view: partners of some pixels of validation, but of none of the test.

    Args:
        data_root: folder of the set, which is written there unless it is there.
        predict_left, predict_right, predict_calibration, predict_unit: as for `StereoData`; without any, the
            pair itself, whole.
        samples_per_epoch: crops that make an epoch of training.
        augmentation: of training.
        batch_size: crops per batch of training and process.
        num_workers: processes that crop.
        shuffle_seed: seed of the crops.

    Source: Scharstein et al., 2014, "High-Resolution Stereo Datasets with Subpixel-Accurate Ground Truth".
    """

    only_in_training: ClassVar[tuple[str, ...]] = (*StereoData.only_in_training, "samples_per_epoch")

    def __init__(
        self,
        data_root: str = "data/motorcycle",
        predict_left: str | None = None,
        predict_right: str | None = None,
        predict_calibration: str | None = None,
        predict_unit: Unit | None = None,
        samples_per_epoch: int = 64,
        augmentation: Augmentation = _CROPS,
        batch_size: int = 2,
        num_workers: int = 0,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(
            data_root=data_root,
            predict_left=predict_left,
            predict_right=predict_right,
            predict_calibration=predict_calibration,
            predict_unit=predict_unit,
            augmentation=augmentation,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle_seed=shuffle_seed,
        )
        if samples_per_epoch < 1:
            raise ValueError(f"samples_per_epoch must be at least 1, got {samples_per_epoch}")
        self.samples_per_epoch = samples_per_epoch

    def prepare_data(self) -> None:
        """Write the set, unless it is there."""
        prepare_motorcycle(self.data_root)

    def read(self, split: str) -> Frames:
        return _Part([f"motorcycle_{split}"], _part(read_motorcycle(self.data_root), split))

    def read_pairs(self) -> PairsToPredict:
        if any(given is not None for given in (self.predict_left, self.predict_right, self.predict_calibration)):
            return super().read_pairs()
        left, right, calibration = motorcycle_paths(self.data_root)
        return PairsToPredict([("motorcycle", left, right)], [read_calibration(calibration)])

    def training_repeats(self) -> int:
        return self.samples_per_epoch  # of one frame

    def trivial_answers(self, split: str) -> dict[str, Tensor]:
        """What needs no training, for the only frame of a split.

        Args:
            split: "train", "val" or "test".

        Returns:
            Disparities (1, height, width) float32 in pixels, as a network's: "constant_median", everywhere the median
            of the training part's truths; "block_matching", by OpenCV's semi-global matching.

        Raises:
            ImportError: OpenCV is not installed.
        """
        training, frame = self.frames("train").read(0), self.frames(split).read(0)
        median = training.disparity[training.valid].median()
        return {
            "constant_median": torch.full_like(frame.disparity, float(median))[None],
            "block_matching": block_matching(frame.left, frame.right, max_disparity=_MAX_DISPARITY)[None],
        }


@dataclass
class _Part:
    names: list[str]
    frame: Frame

    def __len__(self) -> int:
        return 1

    def read(self, index: int, *, both_truths: bool = False) -> Frame:
        assert index == 0
        assert not both_truths, "the data module has refused this"
        return self.frame


def _part(whole: Frame, split: str) -> Frame:
    first, end = _COLUMNS[split]
    start = max(first - _MARGIN, 0)
    parts = {
        name: getattr(whole, name)[..., start:end].contiguous() for name in ("left", "right", "disparity", "valid")
    }
    parts["valid"][:, : first - start] = False
    return Frame(**parts)
