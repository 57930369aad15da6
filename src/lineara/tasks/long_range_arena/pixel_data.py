"""What the tasks on grey images share: one pixel is one token."""

from typing import Any

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.data import SequenceData
from lineara.tasks.long_range_arena.examples import SequenceExamples


class PixelData(SequenceData):
    """Grey images, row by row.

    The id of a pixel is its value + 1, and 0 is padding, so that black pixels are tokens like any other. The published
    harnesses take the value itself for the id, and so hide black pixels as if they were padding: `mask_zero_pixels`
    does that too. Either way there are at most 257 ids.

    Args:
        batch_size: images per batch.
        shuffle_seed: seed of the order of training batches.
        mask_zero_pixels: whether black pixels are hidden.
    """

    def __init__(self, *, batch_size: int, shuffle_seed: int, mask_zero_pixels: bool) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, shift=0 if mask_zero_pixels else 1)

    def describe(self, tokens: npt.NDArray[np.int64]) -> str:
        """The values of the pixels with blanks between."""
        return " ".join(map(str, tokens - self.shift))


def as_sequences(images: npt.NDArray[np.uint8], labels: npt.NDArray[Any]) -> SequenceExamples:
    """Grey images (n, height, width) as sequences of height * width pixels."""
    num_images, height, width = images.shape
    offsets = np.arange(num_images + 1, dtype=np.int64) * (height * width)
    return SequenceExamples(images.reshape(-1), offsets, labels.astype(np.uint8))
