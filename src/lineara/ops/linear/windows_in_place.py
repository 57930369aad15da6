"""Windows compressed with nothing as long as the sequence kept, and the gradients of that.

What a window's positions hold is read at one offset after the other, over all windows at once, so that no input is
copied or padded. Going backward, windows are compressed again.

Letters in comments: B batch, h heads of one resolution, M key positions, J windows, W positions of a window,
D channels.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lineara.ops.precision import accumulation_dtype


class Windows(NamedTuple):
    """How keys and values become windows, head by head; without resolutions every position is its own."""

    resolutions: Sequence[int] = ()
    key_shape: Sequence[int] = ()
    compression: str = "mean"  # or "max" or "conv"

    def within(self, largest: int) -> "Windows":
        """With no resolution beyond the longest axis of the grid: that makes a single window already."""
        if self.compression == "conv":  # whose places in the window have numbers that depend on the resolution
            return self
        return self._replace(resolutions=[min(resolution, max(1, largest)) for resolution in self.resolutions])


class WindowsInPlace:
    """The windows of one resolution over the grid of key positions; `mask` says which hold a valid one, (B, J)."""

    def __init__(self, resolution: int, windows: Windows, key_mask: Tensor | None) -> None:
        self._resolution = resolution
        self._kind = windows.compression
        self._grid = tuple(windows.key_shape)
        self._grid_of_windows = tuple(-(-size // resolution) for size in self._grid)
        self._are_positions = resolution == 1 and windows.compression != "conv"
        self._hidden = None if key_mask is None else ~key_mask[:, None, :, None]  # (B, 1, M, 1)
        self._num_valid: Tensor | None = None
        self.mask = key_mask
        if key_mask is not None and not self._are_positions:
            self._num_valid = self._count(key_mask[:, None, :, None])  # (B, 1, J, 1)
            self.mask = self._num_valid[:, 0, :, 0] > 0

    def compress(self, tensor: Tensor, weight: Tensor | None) -> Tensor:
        """(B, h, M, D) to (B, h, J, D), in the dtype of sums; or the tensor as it is where windows are positions."""
        if self._are_positions:
            return tensor
        dtype = accumulation_dtype(tensor.dtype)
        fill = -torch.inf if self._kind == "max" else 0.0
        result = tensor.new_full((*tensor.shape[:2], *self._grid_of_windows, tensor.shape[3]), fill, dtype=dtype)
        for index, positions, windows in self._offsets():
            part, target = self._visible(tensor, positions, fill), result[windows]
            if self._kind == "max":
                torch.maximum(target, part.to(dtype), out=target)
            elif weight is None:
                target.add_(part)
            else:
                target.addcmul_(part.to(dtype), self._row(weight, index, dtype))
        result = result.flatten(2, -2)  # (B, h, J, D)
        if self._kind != "max":
            return result.mul_(self._factor(result))
        return result if self.mask is None else result.masked_fill_(~self.mask[:, None, :, None], 0.0)

    def spread(
        self,
        grad: Tensor,
        compressed: Tensor,
        tensor: Tensor,
        weight: Tensor | None,
        grad_tensor: Tensor,
        grad_weight: Tensor | None,
    ) -> None:
        """From the gradient of the windows, (B, h, J, D), those of the tensor and the weight, into the last two."""
        if self._are_positions:
            grad_tensor.copy_(grad)
            return
        grad = grad * (self._share_of_maximum(compressed, tensor) if self._kind == "max" else self._factor(grad))
        grad = on_grid(grad, self._grid_of_windows)
        compressed = on_grid(compressed, self._grid_of_windows)
        for index, positions, windows in self._offsets():
            target, part = on_grid(grad_tensor, self._grid)[positions], grad[windows]
            if self._kind == "max":
                target.copy_(part * (self._visible(tensor, positions, -torch.inf) == compressed[windows]))
                continue
            if weight is None or grad_weight is None:
                target.copy_(part)
            else:
                target.copy_(part * self._row(weight, index, part.dtype))
                products = (part * self._visible(tensor, positions, 0.0)).flatten(2, -2)  # (B, h, J, D)
                grad_weight[:, :, index] = products.sum(dim=(0, 2))
            if self._hidden is not None:
                target.masked_fill_(on_grid(self._hidden, self._grid)[positions], 0.0)

    def _offsets(self) -> Iterator[tuple[int, tuple[slice, ...], tuple[slice, ...]]]:
        """For every place in a window: its number, the positions there, and the windows that have such a position."""
        everything = (slice(None), slice(None))
        for offset in product(*(range(min(self._resolution, size)) for size in self._grid)):
            index = 0
            for start in offset:
                index = index * self._resolution + start
            counts = [len(range(start, size, self._resolution)) for start, size in zip(offset, self._grid)]
            positions = tuple(slice(start, None, self._resolution) for start in offset)
            yield index, (*everything, *positions), (*everything, *(slice(count) for count in counts))

    def _visible(self, tensor: Tensor, positions: tuple[slice, ...], fill: float) -> Tensor:
        part = on_grid(tensor, self._grid)[positions]  # (B, h, *windows, D)
        if self._hidden is None:
            return part
        return part.masked_fill(on_grid(self._hidden, self._grid)[positions], fill)

    def _count(self, valid: Tensor) -> Tensor:
        """The number of valid positions of every window: (B, 1, J, 1)."""
        result = valid.new_zeros((valid.shape[0], 1, *self._grid_of_windows, 1), dtype=torch.int32)
        for _, positions, windows in self._offsets():
            result[windows].add_(on_grid(valid, self._grid)[positions])
        return result.flatten(2, -2)

    def _factor(self, like: Tensor) -> Tensor:
        """1 / n for a mean over n valid positions, W / n for a weighted sum that a mean of weight 1 / W is to equal."""
        if self._num_valid is None:
            self._num_valid = self._count(like.new_ones((1, 1, math.prod(self._grid), 1), dtype=torch.bool))
        size = self._resolution ** len(self._grid) if self._kind == "conv" else 1
        return size / self._num_valid.clamp_min(1).to(like.dtype)

    def _share_of_maximum(self, compressed: Tensor, tensor: Tensor) -> Tensor:
        """1 / the number of positions that hold the maximum of their window: (B, h, J, D)."""
        maximum = on_grid(compressed, self._grid_of_windows)
        result = torch.zeros_like(maximum)
        for _, positions, windows in self._offsets():
            result[windows].add_(self._visible(tensor, positions, -torch.inf) == maximum[windows])
        return result.clamp_min_(1.0).reciprocal_().flatten(2, -2)

    def _row(self, weight: Tensor, index: int, dtype: torch.dtype) -> Tensor:
        """The weights (h, D, W) of one place in the window: (h, 1, ..., 1, D), as many axes as the grid has."""
        row = weight[:, :, index].to(dtype)
        return row.view(len(row), *(1 for _ in self._grid), -1)


def on_grid(tensor: Tensor, sizes: Sequence[int], axis: int = 2) -> Tensor:
    """The axis of positions as a grid: (B, h, M, D) to (B, h, *sizes, D), a view."""
    return tensor.unflatten(axis, tuple(sizes))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - torch has no types for it
