"""Frames of a stereo set to batches. A batch is a dict:

key          shape                      dtype    meaning
left, right  (batch, 3, height, width)  float32  the views, normalised by ImageNet's mean and deviation
disparity    (batch, height, width)     float32  truth in pixels of the left view; of any value where not valid
valid        (batch, height, width)     bool     whether the set has a truth there; of any range
name         batch                      str      of the frames

In training they are crops of equal size. Otherwise a frame is whole and a batch has one. Of pairs to predict a batch
has left, right and name, and where the cameras are known

calibration  batch                      dict     focal_length in pixels, baseline in metres, doffs in pixels; floats
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule

from lineara.tasks.stereo_depth.batches import EpochBatches, FrameBatches, FrameLoader, PairsToPredict
from lineara.tasks.stereo_depth.calibration import Unit, read_calibration
from lineara.tasks.stereo_depth.frames import FileFrames, Frames
from lineara.tasks.stereo_depth.pairs_to_predict import in_place_of_stars, pairs_to_predict
from lineara.tasks.stereo_depth.transforms import Augmentation

# Cropped as PSMNet's frames were.
CROPPED = Augmentation()
_SPLITS = ("train", "val", "test")
_STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}


class StereoData(LightningDataModule):
    """Loaders over the splits that a subclass reads, and over pairs to predict.

    An epoch is resumed where a checkpoint left it: the order of frames and what is changed in each follow from the seed
    and the epoch, whatever the number of workers.

    Args:
        data_root: folder of the set.
        predict_left, predict_right: two rectified images, two folders, whose images of equal names are pairs, or two
            patterns such as `scenes/*/im0.png` and `scenes/*/im1.png`.
        predict_calibration: file of their cameras, of Middlebury, KITTI or OpenCV, see `read_calibration`; with a
            pattern such as `scenes/*/calib.txt` each pair has its own. None where depths are not asked for.
        predict_unit: "mm", "cm" or "m", of the lengths in a file of OpenCV, which does not say.
        augmentation: of training.
        batch_size: frames per batch of training and process.
        num_workers: processes that read frames; 0 reads in this one.
        shuffle_seed: seed of the order of training frames and of their augmentation.
    """

    # Arguments that say nothing about the files of the set.
    only_in_training: ClassVar[tuple[str, ...]] = (
        *("predict_left", "predict_right", "predict_calibration", "predict_unit"),
        *("augmentation", "batch_size", "num_workers", "shuffle_seed"),
    )

    def __init__(
        self,
        *,
        data_root: str,
        predict_left: str | None,
        predict_right: str | None,
        predict_calibration: str | None,
        predict_unit: Unit | None = None,
        augmentation: Augmentation,
        batch_size: int,
        num_workers: int,
        shuffle_seed: int,
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.data_root = data_root
        self.predict_left = predict_left
        self.predict_right = predict_right
        self.predict_calibration = predict_calibration
        self.predict_unit: Unit | None = predict_unit
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.shuffle_seed = shuffle_seed
        self._frames: dict[str, Frames] = {}
        self._pairs: PairsToPredict | None = None
        self._batches_done = 0
        self._seed_of_checkpoint: int | None = None

    @abstractmethod
    def read(self, split: str) -> Frames:
        """List the frames of "train", "val" or "test"."""

    def has_right_truths(self) -> bool:
        """Whether training frames have truths of the right view too."""
        frames = self.frames("train")
        return isinstance(frames, FileFrames) and all(files.right_disparity is not None for files in frames.files)

    def training_repeats(self) -> int:
        """How often an epoch of training takes each frame."""
        return 1

    def setup(self, stage: str) -> None:
        """List the frames of the stage, or the pairs to predict, and refuse what cannot be trained on."""
        if stage == "predict":
            self._pairs = self.read_pairs()
        for split in _STAGES.get(stage, ()):
            if len(self.frames(split)) == 0:
                raise ValueError(f"{split} of {self.data_root} must have at least 1 frame, got none")
        if stage == "fit":
            self._check_training()

    def frames(self, split: str) -> Frames:
        """The frames of "train", "val" or "test", listed once."""
        if split not in self._frames:
            if split not in _SPLITS:
                raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
            self._frames[split] = self.read(split)
        return self._frames[split]

    def read_pairs(self) -> PairsToPredict:
        """The pairs to predict; pairs that are not whole are warned of."""
        pairs = pairs_to_predict(self.predict_left, self.predict_right)
        if self.predict_calibration is None:
            return PairsToPredict(pairs)
        calibrations = [read_calibration(path, self.predict_unit) for path in self._calibrations(pairs)]
        return PairsToPredict(pairs, calibrations)

    def _calibrations(self, pairs: Sequence[tuple[str, Path, Path]]) -> list[str]:
        """The calibration file of each pair."""
        pattern, left = str(self.predict_calibration), str(self.predict_left)
        if "*" not in pattern:
            return [pattern] * len(pairs)
        if pattern.count("*") != left.count("*"):
            raise ValueError(
                f"predict_calibration must have as many * as predict_left, got {pattern} and {left}; write a * where "
                "they are alike"
            )
        return [pattern.replace("*", "{}").format(*in_place_of_stars(left, str(path)) or ()) for _, path, _ in pairs]

    def train_dataloader(self) -> FrameLoader:
        if self._seed_of_checkpoint not in (None, self.shuffle_seed):
            raise ValueError(
                f"a resumed run must keep its shuffle_seed, got {self.shuffle_seed} but it was begun with "
                f"{self._seed_of_checkpoint}; set --data.shuffle_seed, or begin a new run"
            )
        start, self._batches_done = self._batches_done, 0
        frames = FrameBatches(
            self.frames("train"),
            self.augmentation,
            repeats=self.training_repeats(),
            both_truths=self.augmentation.swap_views > 0,
        )
        return self._loader(frames, self._order(len(frames), self.batch_size, shuffle=True, start=start))

    def val_dataloader(self) -> FrameLoader:
        return self._evaluation_loader(FrameBatches(self.frames("val")))

    def test_dataloader(self) -> FrameLoader:
        return self._evaluation_loader(FrameBatches(self.frames("test")))

    def predict_dataloader(self) -> FrameLoader:
        assert self._pairs is not None, "setup has listed the pairs"
        return self._evaluation_loader(self._pairs)

    def summary(self) -> Iterator[str]:
        """Where the set lies, then of each split its frames, and what its first one is like; a line each."""
        self.prepare_data()
        yield str(Path(self.data_root))
        for split in _SPLITS:
            yield f"{split}: {_described(self.frames(split))}"

    def state_dict(self) -> dict[str, Any]:
        """The seed, and how far into the epoch a checkpoint is, so that a resumed run goes on with the next batch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.ready % int(self.trainer.num_training_batches)
        return {"batches_done": done, "shuffle_seed": self.shuffle_seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches_done = state_dict["batches_done"]
        self._seed_of_checkpoint = state_dict.get("shuffle_seed")  # refused by training alone: a test reads it too

    def _check_training(self) -> None:
        number = len(self.frames("train")) * self.training_repeats()
        if len(self._order(number, self.batch_size, shuffle=True)) == 0:
            processes = 1 if self.trainer is None else self.trainer.world_size
            raise ValueError(
                f"batch_size must be at most the {number // processes} training frames of a process, got "
                f"{self.batch_size}; set --data.batch_size"
            )
        if self.augmentation.swap_views and not self.has_right_truths():
            raise ValueError(
                f"swap_views must be 0 without disparities of the right view, got {self.augmentation.swap_views} and "
                f"none for the training frames of {self.data_root}; set --data.augmentation.swap_views 0"
            )

    def _order(self, number: int, batch_size: int = 1, *, shuffle: bool = False, start: int = 0) -> EpochBatches:
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        return EpochBatches(
            number,
            batch_size,
            shuffle=shuffle,
            seed=self.shuffle_seed,
            start=start,
            num_processes=processes,
            rank=rank,
        )

    def _evaluation_loader(self, frames: FrameBatches | PairsToPredict) -> FrameLoader:
        return self._loader(frames, self._order(len(frames)))

    def _loader(self, frames: FrameBatches | PairsToPredict, order: EpochBatches) -> FrameLoader:
        # The sampler yields whole batches. A generator of its own keeps the loader from drawing on the random numbers
        # of the training.
        return FrameLoader(
            frames,
            sampler=order,
            batch_size=None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(),
        )


def _described(frames: Frames) -> str:
    if not len(frames):
        return "0 frames"
    first = frames.read(0)
    height, width = first.disparity.shape
    truths = first.disparity[first.valid]
    said = f"{len(frames):,} frame{'' if len(frames) == 1 else 's'}; the first: {height} x {width} pixels, "
    if not len(truths):
        return f"{said}none with a disparity"
    return f"{said}{len(truths) / first.valid.numel():.1%} with disparities of {truths.min():.1f} to {truths.max():.1f}"
