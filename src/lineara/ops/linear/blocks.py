"""What the streaming implementation walks: (B, H, positions, channels) tensors, block by block.

Letters in comments: B batch, H heads, b items and h heads of a block, R = b * h rows, n positions of a block,
M key positions.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lineara.ops.linear.layout import positions_are_adjacent
from lineara.ops.precision import accumulation_dtype

# A block holds at most this many elements (2 MiB of float32); it takes as many rows as fit at this length.
_BLOCK_ELEMENTS = 512 * 1024
_BLOCK_LEN = 512
# A product adds the positions of a block one by one, so longer blocks would lose digits.
_LONGEST_BLOCK = 8192


class Buffer:
    """Room for one block of a tensor in the dtype that sums are kept in, taken when first needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = accumulation_dtype(tensor.dtype)
        self._size = min(tensor.numel(), max(_BLOCK_ELEMENTS, tensor.shape[3]))
        self._memory: Tensor | None = None

    def fit(self, block: Tensor) -> Tensor:
        """Uninitialised, of the shape of the block, laid out as it is: by position or by channel."""
        if self._memory is None:
            self._memory = block.new_empty(self._size, dtype=self.dtype)
        memory = self._memory[: block.numel()]
        return memory.view(block.mT.shape).mT if positions_are_adjacent(block) else memory.view(block.shape)

    def load(self, block: Tensor, scale: float, hidden: Tensor | None = None, fill: float = 0.0) -> Tensor:
        """scale * block as (R, n, D) in the buffer's dtype, `fill` where hidden; a view where that changes nothing."""
        if block.dtype == self.dtype and scale == 1.0 and hidden is None and _rows_are_even(block):
            return block.flatten(0, 1)
        loaded = self.fit(block)
        if block.dtype == self.dtype and scale != 1.0:
            torch.mul(block, scale, out=loaded)
        else:
            loaded.copy_(block)
            if scale != 1.0:
                loaded.mul_(scale)
        # (Strides as `fit` gives them, so that what is computed in place is seen to be.)
        loaded = loaded.mT.flatten(0, 1).mT if positions_are_adjacent(loaded) else loaded.flatten(0, 1)
        return loaded if hidden is None else loaded.masked_fill_(hidden, fill)

    @contextmanager
    def storing(self, target: Tensor) -> Generator[Tensor]:
        """(R, n, D) to compute in, which ends up in the target: the target itself where dtype and layout allow it."""
        in_order = target.stride(3) == 1 or positions_are_adjacent(target)
        if target.dtype == self.dtype and in_order and _rows_are_even(target):
            yield target.flatten(0, 1)
        else:
            result = self.fit(target)
            yield result.flatten(0, 1)
            target.copy_(result)


def empty_like_query(query: Tensor, channels: int) -> Tensor:
    """(B, H, N, channels), its axes in the same order in memory as those of the query."""
    order = sorted(range(4), key=lambda axis: query.stride(axis), reverse=True)
    return torch.empty_permuted((*query.shape[:3], channels), order, dtype=query.dtype, device=query.device)


def row_blocks(
    long: Sequence[Tensor], short: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Iterator[Sequence[Tensor]]]]:
    """Cut (B, H, positions, ...) and contiguous (B, H, ...) tensors into blocks of rows, and these along positions.

    For every block of rows, the short ones as (R, ...) views, and an iterator over the long ones as (b, h, n, ...)
    views. A block of several items whose rows do not lie evenly spaced in memory is copied by `Buffer` while it is in
    the cache, one of a single item is not: the number of blocks grows with the elements, not with the batch.
    """
    batch, heads, num_positions = long[0].shape[:3]
    channels = max(tensor.shape[3] for tensor in long)
    rows = min(batch * heads, _BLOCK_ELEMENTS // (channels * min(num_positions, _BLOCK_LEN) or 1)) or 1
    length = min(_BLOCK_ELEMENTS // (channels * rows) or 1, _LONGEST_BLOCK)
    items = max(1, rows // max(heads, 1))  # either whole items, or some heads of one
    for item in range(0, batch, items):
        for head in range(0, heads, rows):
            here = slice(item, item + items), slice(head, head + rows)
            along = (
                [tensor[(*here, slice(start, start + length))] for tensor in long]
                for start in range(0, num_positions, length)
            )
            yield [tensor[here].flatten(0, 1) for tensor in short], along


def _rows_are_even(block: Tensor) -> bool:
    """Whether items and heads can be seen as one axis without a copy."""
    items, heads = block.shape[:2]
    return items == 1 or heads == 1 or block.stride(0) == heads * block.stride(1)


def hidden_positions(key_mask: Tensor | None, key: Tensor) -> Tensor:
    """True where a position takes no part: (B, 1, M, 1), or (B, H, M, 0) when every position takes part."""
    if key_mask is None:
        return key.new_empty((*key.shape[:3], 0), dtype=torch.bool)
    return (~key_mask)[:, None, :, None].expand(-1, key.shape[1], -1, -1)


def any_hidden(hidden: Tensor) -> Tensor | None:
    """Of a block of `hidden_positions`, (R, n, 1); None where there are none, if a look at them does not wait."""
    if hidden.shape[3] == 0 or (hidden.device.type == "cpu" and not hidden[:, 0].any()):
        return None
    return hidden.flatten(0, 1)
