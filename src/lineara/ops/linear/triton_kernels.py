"""One family of GPU kernels for every operation: summaries of keys and values, and queries that attend to them.

Four passes over positions, each of which reads and writes a position once: `summarize`, `attend`, `attend_backward`
and `summarize_backward`. The feature map (softmax, identity, relu, elu + 1) is chosen when a kernel is compiled, and so
are the widths; of the number of positions only whether 16 divides it is, and nothing is tuned at run time. The
positions of one head are split over several programs, whose partial sums are added in a fixed order: no atomics,
identical results from run to run, and one wide head still fills the chip. Nothing waits for the device.

Products take their factors in the dtype of the inputs and add in float32, as everything else here is; factors that are
not inputs are brought into the range of float16 first. Offsets are 64-bit. Any strides are read in place.

Packed sequences (`cu_seqlens`) lie one after the other in a batch of one; a summary then has one item per sequence.

Letters in comments: R rows (one per item or sequence, and head), P splits of a row's positions, n positions of a
block, K key channels, V value channels.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# (Triton's language has no types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lineara.ops.linear.blocks import empty_like_query
from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.tiles import Pass, Tiles, in_one_pass, tiles_of
from lineara.ops.packed import in_sequences

FUSES_MEANS = True
# Of a pass without sums to merge.
_MANY = 1 << 16
# exp(x) = exp2(x log2(e)), which is one instruction on a GPU, where log2(e) is part of the scale.
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

# The parts of the kernels.


@triton.jit
def _of_8(stride):
    """A multiple of 8, said in a way that the compiler sees."""
    return stride // 8 * 8


@triton.jit
def _row_and_split(tiles_1, tiles_2, num_splits):
    """From the program's number its row, split and two tiles. Neighbours share a split, so its blocks are cached."""
    program = tl.program_id(0)
    tile_2 = program % tiles_2
    tile_1 = program // tiles_2 % tiles_1
    split = program // (tiles_2 * tiles_1) % num_splits
    row = (program // (tiles_2 * tiles_1 * num_splits)).to(tl.int64)
    return row, split, tile_1, tile_2


@triton.jit
def _segment(cu_seqlens, item, num_positions, PACKED: tl.constexpr):
    """The batch index, first position and number of positions of an item; never outside the tensor."""
    if PACKED:
        # (Clamped as they are, before anything is narrowed: they may be int64 and hold anything.)
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + item).to(tl.int64), 0), num_positions)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + item + 1).to(tl.int64), 0), num_positions)
        return item * 0, start, tl.maximum(end - start, 0).to(tl.int32)
    return item, item * 0, num_positions


