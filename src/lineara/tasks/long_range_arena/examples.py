"""Sequences of different lengths in flat arrays."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt


@dataclass(eq=False)
class SequenceExamples:
    """Labelled sequences, one after the other; ValueError if the arrays do not fit together.

    Args:
        tokens: (total tokens,) of any integer dtype, without padding.
        offsets: (examples + 1,) int64; example i is `tokens[offsets[i] : offsets[i + 1]]`.
        labels: (examples,) of any integer dtype, the class of each example, from 0.
    """

    tokens: npt.NDArray[np.integer]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.integer]

    def __post_init__(self) -> None:
        ends = (len(self.offsets), *self.offsets[:1], *self.offsets[-1:])
        if ends != (len(self.labels) + 1, 0, len(self.tokens)) or np.any(self.lengths < 0):
            raise ValueError(
                f"offsets must be {len(self.labels) + 1} numbers, one more than labels, rising from 0 to the "
                f"{len(self.tokens)} tokens, got {self.offsets}"
            )

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(examples,) int64, number of tokens of each example."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.integer], int]:
        """Tokens (a view) and label of one example."""
        label = int(self.labels[index])  # raises IndexError beyond the end, which also ends a `for` loop
        index %= len(self)
        return self.tokens[self.offsets[index] : self.offsets[index + 1]], label

    def part(self, start: int, stop: int) -> Self:
        """Examples `start` up to but not including `stop`; tokens and labels are views."""
        offsets = self.offsets[start : stop + 1]
        tokens = self.tokens[offsets[0] : offsets[-1]]
        return type(self)(tokens, offsets - offsets[0], self.labels[start:stop])
