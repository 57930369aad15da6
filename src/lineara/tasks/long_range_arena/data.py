"""Examples to batches, for every task of the arena. A batch is a dict:

key     shape                  dtype   meaning
tokens  (batch, positions)     int64   token ids; 0 beyond the end of an example, and where a task hides a token
mask    (batch, positions)     bool    True where the id is not 0
label   (batch,)               int64   the class

The retrieval task judges two documents at once: its tokens and mask are (batch, 2, positions).
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from lineara.runs.sharding import shares
from lineara.tasks.long_range_arena.metrics import majority_class_accuracy

_BATCHES_PER_POOL = 50
_Ints = npt.NDArray[np.integer]


class Examples(Protocol):
    """What the loaders need of a split: `SequenceExamples` has it, and so has a class of pairs."""

    @property
    def labels(self) -> _Ints: ...
    @property
    def lengths(self) -> _Ints: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Any, int]: ...


class SequenceBatches(Dataset[dict[str, Tensor]]):
    """Batches of examples, padded with 0 to the longest of each batch; indexed by a list of example numbers.

    Args:
        examples: the examples.
        shift: what is added to each of their tokens: 1 where 0 is a token of its own, not padding.
    """

    def __init__(self, examples: Examples, shift: int = 0) -> None:
        self.examples = examples
        self.shift = shift

    def __getitem__(self, indices: list[int]) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self._tokens(indices))
        labels = self.examples.labels[indices].astype(np.int64)
        return {"tokens": tokens, "mask": tokens != 0, "label": torch.from_numpy(labels)}

    def __len__(self) -> int:
        return len(self.examples)

    def _tokens(self, indices: list[int]) -> npt.NDArray[np.int64]:
        return self._padded([self.examples[index][0] for index in indices])

    def _padded(self, sequences: Sequence[_Ints]) -> npt.NDArray[np.int64]:
        tokens = np.zeros((len(sequences), max(map(len, sequences))), dtype=np.int64)
        for row, sequence in zip(tokens, sequences):
            row[: len(sequence)] = sequence
            row[: len(sequence)] += self.shift
        return tokens


class SequenceData(LightningDataModule):
    """Loaders over the splits "train", "val" and "test" that a subclass reads.

    Args:
        batch_size: examples per batch.
        shuffle_seed: seed of the order of training batches.
        shift: as for `SequenceBatches`.
    """

    batches: ClassVar[type[SequenceBatches]] = SequenceBatches
    # Arguments that say nothing about the files of the set.
    only_in_training: ClassVar[tuple[str, ...]] = ("batch_size", "shuffle_seed", "mask_zero_pixels", "predict_file")

    def __init__(self, *, batch_size: int, shuffle_seed: int, shift: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.shuffle_seed = shuffle_seed
        self.shift = shift
        self._splits: dict[str, Any] = {}
        self._batches_done = 0

    @abstractmethod
    def source(self) -> Path | str:
        """Where the set lies; one that is generated is generated first, unless it is there."""

    @abstractmethod
    def read(self) -> Mapping[str, Examples]:
        """The splits "train", "val" and "test"."""

    @abstractmethod
    def describe(self, tokens: npt.NDArray[np.int64]) -> str:
        """One example of a batch, padding included, as a person would write it."""

    def prepare_data(self) -> None:
        """Generate the set, unless it is there."""
        self.source()

    def setup(self, stage: str) -> None:
        """Read the splits, and refuse one of the stage's that is empty."""
        self.load(stage)
        processes, _ = shares(self.trainer)
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            if len(self._splits[split]) < processes:
                least = "1 example" if processes == 1 else f"1 example for each of {processes} processes"
                got = len(self._splits[split]) or "none"
                raise ValueError(
                    f"the {split} split must hold at least {least}, got {got}; set --data.num_{split} or name "
                    "other files"
                )

    def load(self, stage: str) -> None:
        """Read the splits, unless they have been read."""
        if "train" not in self._splits:
            self._splits = dict(self.read())
            self._splits["predict"] = self._splits["test"]

    def train_dataloader(self) -> DataLoader[Any]:
        start, self._batches_done = self._batches_done, 0
        return self._loader("train", shuffle=True, start=start)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        # In the order of the file, not of length.
        examples = self._splits["predict"]
        return self._batches("predict", BatchSampler(range(len(examples)), self.batch_size, drop_last=False))

    def split(self, name: str) -> Any:
        """The examples of "train", "val", "test" or "predict", once `setup` has read them."""
        return self._splits[name]

    def trivial_accuracies(self, split: str) -> dict[str, float]:
        """Accuracies on a split of answers that need no attention, learned from the training split."""
        return {"majority_class": majority_class_accuracy(self.split("train").labels, self.split(split).labels)}

    def summary(self) -> Iterator[str]:
        """Where the set lies, then the size and the shares of the classes of each split; a line each."""
        yield str(self.source())
        self.load("test")
        for split in ("train", "val", "test"):
            labels = self.split(split).labels
            counts = np.bincount(labels)
            shares = ", ".join(f"{label}: {count / len(labels):.1%}" for label, count in enumerate(counts))
            yield f"{split}: {len(labels):,} examples" + (f"; classes {shares}" if shares else "")

    def state_dict(self) -> dict[str, int]:
        """How far into the epoch a checkpoint is, so that a resumed run goes on with the next batch."""
        assert self.trainer is not None
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
        done = progress.ready % int(self.trainer.num_training_batches)
        return {"batches_done": done, "examples_per_step": self._examples_per_step()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take up a checkpoint's place in the epoch; a fit must have its steps, for the order depends on them."""
        ours = self._examples_per_step()
        begun = state_dict.get("examples_per_step", ours)
        if self.trainer is not None and self.trainer.state.fn == "fit" and ours != begun:
            raise ValueError(
                f"a resumed run must keep its examples per step, got {ours} (batch_size {self.batch_size} on "
                f"{shares(self.trainer)[0]} processes) but it was begun with {begun}; set the batch size and the "
                "number of processes as they were, or begin a new run"
            )
        self._batches_done = state_dict["batches_done"]

    def _examples_per_step(self) -> int:
        return self.batch_size * shares(self.trainer)[0]

    def _loader(self, split: str, *, shuffle: bool = False, start: int = 0) -> DataLoader[Any]:
        lengths = self._splits[split].lengths
        processes, rank = shares(self.trainer)
        sampler = LengthBucketSampler(
            lengths,
            self.batch_size,
            shuffle=shuffle,
            seed=self.shuffle_seed,
            start=start,
            num_processes=processes,
            rank=rank,
        )
        return self._batches(split, sampler)

    def _batches(self, split: str, sampler: Sampler[list[int]]) -> DataLoader[Any]:
        # The sampler yields whole batches, and the data set pads them: nothing is left for workers to do. A generator
        # of its own keeps the loader from drawing on the random numbers of the training.
        batches = self.batches(self._splits[split], self.shift)
        return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())