@triton.jit
def _part(split, num_splits, length, window, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):
    """Where a split begins, where its last whole block ends, and where the split does.

    Splits begin at blocks; the last ones may have none. In a whole block every position is there and takes part.
    """
    windows = tl.cdiv(length, window)
    each = tl.cdiv(tl.cdiv(windows, BLOCK), num_splits) * BLOCK
    first, last = split * each, tl.minimum((split + 1) * each, windows)
    if HAS_MASK:
        return first, first, last
    return first, first + tl.maximum(tl.minimum(last, length // window) - first, 0) // BLOCK * BLOCK, last


@triton.jit
def _present(mask, mask_stride, positions, inside, HAS_MASK: tl.constexpr):
    """Which positions take part."""
    if HAS_MASK:
        return inside & (tl.load(mask + positions.to(tl.int64) * mask_stride, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _pointers(tensor, rows, row_stride, columns, column_stride):
    """To any two axes of a tensor."""
    return tensor + rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride


@triton.jit
def _block(tensor, rows, row_stride, columns, column_stride, where):
    """Any two axes of a tensor; 0 where nothing is to be read."""
    return tl.load(_pointers(tensor, rows, row_stride, columns, column_stride), mask=where, other=0.0)


@triton.jit
def _positions(tensor, rows, row_stride, columns, column_stride, present, real, PART: tl.constexpr):
    """Positions and channels of a tensor; 0 where they are not `real`, and in a PART of a block not `present`."""
    pointers = _pointers(tensor, rows, row_stride, columns, column_stride)
    if PART:
        block = tl.load(pointers, mask=present[:, None] & real, other=0.0)
    elif real.shape[1] == 1:  # all of them
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=real, other=0.0)
    return block


@triton.jit
def _put(tensor, rows, row_stride, columns, column_stride, block, where):
    block = block.to(tensor.dtype.element_ty)
    tl.store(_pointers(tensor, rows, row_stride, columns, column_stride), block, mask=where)


@triton.jit
def _put_positions(tensor, rows, row_stride, columns, column_stride, block, inside, real, PART: tl.constexpr):
    pointers, block = _pointers(tensor, rows, row_stride, columns, column_stride), block.to(tensor.dtype.element_ty)
    if PART:
        tl.store(pointers, block, mask=inside[:, None] & real)
    elif real.shape[1] == 1:
        tl.store(pointers, block)
    else:
        tl.store(pointers, block, mask=real)


@triton.jit
def _real(columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Which columns are channels: (1, BLOCK), or (1, 1) where all are."""
    return tl.full([1, 1], 1, tl.int1) if WIDTH % BLOCK == 0 else (columns < WIDTH)[None, :]


@triton.jit
def _in_range(block, like):
    """A factor of a product in the dtype of `like`, each row times a power of 2, and what undoes that, row by row.

    float16 ends at 65504 and 6e-8, which sums over positions and gradients pass: a row's largest number becomes 1 to 2.
    """
    if like.dtype.element_ty == tl.float16:
        largest = tl.max(tl.abs(block), axis=1)
        power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        back = tl.where((largest > 1e-30) & (largest < 1e30), power, 1.0)
        return (block * (1.0 / back)[:, None]).to(tl.float16), back
    return block.to(like.dtype.element_ty), tl.full([block.shape[0]], 1.0, tl.float32)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _context(weighted_sum, s, channels, columns, where, V: tl.constexpr, DIVIDE: tl.constexpr):
    """A tile of S, with DIVIDE of S / s, and S where no position was."""
    S = _block(weighted_sum, channels, V, columns, 1, where)
    if DIVIDE:
        S = S / tl.where(s > 0.0, s, 1.0)[:, None]
    return S


@triton.jit
def _features(x, FEATURES: tl.constexpr):
    """phi(x), NaN included."""
    if FEATURES == "relu":
        x = tl.where(x < 0.0, 0.0, x)
    elif FEATURES == "elu":
        x = tl.where(x > 0.0, x + 1.0, tl.exp2(tl.where(x > 0.0, 0.0, x) * _LOG2_E))
    else:  # (Code behind a return is compiled too, so softmax comes here, and what becomes of it is not used.)
        tl.static_assert(FEATURES == "identity" or FEATURES == "softmax", "a feature map that the kernels do not know")
    return x


@triton.jit
def _slope(weights, FEATURES: tl.constexpr):
    """phi'(x), from phi(x)."""
    if FEATURES == "relu":
        weights = tl.where(weights > 0.0, 1.0, 0.0)
    elif FEATURES == "elu":
        weights = tl.minimum(weights, 1.0)
    elif FEATURES == "identity":
        weights = tl.full(weights.shape, 1.0, tl.float32)
    else:
        tl.static_assert(FEATURES == "softmax", "a feature map that the kernels do not know")
    return weights


@triton.jit
def _times_minus(x, factor, shift):
    """factor * x - shift, rounded once: large numbers cancel."""
    return tl.fma(x, tl.zeros_like(x) + factor, tl.zeros_like(x) - shift)


@triton.jit
def _largest(x, axis: tl.constexpr, NEGATIVE: tl.constexpr):
    """Along an axis, where scale * x is largest."""
    return tl.min(x, axis=axis) if NEGATIVE else tl.max(x, axis=axis)


@triton.jit
def _query_weights(q, scale, real, total, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr):
    """phi(scale q) of a block (n, K), without its denominator, and 1 / denominator (n); `real` marks true channels."""
    x = q.to(tl.float32)
    if FEATURES == "softmax":
        scale *= _LOG2_E
        padded = x
        if real.shape[1] != 1:
            padded = tl.where(real, x, float("inf") if NEGATIVE else float("-inf"))
        weights = tl.exp2(_times_minus(x, scale, (_largest(padded, 1, NEGATIVE) * scale)[:, None]))
        if real.shape[1] != 1:
            weights = tl.where(real, weights, 0.0)
        return weights, 1.0 / tl.sum(weights, axis=1)
    weights = _features(x * scale, FEATURES)
    if real.shape[1] != 1:
        weights = tl.where(real, weights, 0.0)
    if FEATURES == "identity":
        return weights, tl.full([q.shape[0]], 1.0, tl.float32)
    denominator = tl.sum(weights * total[None, :], axis=1)
    # Below the smallest normal number it is 0 by definition.
    undefined = denominator < 1.1754943508222875e-38
    return weights, tl.where(undefined, 0.0, 1.0 / tl.where(undefined, 1.0, denominator))


@triton.jit
def _keys(
    key, mask, mask_stride, start, begin, length, window, position_stride, channels, channel_stride, real,
    BLOCK: tl.constexpr, PART: tl.constexpr, HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys (n, K) or the means of their windows, which of them exist, and the number of positions of each."""
    rows = tl.arange(0, BLOCK)
    count = tl.full([BLOCK], 0.0 if WINDOWED else 1.0, tl.float32)
    if WINDOWED:
        keys = tl.zeros([BLOCK, channels.shape[0]], tl.float32)
        for offset in range(window):
            positions = (begin + rows).to(tl.int64) * window + offset
            present = _present(mask, mask_stride, start + positions, positions < length, HAS_MASK)
            where = present[:, None] & real
            keys += _block(key, start + positions, position_stride, channels, channel_stride, where).to(tl.float32)
            count += present.to(tl.float32)
        keys = keys / tl.maximum(count, 1.0)[:, None]
        exists = count > 0.0
    else:
        exists = _present(mask, mask_stride, start + begin + rows, begin + rows < length, HAS_MASK)
        key += (start + begin).to(tl.int64) * position_stride
        keys = _positions(key, rows, position_stride, channels, channel_stride, exists, real, PART)
    return keys, exists, count


@triton.jit
def _spread(
    grad, mask, mask_stride, start, begin, length, window, position_stride, columns, column_stride, real, block,
    BLOCK: tl.constexpr, PART: tl.constexpr, HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Give every position that takes part its window's gradient, and the others 0."""
    rows = tl.arange(0, BLOCK)
    if WINDOWED:
        for offset in range(window):
            positions = (begin + rows).to(tl.int64) * window + offset
            inside = positions < length
            present = _present(mask, mask_stride, start + positions, inside, HAS_MASK)
            given = tl.where(present[:, None], block, 0.0)
            _put(grad, start + positions, position_stride, columns, column_stride, given, inside[:, None] & real)
    else:
        grad += (start + begin).to(tl.int64) * position_stride
        inside = begin + rows < length
        _put_positions(grad, rows, position_stride, columns, column_stride, block, inside, real, PART)


# Keys and values to summaries.


@triton.jit
def _summarize_block(
    key, value, mask, m, s, S, start, begin, length, window, scale,
    key_position, key_channel, value_position, value_channel, mask_position, channels, columns, real_k, real_v,
    BLOCK: tl.constexpr, PART: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr,
    HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The summary so far, and a further block. The maximum is that of keys without their scale."""
    k, exists, _ = _keys(
        key, mask, mask_position, start, begin, length, window, key_position, channels, key_channel, real_k,
        BLOCK, PART, HAS_MASK, WINDOWED,
    )  # fmt: skip
    v, _, _ = _keys(
        value, mask, mask_position, start, begin, length, window, value_position, columns, value_channel, real_v,
        BLOCK, PART, HAS_MASK, WINDOWED,
    )  # fmt: skip
    v = v.to(value.dtype.element_ty)
    x = k.to(tl.float32)
    if FEATURES == "softmax":
        nothing: tl.constexpr = float("inf") if NEGATIVE else float("-inf")
        scale *= _LOG2_E
        seen = x
        if PART:
            seen = tl.where(exists[:, None], x, nothing)
        largest = _largest(seen, 0, NEGATIVE)
        new_m = tl.minimum(m, largest) if NEGATIVE else tl.maximum(m, largest)
        # A channel without positions so far has an infinite one: neither inf - inf nor 0 * inf must arise.
        shift = tl.where(new_m == nothing, 0.0, new_m) * scale
        weights = tl.exp2(_times_minus(x, scale, shift[None, :]))
        if PART:
            weights = tl.where(exists[:, None], weights, 0.0)
        is_first = m == nothing
        kept = tl.where(is_first, 0.0, tl.exp2(_times_minus(tl.where(is_first, 0.0, m), scale, shift)))
        m = new_m
        s = s * kept + tl.sum(weights, axis=0)
        narrow = tl.trans(weights.to(value.dtype.element_ty))
        S = tl.dot(narrow, v, acc=S * kept[:, None], input_precision=PRECISION)
    else:
        x = _features(x * scale, FEATURES)
        if PART:
            x = tl.where(exists[:, None], x, 0.0)
        if real_k.shape[1] != 1:
            x = tl.where(real_k, x, 0.0)
        s += tl.sum(tl.where(exists[:, None], 1.0, 0.0) if FEATURES == "identity" else x, axis=0)
        narrow, back = _in_range(tl.trans(x), value)
        S += _dot(narrow, v, PRECISION) * back[:, None]
    return m, s, S


@triton.jit(do_not_specialize=["num_positions", "num_splits", "window", "scale", "heads"])
def _summarize_kernel(
    key, value, mask, cu_seqlens, maximum, total, weighted_sum,
    num_positions, num_splits, window, scale, heads,
    key_item, key_head, key_position, key_channel, value_item, value_head, value_position, value_channel,
    mask_item, mask_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_K: tl.constexpr, TILES_V: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr,
    HAS_MASK: tl.constexpr, PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """The summary of one split: maximum and total (R, P, K), weighted sum (R, P, K, V)."""
    if ALIGNED:
        key_item, key_head = _of_8(key_item), _of_8(key_head)
        key_position = _of_8(key_position)
        value_item, value_head = _of_8(value_item), _of_8(value_head)
        value_position = _of_8(value_position)
    row, split, tile_k, tile_v = _row_and_split(TILES_K, TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    key += item * key_item + row % heads * key_head
    value += item * value_item + row % heads * value_head
    mask += item * mask_item
    first, whole, last = _part(split, num_splits, length, window, BLOCK_N, HAS_MASK)
    channels = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_k, real_v = _real(channels, K, BLOCK_K), _real(columns, V, BLOCK_V)

    nothing: tl.constexpr = float("inf") if NEGATIVE else float("-inf")
    m = tl.full([BLOCK_K], nothing if FEATURES == "softmax" else 0.0, tl.float32)
    s = tl.zeros([BLOCK_K], tl.float32)
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if not HAS_MASK:
        for begin in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
            m, s, S = _summarize_block(
                key, value, mask, m, s, S, start, begin, length, window, scale,
                key_position, key_channel, value_position, value_channel, mask_position,
                channels, columns, real_k, real_v,
                BLOCK_N, False, FEATURES, NEGATIVE, HAS_MASK, WINDOWED, PRECISION,
            )  # fmt: skip
    for begin in tl.range(whole, last, BLOCK_N, num_stages=STAGES if HAS_MASK else 1):
        m, s, S = _summarize_block(
            key, value, mask, m, s, S, start, begin, length, window, scale,
            key_position, key_channel, value_position, value_channel, mask_position,
            channels, columns, real_k, real_v,
            BLOCK_N, True, FEATURES, NEGATIVE, HAS_MASK, WINDOWED, PRECISION,
        )  # fmt: skip

    partial = row * num_splits + split
    if tile_v == 0:
        if FEATURES == "softmax":
            m = tl.where(m == nothing, float("-inf"), tl.where(m == nothing, 0.0, m) * scale)
        tl.store(maximum + partial * K + channels, m, mask=channels < K)
        tl.store(total + partial * K + channels, s, mask=channels < K)
    _put(weighted_sum + partial * K * V, channels, V, columns, 1, S, (channels < K)[:, None] & (columns < V)[None, :])


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    maxima, totals, weighted_sums, maximum, total, weighted_sum, num_splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The splits' summaries of one channel of a row, merged in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    partial = program // K * num_splits * K + program % K
    columns = tl.arange(0, BLOCK_V)
    m = tl.full([], float("-inf"), tl.float32)
    s = tl.full([], 0.0, tl.float32)
    S = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, num_splits, BLOCK_P):
        some = begin + tl.arange(0, BLOCK_P)
        there = some < num_splits
        m_of = tl.load(maxima + partial + some * K, mask=there, other=float("-inf"))
        new_m = tl.maximum(m, tl.max(m_of, axis=0))
        shift = tl.where(new_m == float("-inf"), 0.0, new_m)
        weights, kept = tl.exp(m_of - shift), tl.exp(m - shift)
        s = s * kept + tl.sum(weights * tl.load(totals + partial + some * K, mask=there, other=0.0), axis=0)
        where = there[:, None] & (columns < V)[None, :]
        some_S = _block(weighted_sums + partial * V, some, K * V, columns, 1, where)
        S = S * kept + tl.sum(weights[:, None] * some_S, axis=0)
        m = new_m
    tl.store(maximum + program, m)
    tl.store(total + program, s)
    tl.store(weighted_sum + program * V + columns, S, mask=columns < V)


@triton.jit
def _summarize_backward_block(
    key, value, mask, grad_key, grad_value, grad_weighted_sum, m, ds, dS, dS_back,
    start, begin, length, window, scale,
    key_position, key_channel, value_position, value_channel,
    grad_key_position, grad_key_channel, grad_value_position, grad_value_channel, mask_position, channels, real_k,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, TILES_V: tl.constexpr,
    PART: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    k, exists, count = _keys(
        key, mask, mask_position, start, begin, length, window, key_position, channels, key_channel, real_k,
        BLOCK, PART, HAS_MASK, WINDOWED,
    )  # fmt: skip
    x = k.to(tl.float32)
    if FEATURES == "softmax":
        weights = tl.exp2(_times_minus(x, scale * _LOG2_E, (m * _LOG2_E)[None, :]))
    else:
        weights = _features(x * scale, FEATURES)
    if PART:
        weights = tl.where(exists[:, None], weights, 0.0)
    if real_k.shape[1] != 1:
        weights = tl.where(real_k, weights, 0.0)
    share = scale / tl.maximum(count, 1.0)[:, None]
    dk = tl.zeros([BLOCK, channels.shape[0]], tl.float32)
    for tile in tl.range(TILES_V, num_stages=1):
        columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        real_v = _real(columns, V, BLOCK_V)
        if TILES_V > 1:
            where = (channels < K)[:, None] & (columns < V)[None, :]
            dS, dS_back = _in_range(_block(grad_weighted_sum, channels, V, columns, 1, where), value)
        v, _, _ = _keys(
            value, mask, mask_position, start, begin, length, window, value_position, columns, value_channel, real_v,
            BLOCK, PART, HAS_MASK, WINDOWED,
        )  # fmt: skip
        dk += _dot(v.to(value.dtype.element_ty), tl.trans(dS), PRECISION) * dS_back[None, :]
        narrow, back = _in_range(weights * dS_back[None, :], value)
        dv = _dot(narrow, dS, PRECISION) * back[:, None]
        if WINDOWED:
            dv /= tl.maximum(count, 1.0)[:, None]
        _spread(
            grad_value, mask, mask_position, start, begin, length, window, grad_value_position, columns,
            grad_value_channel, real_v, dv, BLOCK, PART, HAS_MASK, WINDOWED,
        )  # fmt: skip
    if FEATURES != "identity":
        dk += ds[None, :]
    dk = dk * (_slope(weights, FEATURES) * share)
    if PART:
        dk = tl.where(exists[:, None], dk, 0.0)
    _spread(
        grad_key, mask, mask_position, start, begin, length, window, grad_key_position, channels,
        grad_key_channel, real_k, dk, BLOCK, PART, HAS_MASK, WINDOWED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_positions", "num_splits", "window", "scale", "heads"])
def _summarize_backward_kernel(
    key, value, mask, cu_seqlens, maximum, grad_total, grad_weighted_sum, grad_key, grad_value,
    num_positions, num_splits, window, scale, heads,
    key_item, key_head, key_position, key_channel, value_item, value_head, value_position, value_channel,
    grad_key_item, grad_key_head, grad_key_position, grad_key_channel,
    grad_value_item, grad_value_head, grad_value_position, grad_value_channel,
    mask_item, mask_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """With E = phi(K) (softmax: exp(K - m)): dV = E dS and dK = phi'(K) * (V dS^T + ds), spread over the windows."""
    if ALIGNED:
        key_item, key_head = _of_8(key_item), _of_8(key_head)
        key_position = _of_8(key_position)
        value_item, value_head = _of_8(value_item), _of_8(value_head)
        value_position = _of_8(value_position)
        grad_key_item, grad_key_head = _of_8(grad_key_item), _of_8(grad_key_head)
        grad_key_position = _of_8(grad_key_position)
        grad_value_item, grad_value_head = _of_8(grad_value_item), _of_8(grad_value_head)
        grad_value_position = _of_8(grad_value_position)
    row, split, _, _ = _row_and_split(1, 1, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    key += item * key_item + row % heads * key_head
    value += item * value_item + row % heads * value_head
    grad_key += item * grad_key_item + row % heads * grad_key_head
    grad_value += item * grad_value_item + row % heads * grad_value_head
    mask += item * mask_item
    grad_weighted_sum += row * K * V
    first, whole, last = _part(split, num_splits, length, window, BLOCK_N, HAS_MASK)
    channels = tl.arange(0, BLOCK_K)
    real_k = _real(channels, K, BLOCK_K)
    m = tl.load(maximum + row * K + channels, mask=channels < K, other=0.0)
    m = tl.where(m == float("-inf"), 0.0, m)
    ds = tl.load(grad_total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & (tl.arange(0, BLOCK_V) < V)[None, :]
    dS, dS_back = _in_range(_block(grad_weighted_sum, channels, V, tl.arange(0, BLOCK_V), 1, where), value)

    if not HAS_MASK:
        for begin in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
            _summarize_backward_block(
                key, value, mask, grad_key, grad_value, grad_weighted_sum, m, ds, dS, dS_back,
                start, begin, length, window, scale,
                key_position, key_channel, value_position, value_channel,
                grad_key_position, grad_key_channel, grad_value_position, grad_value_channel, mask_position,
                channels, real_k,
                K, V, BLOCK_N, BLOCK_V, TILES_V, False, FEATURES, HAS_MASK, WINDOWED, PRECISION,
            )  # fmt: skip
    for begin in tl.range(whole, last, BLOCK_N, num_stages=STAGES if HAS_MASK else 1):
        _summarize_backward_block(
            key, value, mask, grad_key, grad_value, grad_weighted_sum, m, ds, dS, dS_back,
            start, begin, length, window, scale,
            key_position, key_channel, value_position, value_channel,
            grad_key_position, grad_key_channel, grad_value_position, grad_value_channel, mask_position,
            channels, real_k,
            K, V, BLOCK_N, BLOCK_V, TILES_V, True, FEATURES, HAS_MASK, WINDOWED, PRECISION,
        )  # fmt: skip


# Queries to outputs.


@triton.jit
def _attend_block(
    query, gate, output, z, C, C_back, start, begin, length, scale,
    query_position, query_channel, gate_position, output_position, output_channel, channels, columns, real_k, real_v,
    BLOCK: tl.constexpr, PART: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr, HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    rows, here = tl.arange(0, BLOCK), (start + begin).to(tl.int64)
    inside = begin + rows < length
    q = _positions(query + here * query_position, rows, query_position, channels, query_channel, inside, real_k, PART)
    weights, factor = _query_weights(q, scale, real_k, z, FEATURES, NEGATIVE)
    narrow, back = _in_range(weights * C_back[None, :], query)
    if HAS_GATE:
        factor *= tl.load(gate + (here + rows) * gate_position, mask=inside, other=0.0).to(tl.float32)
    o = _dot(narrow, C, PRECISION) * (factor * back)[:, None]
    output += here * output_position
    _put_positions(output, rows, output_position, columns, output_channel, o, inside, real_v, PART)


@triton.jit(do_not_specialize=["num_positions", "num_splits", "scale", "heads"])
def _attend_kernel(
    query, total, weighted_sum, gate, cu_seqlens, output,
    num_positions, num_splits, scale, heads,
    query_item, query_head, query_position, query_channel, gate_item, gate_head, gate_position,
    output_item, output_head, output_position, output_channel,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr, HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """gate * phi(Q) (S / s), or gate * (phi(Q) S) / (phi(Q) . s); softmax has a denominator of its own."""
    if ALIGNED:
        query_item, query_head = _of_8(query_item), _of_8(query_head)
        query_position = _of_8(query_position)
        output_item, output_head = _of_8(output_item), _of_8(output_head)
        output_position = _of_8(output_position)
    row, split, _, tile_v = _row_and_split(1, TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    query += item * query_item + row % heads * query_head
    output += item * output_item + row % heads * output_head
    gate += item * gate_item + row % heads * gate_head
    first, whole, last = _part(split, num_splits, length, 1, BLOCK_N, False)
    channels = tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_k, real_v = _real(channels, K, BLOCK_K), _real(columns, V, BLOCK_V)
    z = tl.load(total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & (columns < V)[None, :]
    C, C_back = _in_range(_context(weighted_sum + row * K * V, z, channels, columns, where, V, DIVIDE), query)

    for begin in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
        _attend_block(
            query, gate, output, z, C, C_back, start, begin, length, scale,
            query_position, query_channel, gate_position, output_position, output_channel,
            channels, columns, real_k, real_v, BLOCK_N, False, FEATURES, NEGATIVE, HAS_GATE, PRECISION,
        )  # fmt: skip
    for begin in tl.range(whole, last, BLOCK_N, num_stages=1):
        _attend_block(
            query, gate, output, z, C, C_back, start, begin, length, scale,
            query_position, query_channel, gate_position, output_position, output_channel,
            channels, columns, real_k, real_v, BLOCK_N, True, FEATURES, NEGATIVE, HAS_GATE, PRECISION,
        )  # fmt: skip


@triton.jit
def _attend_backward_block(
    query, weighted_sum, gate, grad_output, grad_query, grad_gate, z, C, C_back, dz, dC,
    start, begin, length, scale,
    query_position, query_channel, gate_position, grad_output_position, grad_output_channel,
    grad_query_position, grad_query_channel, grad_gate_position, channels, columns, real_k, real_v,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr, TILES_V: tl.constexpr,
    PART: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr, HAS_GATE: tl.constexpr,
    PRECISION: tl.constexpr, OF_QUERY: tl.constexpr, OF_CONTEXT: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    rows, here = tl.arange(0, BLOCK), (start + begin).to(tl.int64)
    inside = begin + rows < length
    q = _positions(query + here * query_position, rows, query_position, channels, query_channel, inside, real_k, PART)
    weights, inverse = _query_weights(q, scale, real_k, z, FEATURES, NEGATIVE)
    factor = inverse
    if HAS_GATE:
        factor *= tl.load(gate + (here + rows) * gate_position, mask=inside, other=0.0).to(tl.float32)
    grad_output += here * grad_output_position
    do = _positions(grad_output, rows, grad_output_position, columns, grad_output_channel, inside, real_v, PART)
    if OF_QUERY:
        T = _dot(do, tl.trans(C), PRECISION) * C_back[None, :]
        for tile in tl.range(1, TILES_V, num_stages=1):
            more = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            real = _real(more, V, BLOCK_V)
            further = _positions(grad_output, rows, grad_output_position, more, grad_output_channel, inside, real, PART)
            where = (channels < K)[:, None] & (more < V)[None, :]
            other, other_back = _in_range(_context(weighted_sum, z, channels, more, where, V, DIVIDE), query)
            T += _dot(further, tl.trans(other), PRECISION) * other_back[None, :]
        # Adding nothing ties the weights to the layout of T: the compiler would compute them once more in another.
        weights += T * 0.0
        share = tl.sum(weights * T, axis=1) * inverse
        if HAS_GATE:
            offsets = (here + rows) * grad_gate_position
            tl.store(grad_gate + offsets, share.to(grad_gate.dtype.element_ty), mask=inside)
    weighted = weights * factor[:, None]
    if OF_QUERY:
        if FEATURES == "softmax":
            dq = weighted * (T - share[:, None])
        elif FEATURES == "identity":
            dq = T * factor[:, None]
        else:
            dz -= tl.sum(weighted * share[:, None], axis=0)
            dq = (T - share[:, None] * z[None, :]) * (_slope(weights, FEATURES) * factor[:, None])
        grad_query += here * grad_query_position
        dq *= scale
        _put_positions(grad_query, rows, grad_query_position, channels, grad_query_channel, dq, inside, real_k, PART)
    if OF_CONTEXT:
        narrow, back = _in_range(tl.trans(weighted), query)
        dC += _dot(narrow, do, PRECISION) * back[:, None]
    return dz, dC


@triton.jit(do_not_specialize=["num_positions", "num_splits", "scale", "heads"])
def _attend_backward_kernel(
    query, total, weighted_sum, gate, cu_seqlens, grad_output, grad_query, grad_gate, grad_total, grad_context,
    num_positions, num_splits, scale, heads,
    query_item, query_head, query_position, query_channel, gate_item, gate_head, gate_position,
    grad_output_item, grad_output_head, grad_output_position, grad_output_channel,
    grad_query_item, grad_query_head, grad_query_position, grad_query_channel,
    grad_gate_item, grad_gate_head, grad_gate_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, NEGATIVE: tl.constexpr, HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, ALIGNED: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_CONTEXT: tl.constexpr, DIVIDE: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Gradients of query and gate, and one split's of total (R, P, K) and context (R, P, K, V); see streaming.py.

    A split that is ALONE gives those of total and weighted sum as they are in the end. Where the values are too wide
    for one block, it runs once for the queries (every program reads all columns) and once for the contexts (every
    program one tile of columns).
    """
    if ALIGNED:
        query_item, query_head = _of_8(query_item), _of_8(query_head)
        query_position = _of_8(query_position)
        grad_output_item, grad_output_head = _of_8(grad_output_item), _of_8(grad_output_head)
        grad_output_position = _of_8(grad_output_position)
        grad_query_item, grad_query_head = _of_8(grad_query_item), _of_8(grad_query_head)
        grad_query_position = _of_8(grad_query_position)
    row, split, _, tile_v = _row_and_split(1, 1 if OF_QUERY else TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    query += item * query_item + row % heads * query_head
    grad_output += item * grad_output_item + row % heads * grad_output_head
    grad_query += item * grad_query_item + row % heads * grad_query_head
    gate += item * gate_item + row % heads * gate_head
    grad_gate += item * grad_gate_item + row % heads * grad_gate_head
    weighted_sum += row * K * V
    first, whole, last = _part(split, num_splits, length, 1, BLOCK_N, False)
    channels = tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_k, real_v = _real(channels, K, BLOCK_K), _real(columns, V, BLOCK_V)
    z = tl.load(total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & (columns < V)[None, :]
    C, C_back = tl.zeros([16, 16], query.dtype.element_ty), tl.zeros([BLOCK_K], tl.float32)
    if OF_QUERY:
        C, C_back = _in_range(_context(weighted_sum, z, channels, columns, where, V, DIVIDE), query)
    dC = tl.zeros([BLOCK_K if OF_CONTEXT else 16, BLOCK_V if OF_CONTEXT else 16], tl.float32)
    dz = tl.zeros([BLOCK_K], tl.float32)

    for begin in tl.range(first, whole, BLOCK_N, num_stages=STAGES):
        dz, dC = _attend_backward_block(
            query, weighted_sum, gate, grad_output, grad_query, grad_gate, z, C, C_back, dz, dC,
            start, begin, length, scale,
            query_position, query_channel, gate_position, grad_output_position, grad_output_channel,
            grad_query_position, grad_query_channel, grad_gate_position, channels, columns, real_k, real_v,
            K, V, BLOCK_N, BLOCK_V, TILES_V, False, FEATURES, NEGATIVE, HAS_GATE, PRECISION,
            OF_QUERY, OF_CONTEXT, DIVIDE,
        )  # fmt: skip
    for begin in tl.range(whole, last, BLOCK_N, num_stages=1):
        dz, dC = _attend_backward_block(
            query, weighted_sum, gate, grad_output, grad_query, grad_gate, z, C, C_back, dz, dC,
            start, begin, length, scale,
            query_position, query_channel, gate_position, grad_output_position, grad_output_channel,
            grad_query_position, grad_query_channel, grad_gate_position, channels, columns, real_k, real_v,
            K, V, BLOCK_N, BLOCK_V, TILES_V, True, FEATURES, NEGATIVE, HAS_GATE, PRECISION,
            OF_QUERY, OF_CONTEXT, DIVIDE,
        )  # fmt: skip

    if ALONE and DIVIDE:
        s = tl.where(z > 0.0, z, 1.0)[:, None]
        dC = dC / s
        dz -= tl.sum(dC * (_block(weighted_sum, channels, V, columns, 1, where) / s), axis=1)
    partial = row * num_splits + split
    if OF_QUERY:
        tl.store(grad_total + partial * K + channels, dz, mask=channels < K)
    if OF_CONTEXT:
        _put(grad_context + partial * K * V, channels, V, columns, 1, dC, where)


@triton.jit(do_not_specialize=["num_splits_total", "num_splits"])
def _merge_back_kernel(
    grad_totals, grad_contexts, total, weighted_sum, grad_total, grad_weighted_sum, num_splits_total, num_splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of one channel's total and weighted sum, from the splits', added in a fixed order.

    With DIVIDE those of the splits are of the context C = S / s: dS = dC / s, ds = -rowsum(C * dS).
    """
    program = tl.program_id(0).to(tl.int64)
    row, channel = program // K, program % K
    totals = grad_totals + row * num_splits_total * K + channel
    ds = tl.full([], 0.0, tl.float32)
    for begin in range(0, num_splits_total, BLOCK_P):
        some = begin + tl.arange(0, BLOCK_P)
        ds += tl.sum(tl.load(totals + some * K, mask=some < num_splits_total, other=0.0), axis=0)
    columns = tl.arange(0, BLOCK_V)
    contexts = grad_contexts + (row * num_splits * K + channel) * V
    dC = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, num_splits, BLOCK_P):
        some = begin + tl.arange(0, BLOCK_P)
        where = (some < num_splits)[:, None] & (columns < V)[None, :]
        dC += tl.sum(_block(contexts, some, K * V, columns, 1, where), axis=0)
    if DIVIDE:
        s = tl.load(total + program)
        s = tl.where(s > 0.0, s, 1.0)
        dC = dC / s
        ds -= tl.sum(dC * (tl.load(weighted_sum + program * V + columns, mask=columns < V, other=0.0) / s), axis=0)
    tl.store(grad_weighted_sum + program * V + columns, dC, mask=columns < V)
    tl.store(grad_total + program, ds)


# Launchers: the same signatures and results as those of reference.py and streaming.py.


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
    *,
    window: int = 1,
) -> Summary:
    """As `reference.summarize`, of keys and values or of the means of their windows."""
    tiles = _tiles("summarize", key, value)
    shape = (in_sequences(key, cu_seqlens), key.shape[1], key.shape[3])
    rows = shape[0] * shape[1]
    programs = rows * tiles.num_k * tiles.num_v
    splits = tiles.splits(key.device, programs, -(-_usual_len(key, cu_seqlens) // window))
    maximum = key.new_empty((rows, splits, key.shape[3]), dtype=torch.float32)
    total = torch.empty_like(maximum)
    weighted_sum = maximum.new_empty((*maximum.shape, value.shape[3]))
    _launch(
        _summarize_kernel,
        programs * splits,
        (key, value, _bytes(key_mask, key), _starts(cu_seqlens, key), maximum, total, weighted_sum),
        (key.shape[2], splits, window, scale, key.shape[1], *key.stride(), *value.stride(), *_strides(key_mask, 2)),
        tiles,
        FEATURES=name,
        NEGATIVE=scale < 0,
        HAS_MASK=key_mask is not None,
        PACKED=cu_seqlens is not None,
        WINDOWED=window > 1,
        TILES_K=tiles.num_k,
    )
    if splits > 1:
        parts = (maximum, total, weighted_sum)
        maximum, total, weighted_sum = (part.new_empty((rows, *part.shape[2:])) for part in parts)
        merged = (*parts, maximum, total, weighted_sum)
        _launch_merge(_merge_kernel, rows, merged, (splits,), tiles)
    return maximum.view(shape), total.view(shape), weighted_sum.view(*shape, value.shape[3])


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    maximum: Tensor,
    name: str,
    scale: float,
    *,
    window: int = 1,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value, in new tensors or `into` given ones."""
    tiles = _tiles("summarize back", key, value)
    rows = in_sequences(key, cu_seqlens) * key.shape[1]
    grad_key, grad_value = into or (_like(key, cu_seqlens), _like(value, cu_seqlens))
    splits = tiles.splits(key.device, rows, -(-_usual_len(key, cu_seqlens) // window), _MANY)
    short = (tensor.contiguous() for tensor in (maximum, grad_total, grad_weighted_sum))
    _launch(
        _summarize_backward_kernel,
        rows * splits,
        (key, value, _bytes(key_mask, key), _starts(cu_seqlens, key), *short, grad_key, grad_value),
        (
            *(key.shape[2], splits, window, scale, key.shape[1], *key.stride(), *value.stride()),
            *(*grad_key.stride(), *grad_value.stride(), *_strides(key_mask, 2)),
        ),
        tiles,
        FEATURES=name,
        HAS_MASK=key_mask is not None,
        PACKED=cu_seqlens is not None,
        WINDOWED=window > 1,
    )
    return grad_key, grad_value


def attend(
    query: Tensor,
    total: Tensor,
    weighted_sum: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
) -> Tensor:
    """As `reference.attend`, laid out in memory as the query is."""
    tiles = _tiles("attend", query, weighted_sum)
    output = empty_like_query(query, weighted_sum.shape[3])
    if cu_seqlens is not None:  # a position may belong to no sequence
        output.zero_()
    programs = in_sequences(query, cu_seqlens) * query.shape[1] * tiles.num_v
    splits = tiles.splits(query.device, programs, _usual_len(query, cu_seqlens), _MANY)
    sums = total.contiguous(), weighted_sum.contiguous()
    _launch(
        _attend_kernel,
        programs * splits,
        (query, *sums, _or(gate, query), _starts(cu_seqlens, query), output),
        (query.shape[2], splits, scale, query.shape[1], *query.stride(), *_strides(gate, 3), *output.stride()),
        tiles,
        FEATURES=name,
        NEGATIVE=scale < 0,
        HAS_GATE=gate is not None,
        PACKED=cu_seqlens is not None,
        DIVIDE=feature_map(name).divides_context,
    )
    return output


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    total: Tensor,
    weighted_sum: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, total, weighted sum and gate."""
    items, heads = in_sequences(query, cu_seqlens), query.shape[1]
    sums = total.contiguous(), weighted_sum.contiguous()
    grad_query, grad_gate = _like(query, cu_seqlens), None if gate is None else _like(gate.contiguous(), cu_seqlens)
    divide = feature_map(name).divides_context

    def run(tiles: Tiles, *, of_query: bool, of_context: bool) -> tuple[Tensor, Tensor]:
        programs = items * heads * (1 if of_query else tiles.num_v)
        splits = tiles.splits(query.device, programs, _usual_len(query, cu_seqlens))
        grad_totals = total.new_empty((items * heads, splits, query.shape[3]))
        grad_contexts = total.new_empty((*grad_totals.shape, weighted_sum.shape[3]) if of_context else 0)
        _launch(
            _attend_backward_kernel,
            programs * splits,
            (
                *(query, *sums, _or(gate, query), _starts(cu_seqlens, query), grad_output),
                *(grad_query, _or(grad_gate, query), grad_totals, grad_contexts),
            ),
            (
                *(query.shape[2], splits, scale, heads, *query.stride(), *_strides(gate, 3)),
                *(*grad_output.stride(), *grad_query.stride(), *_strides(grad_gate, 3)),
            ),
            tiles,
            FEATURES=name,
            NEGATIVE=scale < 0,
            HAS_GATE=gate is not None,
            PACKED=cu_seqlens is not None,
            OF_QUERY=of_query,
            OF_CONTEXT=of_context,
            DIVIDE=divide,
            ALONE=of_query and of_context and splits == 1,
        )
        return grad_totals, grad_contexts

    tiles = _tiles("back", query, weighted_sum)
    if in_one_pass(tiles, query.dtype):
        grad_totals, grad_contexts = run(tiles, of_query=True, of_context=True)
        if grad_totals.shape[1] == 1:
            return grad_query, grad_totals.view(total.shape), grad_contexts.view(weighted_sum.shape), grad_gate
    else:
        grad_totals, _ = run(tiles, of_query=True, of_context=False)
        _, grad_contexts = run(_tiles("context back", query, weighted_sum), of_query=False, of_context=True)
    grad_total, grad_sum = (torch.empty_like(tensor) for tensor in sums)
    _launch_merge(
        _merge_back_kernel,
        items * heads,
        (grad_totals, grad_contexts, *sums, grad_total, grad_sum),
        (grad_totals.shape[1], grad_contexts.shape[1]),
        tiles,
        DIVIDE=divide,
    )
    return grad_query, grad_total, grad_sum, grad_gate


def _tiles(what: Pass, keys: Tensor, values: Tensor) -> Tiles:
    return tiles_of(what, keys.shape[3], values.shape[3], keys.dtype, keys.device)


def _launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], tiles: Tiles, **options: Any
) -> None:
    """Run a pass over positions."""
    options |= {"BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "BLOCK_V": tiles.v, "TILES_V": tiles.num_v}
    options |= {"STAGES": tiles.stages, "PRECISION": _precision(tensors[0]), "num_warps": tiles.warps}
    options["ALIGNED"] = all(_is_aligned(tensor) for tensor in tensors if tensor.dim() == 4)
    _run(kernel, programs, (*tensors, *numbers), {"K": tiles.key_dim, "V": tiles.value_dim, **options})


def _launch_merge(
    kernel: Any, rows: int, tensors: tuple[Tensor, ...], numbers: tuple[int, ...], tiles: Tiles, **options: Any
) -> None:
    """Run a merge, one program for every key channel of a row."""
    options |= {"BLOCK_P": 16, "BLOCK_V": max(16, 1 << (tiles.value_dim - 1).bit_length())}
    _run(kernel, rows * tiles.key_dim, (*tensors, *numbers), {"K": tiles.key_dim, "V": tiles.value_dim, **options})


def _run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel on the tensors' device; nothing where there is nothing to do."""
    if programs == 0:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **options, enable_fp_fusion=True)


def _is_aligned(tensor: Tensor) -> bool:
    """Whether 8 channels of 2 bytes can be read at once: Triton asks whether 16 divides strides, as it does not 72."""
    item, head, position, channel = tensor.stride()
    return channel == 1 and not (item % 8 or head % 8 or position % 8) and item > 1 and head > 1 and position > 1


def _precision(tensor: Tensor) -> str:
    """Of products of float32: all of its digits, unless the user has told torch otherwise."""
    if tensor.dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3"


def _usual_len(tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of positions of an item; of packed sequences, whose lengths only the device knows, the mean."""
    return tensor.shape[2] if cu_seqlens is None else tensor.shape[2] // max(in_sequences(tensor, cu_seqlens), 1)


def _like(tensor: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """To be filled; with packed sequences 0 where no sequence is."""
    return torch.empty_like(tensor) if cu_seqlens is None else torch.zeros_like(tensor)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Something to point to where there is nothing; it is not read."""
    return other if tensor is None else tensor


def _starts(cu_seqlens: Tensor | None, other: Tensor) -> Tensor:
    return other if cu_seqlens is None else cu_seqlens.contiguous()


def _bytes(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask.view(torch.uint8)


def _strides(tensor: Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if tensor is None else tensor.stride()
