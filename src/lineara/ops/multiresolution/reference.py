"""Multiresolution attention in plain PyTorch: the definition of what is right, on any device.

Letters in comments: B batch, H heads, h heads of one resolution, N query positions, M key positions, J windows,
W positions of a window, D channels.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from lineara.ops.efficient import reference as efficient
from lineara.ops.efficient.reference import ContextSummary
from lineara.ops.kernel import reference as kernel
from lineara.ops.precision import accumulation_dtype
from lineara.ops.sequence_parallel import Alignment, Part, sums_over_group

Weights = tuple[Tensor | None, Tensor | None]  # of keys and values


def multiresolution_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    resolutions: Sequence[int],
    key_shape: Sequence[int],
    compression: str,
    feature_map: str,
    gate: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    scale: float,
    key_mask: Tensor | None,
    group_name: str = "",
) -> Tensor:
    weights = (key_weight, value_weight)
    if group_name:
        alignment = Alignment(key, key_mask, key_shape, resolutions, group_name)
        resolutions = within(resolutions, compression, alignment.largest)
        parts = alignment.parts(key, value, key_mask)
        summaries = [_summarize(part, resolutions, compression, feature_map, weights, scale) for part in parts]
        _, total, context = join(summaries, feature_map, scale, group_name)
    else:
        part = Part(key, value, key_mask, tuple(key_shape))
        total, context = _context_of(part, resolutions, compression, feature_map, weights, scale)
    if feature_map == "softmax":
        output = efficient.apply_context(query, context, "softmax", scale)
    else:
        output = kernel.apply(query, total, context, feature_map, scale)
    return output if gate is None else output * gate[..., None]


def within(resolutions: Sequence[int], compression: str, largest: int) -> Sequence[int]:
    """The resolutions, none beyond the longest axis of the grid: that makes a single window already."""
    if compression == "conv":  # whose places in the window have numbers that depend on the resolution
        return resolutions
    return [min(resolution, largest) for resolution in resolutions]


def join(
    summaries: Sequence[tuple[Tensor, Tensor, Tensor]], feature_map: str, scale: float, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum (B, H, K), total (B, H, K) and context (B, H, K, V) of all parts and ranks, from each part's sums.

    Under softmax the context is divided by the total; otherwise the maximum means nothing.
    """
    if feature_map == "softmax":
        parts = [ContextSummary(*summary, "softmax", scale) for summary in summaries]
        return efficient.context_over_ranks(reduce(efficient.merge_contexts, parts), group_name)
    maximum, total, context = (reduce(torch.add, sums) for sums in zip(*summaries))
    if group_name:
        total, context = sums_over_group(total, context, group_name)
    return maximum, total, context


def _context_of(
    part: Part, resolutions: Sequence[int], compression: str, feature_map: str, weights: Weights, scale: float
) -> tuple[Tensor, Tensor]:
    """The total (B, H, K), which softmax has no use for, and the context (B, H, K, V)."""
    if feature_map != "softmax":
        return _summarize(part, resolutions, compression, feature_map, weights, scale)[1:]
    contexts = [
        efficient.context_of(k, v, "softmax", scale, mask)  # (B, h, K, V)
        for k, v, mask in _windows_of_heads(part, resolutions, compression, weights)
    ]
    context = torch.cat(contexts, dim=1)
    return context[..., 0], context


