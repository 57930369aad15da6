"""Windows of keys and values: how they are compressed, and how heads of several resolutions are summarised.

`compress` is the definition, in differentiable standard operators; `windows_in_place.py` computes the same with nothing
as long as the sequence kept.

Letters in comments: B batch, H heads, h heads of one resolution, M key positions, J windows, W positions of a window,
D channels; K key channels, V value channels.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lineara.ops.linear import one_block, reference
from lineara.ops.linear.feature_maps import Summary
from lineara.ops.linear.windows_in_place import Windows, WindowsInPlace, on_grid
from lineara.ops.packed import Positions, Row, by_sequence, joined, stacked
from lineara.ops.precision import widened
from lineara.ops.tracing import is_plain, is_traced


class Keys(NamedTuple):
    """Keys and values, and what says which of them take part."""

    key: Tensor  # (B, H, M, K)
    value: Tensor  # (B, H, M, V)
    key_mask: Tensor | None = None  # (B, M)
    cu_seqlens: Tensor | None = None
    key_weight: Tensor | None = None  # (H, K, W), under "conv"
    value_weight: Tensor | None = None  # (H, V, W)


def summarize(means: ModuleType, keys: Keys, windows: Windows, feature_map: str, scale: float) -> Summary:
    """The summary over windows, or over positions, by `means`: `reference`, `streaming` or `triton_kernels`."""
    maximum, total, weighted_sum = _over_windows(means, means.summarize, keys, windows, feature_map, scale)
    return maximum, total, weighted_sum


def context_of(keys: Keys, windows: Windows, feature_map: str, scale: float) -> Tensor:
    """By the reference, the weighted sum divided by the total, (B, H, K, V), of a map that divides so."""
    if is_plain(keys.key):
        context = _context_of(keys, windows, feature_map, scale, exact=False)
        # Where the quick way meets a key channel of -inf, it gives NaN in all of its row; a masked value that is not
        # finite gives one in its column.
        seen = context.detach() if keys.key_mask is not None else context.detach().select(3, 0)
        if not math.isnan(seen.sum().item()):
            return context
    return _context_of(keys, windows, feature_map, scale, exact=True)


def _context_of(keys: Keys, windows: Windows, feature_map: str, scale: float, *, exact: bool) -> Tensor:
    def compute(*arguments: Any) -> tuple[Tensor]:
        return (reference.context_of(*arguments, exact=exact),)

    if not windows.resolutions:
        return compute(*keys[:4], feature_map, scale)[0]
    return _over_windows(reference, compute, keys, windows, feature_map, scale)[0]


def _over_windows(
    means: ModuleType,
    compute: Callable[..., tuple[Tensor, ...]],
    keys: Keys,
    windows: Windows,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, ...]:
    """What `compute` makes of all positions, or of the windows of every run of heads, side by side."""
    key, value, key_mask, cu_seqlens, *weights = keys
    if not windows.resolutions:
        return compute(key, value, key_mask, cu_seqlens, feature_map, scale)
    fused = _is_fused(means, windows)
    if cu_seqlens is not None and not fused:

        def of_sequence(key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Tensor, ...]:
            sequence = windows._replace(key_shape=(key.shape[2],))
            return _over_windows(
                means, compute, Keys(key, value, key_mask, None, *weights), sequence, feature_map, scale
            )

        long = Positions(key), Positions(value), Positions(key_mask)
        return stacked(by_sequence(of_sequence, cu_seqlens, *long))
    # (While tracing, lengths have no numbers to compare with.)
    windows = windows if is_traced() else windows.within(max(windows.key_shape))
    runs = groups(windows.resolutions)
    sizes = [heads.stop - heads.start for heads, _ in runs]
    shrink = compress if means in (reference, one_block) else _compress_in_place
    parts: list[tuple[Tensor, ...]] = []
    # (Split, not sliced: the gradient of each slice would be a tensor of zeros for all heads.)
    for (heads, resolution), k, v in zip(runs, torch.split(key, sizes, 1), torch.split(value, sizes, 1)):
        if fused:
            parts.append(compute(k, v, key_mask, cu_seqlens, feature_map, scale, window=resolution))
        else:
            k, mask = shrink(k, resolution, windows, _of_heads(weights[0], heads), key_mask)
            v, _ = shrink(v, resolution, windows, _of_heads(weights[1], heads), key_mask)
            parts.append(compute(k, v, mask, None, feature_map, scale))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(tensors, dim=1) for tensors in zip(*parts))


def summarize_backward(
    means: ModuleType,
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    keys: Keys,
    maximum: Tensor,
    windows: Windows,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of key, value and both weights."""
    key, value, key_mask, cu_seqlens, key_weight, value_weight = keys
    grads = grad_total, grad_weighted_sum
    if not windows.resolutions:
        inputs = key, value, key_mask, cu_seqlens, maximum, feature_map, scale
        return *means.summarize_backward(*grads, *inputs), None, None
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    grad_weights = [None if weight is None else torch.zeros_like(weight) for weight in (key_weight, value_weight)]
    fused = _is_fused(means, windows)
    if cu_seqlens is not None and not fused:

        def one(key: Tensor, value: Tensor, key_mask: Tensor | None, *short: Tensor) -> tuple[Tensor, Tensor]:
            sequence = windows._replace(key_shape=(key.shape[2],))
            here = Keys(key, value, key_mask, None, key_weight, value_weight)
            total, weighted_sum, maximum = short
            given = summarize_backward(means, total, weighted_sum, here, maximum, sequence, feature_map, scale)
            for grad, part in zip(grad_weights, given[2:]):
                if grad is not None and part is not None:
                    grad.add_(part)
            return given[:2]

        long = Positions(key), Positions(value), Positions(key_mask)
        short = (Row(tensor) for tensor in (*grads, maximum))
        joined(by_sequence(one, cu_seqlens, *long, *short), grad_key, grad_value)
        return grad_key, grad_value, grad_weights[0], grad_weights[1]
    windows = windows.within(max(windows.key_shape))
    for heads, resolution in groups(windows.resolutions):
        k, v, m, *ds = (tensor[:, heads] for tensor in (key, value, maximum, *grads))
        into = grad_key[:, heads], grad_value[:, heads]
        if fused:
            options = {"window": resolution, "into": into}
            means.summarize_backward(*ds, k, v, key_mask, cu_seqlens, m, feature_map, scale, **options)
            continue
        of_heads = WindowsInPlace(resolution, windows, key_mask)
        weights = [_of_heads(weight, heads) for weight in (key_weight, value_weight)]
        compressed = [of_heads.compress(tensor, weight) for tensor, weight in zip((k, v), weights)]
        given = means.summarize_backward(*ds, *compressed, of_heads.mask, None, m, feature_map, scale)
        for tensor, weight, small, grad, result, grad_weight in zip(
            (k, v), weights, compressed, given, into, (_of_heads(grad, heads) for grad in grad_weights)
        ):
            of_heads.spread(grad, small, tensor, weight, result, grad_weight)
    return grad_key, grad_value, grad_weights[0], grad_weights[1]


