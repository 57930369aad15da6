"""What the streaming implementations share: (B, H, positions, channels) tensors walked block by block, without copies.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, M key positions.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lineara.ops.precision import accumulation_dtype

# A block holds at most this many elements (2 MiB of float32); it takes as many rows as fit at this length.
_BLOCK_ELEMENTS = 512 * 1024
_BLOCK_LEN = 512
# A product adds the positions of a block one by one, so longer blocks would lose digits.
_LONGEST_BLOCK = 8192
# Up to this many elements (8 MiB of float32) in query, key and value each, all positions are one block, and that block
# is the reference's business: torch's own operations on whole tensors are as fast there, and keep no more than this.
_ONE_BLOCK_ELEMENTS = 2 * 1024 * 1024


def in_passes(implementation: str, *tensors: Tensor, always: bool) -> bool:
    """Whether (B, H, positions, channels) tensors are computed in passes, not by the reference's whole operations.

    Streaming leaves to the reference what is so small that walking it in blocks would cost more than it saves.
    """
    if implementation != "streaming" or always:
        return implementation != "reference"
    return any(tensor.numel() > _ONE_BLOCK_ELEMENTS for tensor in tensors)


class Buffer:
    """Room for one block of a tensor in the dtype that sums are kept in, taken when first needed."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = accumulation_dtype(tensor.dtype)
        self._size = min(tensor.numel(), max(_BLOCK_ELEMENTS, tensor.shape[3]))
        self._memory: Tensor | None = None

    def fit(self, block: Tensor) -> Tensor:
        """Uninitialised, of the shape of the block."""
        if self._memory is None:
            self._memory = block.new_empty(self._size, dtype=self.dtype)
        return self._memory[: block.numel()].view(block.shape)

    def load(self, block: Tensor, scale: float, hidden: Tensor | None = None, fill: float = 0.0) -> Tensor:
        """scale * block in the buffer's dtype, `fill` where hidden; the block itself where that changes nothing."""
        anything_hidden = hidden is not None and hidden.shape[2] > 0
        if block.dtype == self.dtype and scale == 1.0 and not anything_hidden:
            return block
        loaded = self.fit(block).copy_(block)
        if scale != 1.0:
            loaded.mul_(scale)
        return loaded.masked_fill_(hidden, fill) if hidden is not None and anything_hidden else loaded

    @contextmanager
    def storing(self, target: Tensor) -> Generator[Tensor]:
        """A tensor to compute in, which ends up in the target: the target itself where dtype and layout allow it."""
        if target.dtype == self.dtype and target.stride(2) == 1:
            yield target
        else:
            result = self.fit(target)
            yield result
            target.copy_(result)


def empty_like_query(query: Tensor, channels: int) -> Tensor:
    """(B, H, N, channels), its axes in the same order in memory as those of the query."""
    order = sorted(range(4), key=lambda axis: query.stride(axis), reverse=True)
    return torch.empty_permuted((*query.shape[:3], channels), order, dtype=query.dtype, device=query.device)


def blocks(long: Sequence[Tensor], short: Sequence[Tensor]) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
    """Cut (B, H, positions, ...) and (B, H, ...) tensors into (R, n, ...) and (R, ...) views, block by block.

    No layout is copied: where batch and heads do not lie evenly spaced in memory, the batch is walked item by item.
    """
    batch, heads, num_positions = long[0].shape[:3]
    tensors = (*long, *short)
    if all(_rows_are_evenly_spaced(tensor) for tensor in tensors):
        groups, num_rows = [[tensor.flatten(0, 1) for tensor in tensors]], batch * heads
    else:
        groups, num_rows = [[tensor[item] for tensor in tensors] for item in range(batch)], heads
    channels = max(tensor.shape[3] for tensor in long)
    rows = min(num_rows, _BLOCK_ELEMENTS // (channels * min(num_positions, _BLOCK_LEN) or 1)) or 1
    length = min(_BLOCK_ELEMENTS // (channels * rows) or 1, _LONGEST_BLOCK)
    for group in groups:
        for row in range(0, num_rows, rows):
            views = [tensor[row : row + rows] for tensor in group]
            for start in range(0, num_positions, length):
                yield [view[:, start : start + length] for view in views[: len(long)]], views[len(long) :]


def _rows_are_evenly_spaced(tensor: Tensor) -> bool:
    batch, heads = tensor.shape[:2]
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def hidden_positions(key_mask: Tensor | None, key: Tensor) -> Tensor:
    """True where a position takes no part: (B, H, M, 1), or (B, H, M, 0) when every position takes part."""
    if key_mask is None:
        return key.new_empty((*key.shape[:3], 0), dtype=torch.bool)
    return (~key_mask)[:, None, :, None].expand(-1, key.shape[1], -1, -1).contiguous()
