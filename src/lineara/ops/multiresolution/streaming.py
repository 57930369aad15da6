"""Multiresolution attention block by block: windows are compressed, summarised, and compressed again going backward.

Nothing as long as the sequence is kept but inputs and output. What a window's positions hold is read at one offset
after the other, over all windows at once, so that no input is copied or padded.

Letters in comments: B batch, H heads, h heads of one resolution, M key positions, J windows, W positions of a window,
D channels; K key channels, V value channels.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from lineara.ops.dispatch import passes
from lineara.ops.multiresolution.reference import groups, on_grid
from lineara.ops.precision import accumulation_dtype


class Compression(NamedTuple):
    """How keys and values become windows."""

    resolutions: Sequence[int]
    key_shape: Sequence[int]
    kind: str  # "mean", "max" or "conv"


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    compression: Compression,
    feature_map: str,
    scale: float,
    impl: str = "streaming",
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and weighted sum (B, H, K, V) over windows; only softmax has a maximum.

    `impl` names the passes that summarise the windows.
    """
    efficient, kernel = passes("efficient", impl), passes("kernel", impl)
    summaries: list[tuple[Tensor, Tensor, Tensor]] = []
    for heads, resolution in groups(compression.resolutions):
        windows = _Windows(resolution, compression, key_mask)
        k = windows.compress(key[:, heads], _of_heads(key_weight, heads))  # (B, h, J, K)
        v = windows.compress(value[:, heads], _of_heads(value_weight, heads))  # (B, h, J, V)
        if feature_map == "softmax":
            summaries.append(efficient.summarize(k, v, windows.mask, "softmax", scale))
        else:
            total, weighted_sum = kernel.summarize(k, v, windows.mask, feature_map, scale)
            summaries.append((torch.zeros_like(total), total, weighted_sum))
    maximum, total, weighted_sum = (torch.cat(tensors, dim=1) for tensors in zip(*summaries))
    return maximum, total, weighted_sum


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    maximum: Tensor,
    compression: Compression,
    feature_map: str,
    scale: float,
    impl: str = "streaming",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of key, value and both weights."""
    efficient, kernel = passes("efficient", impl), passes("kernel", impl)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_key_weight = None if key_weight is None else torch.zeros_like(key_weight)
    grad_value_weight = None if value_weight is None else torch.zeros_like(value_weight)
    for heads, resolution in groups(compression.resolutions):
        windows = _Windows(resolution, compression, key_mask)
        of_key = (key[:, heads], _of_heads(key_weight, heads))
        of_value = (value[:, heads], _of_heads(value_weight, heads))
        k, v = windows.compress(*of_key), windows.compress(*of_value)
        ds, dS = grad_total[:, heads], grad_weighted_sum[:, heads]
        if feature_map == "softmax":
            dk, dv = efficient.summarize_backward(ds, dS, k, v, windows.mask, maximum[:, heads], "softmax", scale)
        else:
            dk, dv = kernel.summarize_backward(ds, dS, k, v, windows.mask, feature_map, scale)
        for grad, compressed, (tensor, weight), result, result_weight in (
            (dk, k, of_key, grad_key, grad_key_weight),
            (dv, v, of_value, grad_value, grad_value_weight),
        ):
            windows.spread(grad, compressed, tensor, weight, result[:, heads], _of_heads(result_weight, heads))
    return grad_key, grad_value, grad_key_weight, grad_value_weight


class _Windows:
    """The windows of one resolution over the grid of key positions; `mask` says which hold a valid one, (B, J)."""

    def __init__(self, resolution: int, compression: Compression, key_mask: Tensor | None) -> None:
        self._resolution = resolution
        self._kind = compression.kind
        self._grid = tuple(compression.key_shape)
        self._grid_of_windows = tuple(-(-size // resolution) for size in self._grid)
        self._are_positions = resolution == 1 and compression.kind != "conv"
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


def _of_heads(weight: Tensor | None, heads: slice) -> Tensor | None:
    return None if weight is None else weight[heads]