class LengthBucketSampler(DistributedSampler[list[int]]):
    """Batches of examples of similar length, so that little of a batch is padding.

    Shuffled, an epoch's order depends on the seed and the epoch alone: examples are shuffled, cut into pools of 50
    steps, each pool is sorted by length and cut into steps, and the steps are shuffled. A step is one batch for every
    process, which share its examples like cards; the last one deals some twice where they do not come out even. Not
    shuffled, batches run from the shortest examples to the longest, and each is one process's.

    Args:
        lengths: (examples,) of integers.
        batch_size: examples per batch and process; the last one may be smaller.
        shuffle: whether the order is random.
        seed: of the random order.
        start: batches to leave out of the first epoch, which a resumed run has seen already.
        num_processes: how many share the examples.
        rank: which of them this one is.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        start: int = 0,
        num_processes: int = 1,
        rank: int = 0,
    ) -> None:
        # Lightning leaves samplers of this kind alone, and tells them the epoch.
        super().__init__(range(len(lengths)), num_replicas=num_processes, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.start = start

    def __len__(self) -> int:
        if self.shuffle:
            return -(-len(self.lengths) // (self.batch_size * self.num_replicas))
        return len(self._in_order())

    def __iter__(self) -> Iterator[list[int]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        start, self.start = self.start, 0
        if not self.shuffle:
            yield from self._in_order()
            return
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        per_step = self.batch_size * self.num_replicas
        pool = per_step * _BATCHES_PER_POOL
        steps: list[list[int]] = []
        for first in range(0, len(order), pool):
            members = order[first : first + pool]
            steps += _cut(members[np.argsort(self.lengths[members], kind="stable")], per_step)
        for index in random.permutation(len(steps))[start:]:
            yield self._dealt(steps[index])

    def _in_order(self) -> list[list[int]]:
        # Smaller ones of few examples: a process without a batch would leave the others waiting.
        size = max(1, min(self.batch_size, len(self.lengths) // self.num_replicas))
        return _cut(np.argsort(self.lengths, kind="stable"), size)[self.rank :: self.num_replicas]

    def _dealt(self, step: list[int]) -> list[int]:
        missing = -len(step) % self.num_replicas
        return (step + [step[i % len(step)] for i in range(missing)])[self.rank :: self.num_replicas]


def _cut(order: np.ndarray, size: int) -> list[list[int]]:
    return [order[i : i + size].tolist() for i in range(0, len(order), size)]
