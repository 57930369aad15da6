"""Which images make a batch, and in which order batches come."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

# The number of an image in its set, and the seed of the random numbers that change it.
Item = tuple[int, int]


class BrokenImage:
    """What a loader's worker hands over instead of a batch: the sentence that refuses an image."""

    def __init__(self, sentence: str) -> None:
        self.sentence = sentence


class ImageLoader(DataLoader[Any]):
    """A loader that raises here, not in a worker: an error from there is a page long."""

    def __iter__(self) -> Iterator[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        for batch in super().__iter__():
            if isinstance(batch, BrokenImage):
                raise ValueError(batch.sentence)
            yield batch


class AspectRatioBatches(DistributedSampler[list[Item]]):
    """Batches of wide images alone or of tall ones alone, so that little of a batch is padding.

    Shuffled, an epoch depends on the seed and the epoch alone. Images come in random order; as soon as enough wide
    ones, or enough tall ones, have come they are a batch; those left over at the end are smaller batches; and the
    batches are shuffled. Not shuffled, wide and tall images may share a batch and come in the order of the set.

    Of several processes each has every so manieth batch. Shuffled, the first batches are used again until all have the
    same number, because training processes wait for each other; not shuffled, none is used twice, but where there are
    fewer than processes, which each must have one: scores count an image once all the same.

    Args:
        wide: (images,) of booleans, whether an image is at least as wide as it is tall.
        batch_size: images per batch.
        shuffle: whether the order is random.
        seed: of the random order.
        start: of this process's batches in the first epoch, leave out so many, which a resumed run has seen already.
        num_processes: how many share the batches.
        rank: which of them this one is.
    """

    def __init__(
        self,
        wide: npt.NDArray[np.bool_],
        batch_size: int,
        *,
        shuffle: bool,
        seed: int = 0,
        start: int = 0,
        num_processes: int = 1,
        rank: int = 0,
    ) -> None:
        # Lightning leaves samplers of this kind alone, and tells them the epoch.
        super().__init__(range(len(wide)), num_replicas=num_processes, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.wide = wide
        self.batch_size = batch_size
        self.start = start

    def __len__(self) -> int:
        total = self._num_batches()
        if self.shuffle:
            return -(-total // self.num_replicas)
        return max(min(total, 1), len(range(self.rank, total, self.num_replicas)))

    def __iter__(self) -> Iterator[list[Item]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        start, self.start = self.start, 0
        batches = self._shuffled() if self.shuffle else self._in_order()
        missing = -len(batches) % self.num_replicas if self.shuffle else max(0, self.num_replicas - len(batches))
        missing = missing if batches else 0
        batches += [batches[i % len(batches)] for i in range(missing)]
        yield from batches[self.rank :: self.num_replicas][start:]

    def _num_batches(self) -> int:
        sizes = (int(self.wide.sum()), int((~self.wide).sum())) if self.shuffle else (len(self.wide),)
        return sum(-(-size // self.batch_size) for size in sizes)

    def _in_order(self) -> list[list[Item]]:
        items = [(index, 0) for index in range(len(self.wide))]
        return [items[i : i + self.batch_size] for i in range(0, len(items), self.batch_size)]

    def _shuffled(self) -> list[list[Item]]:
        random = np.random.default_rng((self.seed, self.epoch))
        order = random.permutation(len(self.wide)).tolist()
        seeds = random.integers(2**62, size=len(order)).tolist()
        batches = list[list[Item]]()
        waiting: dict[bool, list[Item]] = {True: [], False: []}
        for index, seed in zip(order, seeds):
            group = waiting[bool(self.wide[index])]
            group.append((index, seed))
            if len(group) == self.batch_size:
                batches.append(group.copy())
                group.clear()
        batches += [group for group in waiting.values() if group]
        return [batches[i] for i in random.permutation(len(batches))]