def _summarize(
    part: Part, resolutions: Sequence[int], compression: str, feature_map: str, weights: Weights, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and weighted sum (B, H, K, V) over windows."""
    summaries: list[tuple[Tensor, Tensor, Tensor]] = []
    for k, v, mask in _windows_of_heads(part, resolutions, compression, weights):
        if feature_map == "softmax":
            summary = efficient.summarize_context(k, v, mask, normalization="softmax", scale=scale)
            summaries.append(summary[:3])
        else:
            total, weighted_sum = kernel.summarize(k, v, feature_map, scale, mask)
            summaries.append((torch.zeros_like(total), total, weighted_sum))
    maximum, total, weighted_sum = (torch.cat(tensors, dim=1) for tensors in zip(*summaries))
    return maximum, total, weighted_sum


def _windows_of_heads(
    part: Part, resolutions: Sequence[int], compression: str, weights: Weights
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Keys (B, h, J, K), values (B, h, J, V) and the mask (B, J) of windows, for neighbouring heads of a resolution."""
    runs = groups(resolutions)
    sizes = [heads.stop - heads.start for heads, _ in runs]
    # (Split, not sliced: the gradient of each slice would be a tensor of zeros for all heads.)
    for (heads, resolution), k, v in zip(runs, torch.split(part.key, sizes, 1), torch.split(part.value, sizes, 1)):
        k, mask = _compress(k, resolution, part.key_shape, compression, weights[0], heads, part.key_mask)
        v, _ = _compress(v, resolution, part.key_shape, compression, weights[1], heads, part.key_mask)
        yield k, v, mask


def groups(resolutions: Sequence[int]) -> list[tuple[slice, int]]:
    """Neighbouring heads of one resolution, so that they are computed together."""
    starts = [i for i, r in enumerate(resolutions) if i == 0 or r != resolutions[i - 1]]
    return [(slice(i, j), resolutions[i]) for i, j in zip(starts, [*starts[1:], len(resolutions)])]


def on_grid(tensor: Tensor, sizes: Sequence[int], axis: int = 2) -> Tensor:
    """The axis of positions as a grid: (B, h, M, D) to (B, h, *sizes, D), a view."""
    return tensor.unflatten(axis, tuple(sizes))  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - torch has no types for it


def _compress(
    tensor: Tensor,
    resolution: int,
    key_shape: Sequence[int],
    compression: str,
    weight: Tensor | None,
    heads: slice,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One position in place of every window: (B, h, J, D), and which windows hold a valid one, (B, J)."""
    if resolution == 1 and compression != "conv":
        return tensor, key_mask
    tensor = tensor.to(accumulation_dtype(tensor.dtype))
    windows = _windows(tensor, resolution, key_shape)  # (B, h, J, W, D); zeros beyond the end
    size = windows.shape[3]
    if key_mask is None and all(length % resolution == 0 for length in key_shape):
        num_valid, exists = None, None
    else:
        mask = tensor.new_ones((1, tensor.shape[2]), dtype=torch.bool) if key_mask is None else key_mask
        valid = _windows(mask[:, None, :, None], resolution, key_shape)  # (B, 1, J, W, 1)
        num_valid = valid.sum(dim=3).to(tensor.dtype)  # (B, 1, J, 1)
        exists = None if key_mask is None else num_valid[:, 0, :, 0] > 0  # (B, J)
        if compression == "max":
            windows = windows.masked_fill(~valid, -torch.inf)
        elif key_mask is not None:
            windows = windows.masked_fill(~valid, 0.0)
    if compression == "max":
        largest = windows.amax(dim=3)
        return largest if num_valid is None else largest.masked_fill(num_valid == 0, 0.0), exists
    if weight is None and num_valid is None:
        return windows.mean(dim=3), exists
    if weight is not None:
        weights = weight[heads, :, :size].to(tensor.dtype).mT[None, :, None]  # (1, h, 1, W, D)
        windows = windows * (size * weights)
    return windows.sum(dim=3) / (size if num_valid is None else num_valid.clamp_min(1.0)), exists


def _windows(tensor: Tensor, resolution: int, key_shape: Sequence[int]) -> Tensor:
    """(B, h, M, D) to (B, h, J, W, D): the grid of positions cut into cubes, padded with zeros to whole ones."""
    tensor = on_grid(tensor, key_shape)  # (B, h, *key_shape, D)
    missing = [-size % resolution for size in key_shape]
    if any(missing):
        tensor = pad(tensor, [0, 0, *(side for size in reversed(missing) for side in (0, size))])
    for axis in range(len(key_shape)):
        tensor = on_grid(tensor, (-1, resolution), axis=2 + 2 * axis)  # in the end (B, h, J1, r, J2, r, ..., D)
    num_axes = len(key_shape)
    tensor = tensor.movedim([3 + 2 * axis for axis in range(num_axes)], [-1 - num_axes + i for i in range(num_axes)])
    return tensor.flatten(2 + num_axes, 1 + 2 * num_axes).flatten(2, 1 + num_axes)
