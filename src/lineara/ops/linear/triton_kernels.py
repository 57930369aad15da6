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
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# (Triton's language has no types)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lineara.ops.linear.blocks import empty_like_query
from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.tiles import MOST_SPLITS, Pass, Tiles, in_one_pass, tiles_of
from lineara.ops.packed import in_sequences

FUSES_MEANS = True

# The parts of the kernels.


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
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens + item).to(tl.int32), 0), num_positions)
        end = tl.minimum(tl.load(cu_seqlens + item + 1).to(tl.int32), num_positions)
        return item * 0, start, tl.maximum(end - start, 0)
    return item, 0, num_positions


@triton.jit
def _part(split, num_splits, length, BLOCK: tl.constexpr):
    """Where a split begins and ends: whole blocks, as many for each; the last ones may have none."""
    each = tl.cdiv(tl.cdiv(length, BLOCK), num_splits) * BLOCK
    return split * each, tl.minimum((split + 1) * each, length)


@triton.jit
def _present(mask, mask_stride, positions, inside, HAS_MASK: tl.constexpr):
    """Which positions take part."""
    if HAS_MASK:
        return inside & (tl.load(mask + positions.to(tl.int64) * mask_stride, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _block(tensor, rows, row_stride, columns, column_stride, where):
    """Any two axes of a tensor; 0 where nothing is to be read."""
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    return tl.load(tensor + offsets, mask=where, other=0.0)


@triton.jit
def _put(tensor, rows, row_stride, columns, column_stride, block, where):
    offsets = rows.to(tl.int64)[:, None] * row_stride + columns.to(tl.int64)[None, :] * column_stride
    tl.store(tensor + offsets, block.to(tensor.dtype.element_ty), mask=where)


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
        x = tl.where(x > 0.0, x + 1.0, tl.exp(tl.where(x > 0.0, 0.0, x)))
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
def _query_weights(q, scale, real, total, FEATURES: tl.constexpr):
    """phi(scale q) of a block (n, K), without its denominator, and 1 / denominator (n); `real` marks true channels."""
    x = q.to(tl.float32) * scale
    if FEATURES == "softmax":
        x = tl.where(real, x, float("-inf"))
        weights = tl.exp(x - tl.max(x, axis=1)[:, None])
        return weights, 1.0 / tl.sum(weights, axis=1)
    weights = tl.where(real, _features(x, FEATURES), 0.0)
    if FEATURES == "identity":
        return weights, tl.full([q.shape[0]], 1.0, tl.float32)
    denominator = tl.sum(weights * total[None, :], axis=1)
    # Below the smallest normal number it is 0 by definition.
    undefined = denominator < 1.1754943508222875e-38
    return weights, tl.where(undefined, 0.0, 1.0 / tl.where(undefined, 1.0, denominator))


@triton.jit
def _window_of_keys(
    key, mask, mask_stride, start, windows, length, window, position_stride, channels, channel_stride, real,
    HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Keys (n, K) in float32, each the mean of the positions of its window that take part, and how many those are."""
    if WINDOWED:
        result = tl.zeros([windows.shape[0], channels.shape[0]], tl.float32)
        count = tl.zeros([windows.shape[0]], tl.float32)
        for offset in range(window):
            positions = windows.to(tl.int64) * window + offset
            present = _present(mask, mask_stride, start + positions, positions < length, HAS_MASK)
            where = present[:, None] & real
            result += _block(key, start + positions, position_stride, channels, channel_stride, where).to(tl.float32)
            count += present.to(tl.float32)
        return result / tl.maximum(count, 1.0)[:, None], count
    present = _present(mask, mask_stride, start + windows, windows < length, HAS_MASK)
    where = present[:, None] & real
    keys = _block(key, start + windows, position_stride, channels, channel_stride, where).to(tl.float32)
    return keys, present.to(tl.float32)


@triton.jit
def _window_of_values(
    value, mask, mask_stride, start, windows, length, window, position_stride, columns, column_stride, real,
    HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Values (n, V) in their own dtype, each the mean of its window."""
    if WINDOWED:
        values, _ = _window_of_keys(
            value, mask, mask_stride, start, windows, length, window, position_stride, columns, column_stride, real,
            HAS_MASK, WINDOWED,
        )  # fmt: skip
        return values.to(value.dtype.element_ty)
    present = _present(mask, mask_stride, start + windows, windows < length, HAS_MASK)
    return _block(value, start + windows, position_stride, columns, column_stride, present[:, None] & real)


@triton.jit
def _spread(
    grad, mask, mask_stride, start, windows, length, window, position_stride, columns, column_stride, real, block,
    HAS_MASK: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Give every position that takes part its window's gradient, and the others 0."""
    if WINDOWED:
        for offset in range(window):
            positions = windows.to(tl.int64) * window + offset
            inside = positions < length
            present = _present(mask, mask_stride, start + positions, inside, HAS_MASK)
            given = tl.where(present[:, None], block, 0.0)
            _put(grad, start + positions, position_stride, columns, column_stride, given, inside[:, None] & real)
    else:
        _put(grad, start + windows, position_stride, columns, column_stride, block, (windows < length)[:, None] & real)


# Keys and values to summaries.


@triton.jit(do_not_specialize=["num_splits", "window", "scale"])
def _summarize_kernel(
    key, value, mask, cu_seqlens, maximum, total, weighted_sum,
    num_positions, num_splits, window, scale, heads,
    key_item, key_head, key_position, key_channel, value_item, value_head, value_position, value_channel,
    mask_item, mask_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_K: tl.constexpr, TILES_V: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The summary of one split: maximum and total (R, P, K), weighted sum (R, P, K, V)."""
    row, split, tile_k, tile_v = _row_and_split(TILES_K, TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    key += item * key_item + row % heads * key_head
    value += item * value_item + row % heads * value_head
    mask += item * mask_item
    first, last = _part(split, num_splits, tl.cdiv(length, window), BLOCK_N)
    channels = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_channels, real_columns = (channels < K)[None, :], (columns < V)[None, :]

    m = tl.full([BLOCK_K], float("-inf") if FEATURES == "softmax" else 0.0, tl.float32)
    s = tl.zeros([BLOCK_K], tl.float32)
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    for begin in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        windows = begin + tl.arange(0, BLOCK_N)
        k, count = _window_of_keys(
            key, mask, mask_position, start, windows, length, window, key_position, channels, key_channel,
            real_channels, HAS_MASK, WINDOWED,
        )  # fmt: skip
        v = _window_of_values(
            value, mask, mask_position, start, windows, length, window, value_position, columns, value_channel,
            real_columns, HAS_MASK, WINDOWED,
        )  # fmt: skip
        exists = count > 0.0
        k = k * scale
        if FEATURES == "softmax":
            k = tl.where(exists[:, None], k, float("-inf"))
            new_m = tl.maximum(m, tl.max(k, axis=0))
            # A channel without positions so far has the maximum -inf, and -inf - (-inf) must not arise.
            shift = tl.where(new_m == float("-inf"), 0.0, new_m)
            weights = tl.exp(k - shift[None, :]).to(value.dtype.element_ty)
            kept = tl.exp(m - shift)
            m = new_m
            s = s * kept + tl.sum(weights.to(tl.float32), axis=0)
            S = tl.dot(tl.trans(weights), v, acc=S * kept[:, None], input_precision=PRECISION)
        else:
            x = tl.where(exists[:, None] & real_channels, _features(k, FEATURES), 0.0)
            s += tl.sum(tl.where(exists[:, None], 1.0, 0.0) if FEATURES == "identity" else x, axis=0)
            weights, back = _in_range(tl.trans(x), value)
            S += _dot(weights, v, PRECISION) * back[:, None]

    partial = row * num_splits + split
    if tile_v == 0:
        tl.store(maximum + partial * K + channels, m, mask=channels < K)
        tl.store(total + partial * K + channels, s, mask=channels < K)
    _put(weighted_sum + partial * K * V, channels, V, columns, 1, S, (channels < K)[:, None] & real_columns)


@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    maxima, totals, weighted_sums, maximum, total, weighted_sum, num_splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, MOST_SPLITS: tl.constexpr,
):  # fmt: skip
    """The splits' summaries of one channel of a row, merged in a fixed order."""
    program = tl.program_id(0).to(tl.int64)
    partial = program // K * num_splits * K + program % K
    splits = tl.arange(0, MOST_SPLITS)
    there = splits < num_splits
    m_of = tl.load(maxima + partial + splits * K, mask=there, other=float("-inf"))
    m = tl.max(m_of, axis=0)
    shift = tl.where(m == float("-inf"), 0.0, m)
    s = tl.sum(tl.exp(m_of - shift) * tl.load(totals + partial + splits * K, mask=there, other=0.0), axis=0)
    columns = tl.arange(0, BLOCK_V)
    S = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, num_splits, BLOCK_P):
        some = begin + tl.arange(0, BLOCK_P)
        kept = tl.exp(tl.load(maxima + partial + some * K, mask=some < num_splits, other=float("-inf")) - shift)
        where = (some < num_splits)[:, None] & (columns < V)[None, :]
        S += tl.sum(kept[:, None] * _block(weighted_sums + partial * V, some, K * V, columns, 1, where), axis=0)
    tl.store(maximum + program, m)
    tl.store(total + program, s)
    tl.store(weighted_sum + program * V + columns, S, mask=columns < V)


@triton.jit(do_not_specialize=["num_splits", "window", "scale"])
def _summarize_backward_kernel(
    key, value, mask, cu_seqlens, maximum, grad_total, grad_weighted_sum, grad_key, grad_value,
    num_positions, num_splits, window, scale, heads,
    key_item, key_head, key_position, key_channel, value_item, value_head, value_position, value_channel,
    grad_key_item, grad_key_head, grad_key_position, grad_key_channel,
    grad_value_item, grad_value_head, grad_value_position, grad_value_channel,
    mask_item, mask_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr, WINDOWED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With E = phi(K) (softmax: exp(K - m)): dV = E dS and dK = phi'(K) * (V dS^T + ds), spread over the windows."""
    row, split, _, _ = _row_and_split(1, 1, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    key += item * key_item + row % heads * key_head
    value += item * value_item + row % heads * value_head
    grad_key += item * grad_key_item + row % heads * grad_key_head
    grad_value += item * grad_value_item + row % heads * grad_value_head
    mask += item * mask_item
    grad_weighted_sum += row * K * V
    first, last = _part(split, num_splits, tl.cdiv(length, window), BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    real_channels = (channels < K)[None, :]
    m = tl.load(maximum + row * K + channels, mask=channels < K, other=0.0)
    m = tl.where(m == float("-inf"), 0.0, m)
    ds = tl.load(grad_total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & (tl.arange(0, BLOCK_V) < V)[None, :]
    dS, dS_back = _in_range(_block(grad_weighted_sum, channels, V, tl.arange(0, BLOCK_V), 1, where), value)

    for begin in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        windows = begin + tl.arange(0, BLOCK_N)
        k, count = _window_of_keys(
            key, mask, mask_position, start, windows, length, window, key_position, channels, key_channel,
            real_channels, HAS_MASK, WINDOWED,
        )  # fmt: skip
        visible = (count > 0.0)[:, None] & real_channels
        x = tl.exp(k * scale - m[None, :]) if FEATURES == "softmax" else _features(k * scale, FEATURES)
        weights = tl.where(visible, x, 0.0)
        share = 1.0 / tl.maximum(count, 1.0)[:, None]
        dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for tile in tl.range(TILES_V, num_stages=1):
            columns = tile * BLOCK_V + tl.arange(0, BLOCK_V)
            real_columns = (columns < V)[None, :]
            if TILES_V > 1:
                where = (channels < K)[:, None] & real_columns
                dS, dS_back = _in_range(_block(grad_weighted_sum, channels, V, columns, 1, where), value)
            v = _window_of_values(
                value, mask, mask_position, start, windows, length, window, value_position, columns, value_channel,
                real_columns, HAS_MASK, WINDOWED,
            )  # fmt: skip
            dk += _dot(v, tl.trans(dS), PRECISION) * dS_back[None, :]
            narrow, back = _in_range(weights * dS_back[None, :], value)
            dv = _dot(narrow, dS, PRECISION) * (back[:, None] * share)
            _spread(
                grad_value, mask, mask_position, start, windows, length, window, grad_value_position, columns,
                grad_value_channel, real_columns, dv, HAS_MASK, WINDOWED,
            )  # fmt: skip
        if FEATURES != "identity":
            dk += ds[None, :]
        dk = tl.where(visible, dk * _slope(weights, FEATURES), 0.0) * (scale * share)
        _spread(
            grad_key, mask, mask_position, start, windows, length, window, grad_key_position, channels,
            grad_key_channel, real_channels, dk, HAS_MASK, WINDOWED,
        )  # fmt: skip


# Queries to outputs.


@triton.jit(do_not_specialize=["num_splits", "scale"])
def _attend_kernel(
    query, total, weighted_sum, gate, cu_seqlens, output,
    num_positions, num_splits, scale, heads,
    query_item, query_head, query_position, query_channel, gate_item, gate_head, gate_position,
    output_item, output_head, output_position, output_channel,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """gate * phi(Q) (S / s), or gate * (phi(Q) S) / (phi(Q) . s); softmax has a denominator of its own."""
    row, split, _, tile_v = _row_and_split(1, TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    query += item * query_item + row % heads * query_head
    output += item * output_item + row % heads * output_head
    gate += item * gate_item + row % heads * gate_head
    first, last = _part(split, num_splits, length, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_channels, real_columns = (channels < K)[None, :], (columns < V)[None, :]
    z = tl.load(total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & real_columns
    C, C_back = _in_range(_context(weighted_sum + row * K * V, z, channels, columns, where, V, DIVIDE), query)

    for begin in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        positions = begin + tl.arange(0, BLOCK_N)
        inside = positions < length
        q = _block(query, start + positions, query_position, channels, query_channel, inside[:, None] & real_channels)
        weights, factor = _query_weights(q, scale, real_channels, z, FEATURES)
        narrow, back = _in_range(weights * C_back[None, :], query)
        if HAS_GATE:
            offsets = (start + positions).to(tl.int64) * gate_position
            factor *= tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32)
        o = _dot(narrow, C, PRECISION) * (factor * back)[:, None]
        _put(output, start + positions, output_position, columns, output_channel, o, inside[:, None] & real_columns)


@triton.jit(do_not_specialize=["num_splits", "scale"])
def _attend_backward_kernel(
    query, total, weighted_sum, gate, cu_seqlens, grad_output, grad_query, grad_gate, grad_total, grad_context,
    num_positions, num_splits, scale, heads,
    query_item, query_head, query_position, query_channel, gate_item, gate_head, gate_position,
    grad_output_item, grad_output_head, grad_output_position, grad_output_channel,
    grad_query_item, grad_query_head, grad_query_position, grad_query_channel,
    grad_gate_item, grad_gate_head, grad_gate_position,
    K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TILES_V: tl.constexpr, FEATURES: tl.constexpr, HAS_GATE: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    OF_QUERY: tl.constexpr, OF_CONTEXT: tl.constexpr, DIVIDE: tl.constexpr,
):  # fmt: skip
    """Gradients of query and gate, and one split's of total (R, P, K) and context (R, P, K, V); see streaming.py.

    Where the values are too wide for one block, it runs once for the queries (every program reads all columns) and
    once for the contexts (every program one tile of columns).
    """
    row, split, _, tile_v = _row_and_split(1, 1 if OF_QUERY else TILES_V, num_splits)
    item, start, length = _segment(cu_seqlens, row // heads, num_positions, PACKED)
    query += item * query_item + row % heads * query_head
    grad_output += item * grad_output_item + row % heads * grad_output_head
    grad_query += item * grad_query_item + row % heads * grad_query_head
    gate += item * gate_item + row % heads * gate_head
    grad_gate += item * grad_gate_item + row % heads * grad_gate_head
    weighted_sum += row * K * V
    first, last = _part(split, num_splits, length, BLOCK_N)
    channels = tl.arange(0, BLOCK_K)
    columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
    real_channels, real_columns = (channels < K)[None, :], (columns < V)[None, :]
    z = tl.load(total + row * K + channels, mask=channels < K, other=0.0)
    where = (channels < K)[:, None] & real_columns
    if OF_QUERY:
        C, C_back = _in_range(_context(weighted_sum, z, channels, columns, where, V, DIVIDE), query)
    if OF_CONTEXT:
        dC = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    dz = tl.zeros([BLOCK_K], tl.float32)

    for begin in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        positions = begin + tl.arange(0, BLOCK_N)
        rows = start + positions
        inside = positions < length
        q = _block(query, rows, query_position, channels, query_channel, inside[:, None] & real_channels)
        weights, inverse = _query_weights(q, scale, real_channels, z, FEATURES)
        factor = inverse
        if HAS_GATE:
            g = tl.load(gate + rows.to(tl.int64) * gate_position, mask=inside, other=0.0).to(tl.float32)
            factor *= g
        do = _block(
            grad_output, rows, grad_output_position, columns, grad_output_channel, inside[:, None] & real_columns
        )
        if OF_CONTEXT:
            narrow, back = _in_range(tl.trans(weights * factor[:, None]), query)
            dC += _dot(narrow, do, PRECISION) * back[:, None]
        if OF_QUERY:
            T = _dot(do, tl.trans(C), PRECISION) * C_back[None, :]
            for tile in tl.range(1, TILES_V, num_stages=1):
                more = tile * BLOCK_V + tl.arange(0, BLOCK_V)
                where_more = inside[:, None] & (more < V)[None, :]
                do = _block(grad_output, rows, grad_output_position, more, grad_output_channel, where_more)
                where_more = (channels < K)[:, None] & (more < V)[None, :]
                wide = _context(weighted_sum, z, channels, more, where_more, V, DIVIDE)
                other, other_back = _in_range(wide, query)
                T += _dot(do, tl.trans(other), PRECISION) * other_back[None, :]
            share = tl.sum(weights * T, axis=1) * inverse
            if HAS_GATE:
                offsets = rows.to(tl.int64) * grad_gate_position
                tl.store(grad_gate + offsets, share.to(grad_gate.dtype.element_ty), mask=inside)
            if FEATURES == "softmax":
                dq = weights * (T - share[:, None])
            elif FEATURES == "identity":
                dq = T
            else:
                dz -= tl.sum(weights * (factor * share)[:, None], axis=0)
                dq = (T - share[:, None] * z[None, :]) * _slope(weights, FEATURES)
            dq *= (factor * scale)[:, None]
            _put(
                grad_query, rows, grad_query_position, channels, grad_query_channel, dq, inside[:, None] & real_channels
            )

    partial = row * num_splits + split
    if OF_QUERY:
        tl.store(grad_total + partial * K + channels, dz, mask=channels < K)
    if OF_CONTEXT:
        _put(grad_context + partial * K * V, channels, V, columns, 1, dC, where)


@triton.jit(do_not_specialize=["num_splits_total", "num_splits"])
def _merge_back_kernel(
    grad_totals, grad_contexts, total, weighted_sum, grad_total, grad_weighted_sum, num_splits_total, num_splits,
    K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr, MOST_SPLITS: tl.constexpr,
    DIVIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of one channel's total and weighted sum, from the splits', added in a fixed order.

    With DIVIDE those of the splits are of the context C = S / s: dS = dC / s, ds = -rowsum(C * dS).
    """
    program = tl.program_id(0).to(tl.int64)
    row, channel = program // K, program % K
    splits = tl.arange(0, MOST_SPLITS)
    parts = grad_totals + row * num_splits_total * K + channel + splits * K
    ds = tl.sum(tl.load(parts, mask=splits < num_splits_total, other=0.0), axis=0)
    columns = tl.arange(0, BLOCK_V)
    dC = tl.zeros([BLOCK_V], tl.float32)
    for begin in range(0, num_splits, BLOCK_P):
        some = begin + tl.arange(0, BLOCK_P)
        where = (some < num_splits)[:, None] & (columns < V)[None, :]
        dC += tl.sum(
            _block(grad_contexts + (row * num_splits * K + channel) * V, some, K * V, columns, 1, where), axis=0
        )
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
    splits = tiles.splits(key.device, programs, -(-_usual_len(key, cu_seqlens) // window), "sums")
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
        HAS_MASK=key_mask is not None,
        PACKED=cu_seqlens is not None,
        WINDOWED=window > 1,
        TILES_K=tiles.num_k,
    )
    if splits > 1:
        parts = (maximum, total, weighted_sum)
        maximum, total, weighted_sum = (part.new_empty((rows, *part.shape[2:])) for part in parts)
        _launch(
            _merge_kernel,
            rows * key.shape[3],
            (*parts, maximum, total, weighted_sum),
            (splits,),
            _tiles("merge", key, value),
        )
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
    tiles = _tiles("back", key, value)
    rows = in_sequences(key, cu_seqlens) * key.shape[1]
    grad_key, grad_value = into or (_like(key, cu_seqlens), _like(value, cu_seqlens))
    splits = tiles.splits(key.device, rows, -(-_usual_len(key, cu_seqlens) // window), "maps")
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
    splits = tiles.splits(query.device, programs, _usual_len(query, cu_seqlens), "maps")
    sums = total.contiguous(), weighted_sum.contiguous()
    _launch(
        _attend_kernel,
        programs * splits,
        (query, *sums, _or(gate, query), _starts(cu_seqlens, query), output),
        (query.shape[2], splits, scale, query.shape[1], *query.stride(), *_strides(gate, 3), *output.stride()),
        tiles,
        FEATURES=name,
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
    grad_query, grad_gate = _like(query, cu_seqlens), None if gate is None else _like(gate, cu_seqlens)
    divide = feature_map(name).divides_context

    def run(tiles: Tiles, *, of_query: bool, of_context: bool) -> tuple[Tensor, Tensor]:
        programs = items * heads * (1 if of_query else tiles.num_v)
        splits = tiles.splits(query.device, programs, _usual_len(query, cu_seqlens), "sums")
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
            HAS_GATE=gate is not None,
            PACKED=cu_seqlens is not None,
            OF_QUERY=of_query,
            OF_CONTEXT=of_context,
            DIVIDE=divide,
        )
        return grad_totals, grad_contexts

    tiles = _tiles("back", query, weighted_sum)
    if in_one_pass(tiles, query.dtype):
        grad_totals, grad_contexts = run(tiles, of_query=True, of_context=True)
    else:
        grad_totals, _ = run(tiles, of_query=True, of_context=False)
        _, grad_contexts = run(_tiles("context back", query, weighted_sum), of_query=False, of_context=True)
    grad_total, grad_sum = (torch.empty_like(tensor) for tensor in sums)
    _launch(
        _merge_back_kernel,
        items * heads * query.shape[3],
        (grad_totals, grad_contexts, *sums, grad_total, grad_sum),
        (grad_totals.shape[1], grad_contexts.shape[1]),
        _tiles("merge", query, weighted_sum),
        DIVIDE=divide,
    )
    return grad_query, grad_total, grad_sum, grad_gate


def _tiles(what: Pass, keys: Tensor, values: Tensor) -> Tiles:
    return tiles_of(what, keys.shape[3], values.shape[3], keys.dtype)


def _launch(
    kernel: Any, programs: int, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], tiles: Tiles, **options: Any
) -> None:
    """Run a kernel on the tensors' device; nothing where there is nothing to do."""
    if programs == 0:
        return
    if kernel in (_merge_kernel, _merge_back_kernel):
        options |= {"BLOCK_P": tiles.n, "MOST_SPLITS": MOST_SPLITS}
    else:
        options |= {"BLOCK_N": tiles.n, "STAGES": tiles.stages, "PRECISION": _precision(tensors[0])}
        options |= {"BLOCK_K": tiles.k, "TILES_V": tiles.num_v}
    options |= {"K": tiles.key_dim, "V": tiles.value_dim, "BLOCK_V": tiles.v}
    with torch.cuda.device_of(tensors[0]):
        _run(kernel, programs, (*tensors, *numbers), {**options, "num_warps": tiles.warps})


def _run(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel[(programs,)](*arguments, **options)


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
