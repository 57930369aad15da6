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
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

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
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, (stage,)):
            if len(self._splits[split]) == 0:
                raise ValueError(
                    f"the {split} split must hold at least 1 example, got none; set --data.num_{split} or name "
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
        return {"batches_done": progress.ready % int(self.trainer.num_training_batches)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._batches_done = state_dict["batches_done"]

    def _loader(self, split: str, *, shuffle: bool = False, start: int = 0) -> DataLoader[Any]:
        lengths = self._splits[split].lengths
        sampler = LengthBucketSampler(lengths, self.batch_size, shuffle=shuffle, seed=self.shuffle_seed, start=start)
        return self._batches(split, sampler)

    def _batches(self, split: str, sampler: Sampler[list[int]]) -> DataLoader[Any]:
        # The sampler yields whole batches, and the data set pads them: nothing is left for workers to do. A generator
        # of its own keeps the loader from drawing on the random numbers of the training.
        batches = self.batches(self._splits[split], self.shift)
        return DataLoader(batches, sampler=sampler, batch_size=None, generator=torch.Generator())


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of examples of similar length, so that little of a batch is padding.

    Shuffled, an epoch's order depends on the seed and the epoch alone: examples are shuffled, cut into pools of 50
    batches, each pool is sorted by length and cut into batches, and the batches are shuffled. Not shuffled, batches run
    from the shortest examples to the longest.

    Args:
        lengths: (examples,) of integers.
        batch_size: examples per batch; the last one may be smaller.
        shuffle: whether the order is random.
        seed: of the random order.
        start: batches to leave out of the first epoch, which a resumed run has seen already.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, *, shuffle: bool, seed: int = 0, start: int = 0) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self.start = start

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        if not self.shuffle:
            yield from self._cut(np.argsort(self.lengths, kind="stable"))
            return
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        pool = self.batch_size * _BATCHES_PER_POOL
        batches: list[list[int]] = []
        for first in range(0, len(order), pool):
            members = order[first : first + pool]
            batches += self._cut(members[np.argsort(self.lengths[members], kind="stable")])
        for index in random.permutation(len(batches))[start:]:
            yield batches[index]

    def _cut(self, order: np.ndarray) -> list[list[int]]:
        return [order[i : i + self.batch_size].tolist() for i in range(0, len(order), self.batch_size)]
