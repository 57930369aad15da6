"""Which frames make a batch, in which order, and how they are read into one."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from lineara.tasks.random_numbers import random_numbers_from
from lineara.tasks.stereo_depth.calibration import Calibration
from lineara.tasks.stereo_depth.frames import Frame, Frames, read_views
from lineara.tasks.stereo_depth.transforms import normalised

# The number of a frame in its split, and the seed of the random numbers that change it.
Item = tuple[int, int]
Batch = dict[str, Any]
# In place of that seed: the frame is another process's, and counts there.
_AGAIN = -1


class BrokenFrame:
    """What a loader's worker hands over instead of a batch: the sentence that refuses a frame."""

    def __init__(self, sentence: str, *, left_out: bool = False) -> None:
        self.sentence = sentence
        self.left_out = left_out


class FrameLoader(DataLoader[Any]):
    """A loader that raises and warns here, not in a worker: an error from there is a page long."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in super().__iter__():
            if not isinstance(batch, BrokenFrame):
                yield batch
            elif batch.left_out:
                warnings.warn(f"left out: {batch.sentence}", RuntimeWarning, stacklevel=2)
            else:
                raise ValueError(batch.sentence)


class EpochBatches(DistributedSampler[list[Item]]):
    """Batches of equally many frames in random order, or single frames in the order of the split.

    Shuffled, an epoch depends on the seed and the epoch alone, and frames that do not make a batch for every process
    are left out of it. Not shuffled, every frame is one process's; one that has none, because there are fewer frames
    than processes, is given another's, in a batch with the key "again".

    Args:
        num_frames: of the split.
        batch_size: frames per batch and process.
        shuffle: whether the order is random.
        seed: of the random order.
        start: of this process's batches in the first epoch, leave out so many, which a resumed run has seen already.
        num_processes: how many share the frames.
        rank: which of them this one is.
    """

    def __init__(
        self,
        num_frames: int,
        batch_size: int = 1,
        *,
        shuffle: bool,
        seed: int = 0,
        start: int = 0,
        num_processes: int = 1,
        rank: int = 0,
    ) -> None:
        # Lightning leaves samplers of this kind alone, and tells them the epoch.
        super().__init__(range(num_frames), num_replicas=num_processes, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.num_frames = num_frames
        self.batch_size = batch_size
        self.start = start

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_frames // (self.batch_size * self.num_replicas)
        return max(min(self.num_frames, 1), len(range(self.rank, self.num_frames, self.num_replicas)))

    def __iter__(self) -> Iterator[list[Item]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        start, self.start = self.start, 0
        if not self.shuffle:
            own = [[(index, 0)] for index in range(self.rank, self.num_frames, self.num_replicas)]
            yield from (own or [[(index, _AGAIN)] for index in range(min(self.num_frames, 1))])[start:]
            return
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(self.num_frames).tolist()
        seeds = random.integers(2**62, size=self.num_frames).tolist()
        items = list(zip(order, seeds))[self.rank :: self.num_replicas]
        for batch in range(start, len(self)):
            yield items[batch * self.batch_size : (batch + 1) * self.batch_size]


class FrameBatches(Dataset["Batch | BrokenFrame"]):
    """The frames of one split; indexed by a list of (index, seed), gives a batch.

    Args:
        frames: of the split.
        change: what changes a frame of training, by random numbers of torch; None leaves it as it is.
        repeats: how often each frame is in the split.
        both_truths: whether `change` needs the right view's truth.
    """

    def __init__(
        self,
        frames: Frames,
        change: Callable[[Frame], Frame] | None = None,
        *,
        repeats: int = 1,
        both_truths: bool = False,
    ) -> None:
        self.frames = frames
        self.change = change
        self.repeats = repeats
        self.both_truths = both_truths

    def __len__(self) -> int:
        return len(self.frames) * self.repeats

    def __getitem__(self, items: list[Item]) -> "Batch | BrokenFrame":
        indices = [index // self.repeats for index, _ in items]
        names = [self.frames.names[index] for index in indices]
        read = list[Frame]()
        for name, index, (_, seed) in zip(names, indices, items):
            try:
                frame = self.frames.read(index, both_truths=self.both_truths)
            except (OSError, ValueError) as error:
                return BrokenFrame(f"frame {name}: {error}")
            if self.change is not None:
                try:
                    with random_numbers_from(seed):
                        frame = self.change(frame)
                except ValueError as error:
                    return BrokenFrame(f"frame {name} {error}")
            read.append(frame)
        again = {"again": True} if (0, _AGAIN) in items else {}
        return again | {
            "left": normalised(torch.stack([frame.left for frame in read])),
            "right": normalised(torch.stack([frame.right for frame in read])),
            "disparity": torch.stack([frame.disparity for frame in read]),
            "valid": torch.stack([frame.valid for frame in read]),
            "name": names,
        }


class PairsToPredict(Dataset["Batch | BrokenFrame"]):
    """Pairs without truth, one a batch; a pair that cannot be read is warned of and left out.

    Args:
        pairs: name, left and right file of each.
        calibrations: of the cameras of each pair, as keyword arguments of `Calibration`; None where they are not known.
    """

    def __init__(
        self, pairs: Sequence[tuple[str, Path, Path]], calibrations: Sequence[dict[str, float]] | None = None
    ) -> None:
        self.pairs = list(pairs)
        self.calibrations = calibrations

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, items: list[Item]) -> "Batch | BrokenFrame":
        ((index, _),) = items
        name, *files = self.pairs[index]
        try:
            left, right = (normalised(view)[None] for view in read_views(*files))
        except (OSError, ValueError) as error:
            return BrokenFrame(str(error), left_out=True)
        batch: Batch = {"left": left, "right": right, "name": [name]}
        if self.calibrations is not None:
            batch["calibration"] = [dict(self.calibrations[index])]
            try:
                Calibration(**batch["calibration"][0]).check_size(name, *left.shape[2:])  # type: ignore[arg-type]
            except ValueError as error:
                return BrokenFrame(str(error))
        return batch