def groups(resolutions: Sequence[int]) -> list[tuple[slice, int]]:
    """Neighbouring heads of one resolution, so that they are computed together."""
    starts = [i for i, r in enumerate(resolutions) if i == 0 or r != resolutions[i - 1]]
    return [(slice(i, j), resolutions[i]) for i, j in zip(starts, [*starts[1:], len(resolutions)])]


def compress(
    tensor: Tensor, resolution: int, windows: Windows, weight: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One position in place of every window: (B, h, J, D), and which windows hold a valid one, (B, J)."""
    kind, key_shape = windows.compression, windows.key_shape
    if resolution == 1 and kind != "conv":
        return tensor, key_mask
    tensor = widened(tensor)
    fill = -torch.inf if kind == "max" else 0.0
    if key_mask is not None:
        tensor = tensor.masked_fill(~key_mask[:, None, :, None], fill)
    # While tracing there is one more window along each axis, without a position, so that there are known to be two.
    traced = is_traced()
    counts = [(length + (2 if traced else 1) * resolution - 1) // resolution for length in key_shape]
    is_whole = not traced and all(count * resolution == length for count, length in zip(counts, key_shape))
    cut = _cut(tensor, resolution, key_shape, counts, is_whole, fill)  # (B, h, J, W, D)
    size = resolution ** len(key_shape)
    num_valid = exists = None
    if key_mask is not None:
        valid = _cut(key_mask[:, None, :, None], resolution, key_shape, counts, is_whole, False)  # (B, 1, J, W, 1)
        num_valid = valid.sum(dim=3)  # (B, 1, J, 1)
        exists = num_valid[:, 0, :, 0] > 0  # (B, J)
        num_valid = num_valid.clamp_min(1).to(tensor.dtype)
    elif not is_whole:
        num_valid = _num_inside(tensor, resolution, key_shape, counts)  # (J, 1)
        if traced:
            exists = (num_valid[:, 0] > 0).expand(tensor.shape[0], -1)
            num_valid = num_valid.clamp_min(1)
    if kind == "max":
        largest = cut.amax(dim=3)
        return largest if exists is None else largest.masked_fill(~exists[:, None, :, None], 0.0), exists
    if weight is None and num_valid is None:
        return cut.mean(dim=3), exists
    if weight is not None:
        weights = weight[:, :, :size].to(tensor.dtype).mT[None, :, None]  # (1, h, 1, W, D)
        cut = cut * (size * weights)
    return cut.sum(dim=3) / (size if num_valid is None else num_valid), exists


def _cut(
    tensor: Tensor, resolution: int, key_shape: Sequence[int], counts: Sequence[int], is_whole: bool, fill: float
) -> Tensor:
    """(B, h, M, D) to (B, h, J, W, D): the grid of positions cut into cubes, filled up to so many whole ones."""
    tensor = on_grid(tensor, key_shape)  # (B, h, *key_shape, D)
    if not is_whole:
        missing = [count * resolution - size for count, size in zip(counts, key_shape)]
        tensor = pad(tensor, [0, 0, *(side for size in reversed(missing) for side in (0, size))], value=fill)
    num_axes = len(key_shape)
    for axis in range(num_axes):
        tensor = on_grid(tensor, (-1, resolution), axis=2 + 2 * axis)  # in the end (B, h, J1, r, J2, r, ..., D)
    if num_axes == 1:
        return tensor
    tensor = tensor.movedim([3 + 2 * axis for axis in range(num_axes)], [-1 - num_axes + i for i in range(num_axes)])
    return tensor.flatten(2 + num_axes, 1 + 2 * num_axes).flatten(2, 1 + num_axes)


def _num_inside(like: Tensor, resolution: int, key_shape: Sequence[int], counts: Sequence[int]) -> Tensor:
    """The number of positions of every window that lie on the grid: (J, 1)."""
    inside = like.new_ones(())
    for size, count in zip(key_shape, counts):
        starts = torch.arange(count, device=like.device) * resolution
        inside = inside[..., None] * (size - starts).clamp(min=0, max=resolution)
    return inside.flatten()[:, None]


def _compress_in_place(
    tensor: Tensor, resolution: int, windows: Windows, weight: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    of_heads = WindowsInPlace(resolution, windows, key_mask)
    return of_heads.compress(tensor, weight), of_heads.mask


def _is_fused(means: ModuleType, windows: Windows) -> bool:
    """Whether the means compress windows themselves: the kernels do, by means over a sequence."""
    return means.FUSES_MEANS and windows.compression == "mean" and len(windows.key_shape) == 1


def _of_heads(weight: Tensor | None, heads: slice) -> Tensor | None:
    return None if weight is None else weight[heads]
