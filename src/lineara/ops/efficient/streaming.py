"""Efficient attention block by block: the reference's mathematics with nothing as long as the sequence kept beside it.

A block of positions is converted, exponentiated and multiplied while it is in the processor's cache, in buffers that
are allocated once; a running maximum per key channel makes the position softmax exact over any number of blocks. The
backward passes recompute both softmaxes from the inputs instead of saving them.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, N query positions,
M key positions, K key channels, V value channels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lineara.ops.efficient.reference import accumulation_dtype, count_positions, finite_shift

# A block holds at most this many elements (2 MiB of float32); it takes as many rows as fit at this length.
_BLOCK_ELEMENTS = 512 * 1024
_BLOCK_LEN = 1024


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and weighted sum (B, H, K, V) of `reference.ContextSummary`."""
    softmax = normalization == "softmax"
    wide = accumulation_dtype(key.dtype)
    batch, heads, _, key_dim = key.shape
    maximum = key.new_full((batch, heads, key_dim), -torch.inf if softmax else 0.0, dtype=wide)
    total = torch.zeros_like(maximum) if softmax else count_positions(key, key_mask)
    weighted_sum = key.new_zeros((batch, heads, key_dim, value.shape[3]), dtype=wide)
    hidden = _hidden_positions(key_mask, key)
    key_buffer, value_buffer = _buffer(key), _buffer(value)

    for (k, v, hide), (m, s, S) in _blocks((key, value, hidden), (maximum, total, weighted_sum)):
        k = _load(k, key_buffer, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = _load(v, value_buffer, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            k, block_maximum, block_total = _softmax_block(k, key_buffer)
            new_maximum = torch.maximum(m, block_maximum)  # (R, K)
            shift = finite_shift(new_maximum)
            kept = (m - shift).exp_()
            added = (block_maximum - shift).exp_().mul_(block_total)
            s.mul_(kept).add_(added)
            S.mul_(kept[:, :, None]).add_(torch.bmm(k.mT, v).mul_(added[:, :, None]))
            m.copy_(new_maximum)
        else:
            S.baddbmm_(k.mT, v)
    return maximum, total, weighted_sum


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    maximum: Tensor,
    normalization: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value: with E = exp(K - m), dV = E dS and dK = E * (V dS^T + ds); for scaling E = K."""
    softmax = normalization == "softmax"
    grad_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    grad_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    hidden = _hidden_positions(key_mask, key)
    shift = finite_shift(maximum)
    key_buffer, value_buffer, product_buffer = _buffer(key), _buffer(value), _buffer(key)

    for (k, v, dk, dv, hide), (m, ds, dS) in _blocks(
        (key, value, grad_key, grad_value, hidden), (shift, grad_total, grad_weighted_sum)
    ):
        k = _load(k, key_buffer, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = _load(v, value_buffer, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            k, block_maximum, block_total = _softmax_block(k, key_buffer)
            factor = (block_maximum - m).exp_().mul_(block_total)  # (R, K)
            ds, dS = ds * factor, dS * factor[:, :, None]
        product = torch.bmm(v, dS.mT, out=_fit(product_buffer, k))  # (R, n, K)
        if softmax:
            product.add_(ds[:, None]).mul_(k)
        elif hide.shape[2]:
            product.masked_fill_(hide, 0.0)
        _store(product, dk, scale)
        _product(k, dS, dv, value_buffer)
    return grad_key, grad_value


def attend(query: Tensor, context: Tensor, normalization: str, scale: float) -> Tensor:
    """The query weights of every position, times the context matrix: (B, H, N, V)."""
    output = query.new_empty((*query.shape[:3], context.shape[3]))
    query_buffer, output_buffer = _buffer(query), _buffer(output)
    for (q, o), (C,) in _blocks((query, output), (context,)):
        _product(_query_weights(q, query_buffer, normalization, scale), C, o, output_buffer)
    return output


def attend_backward(
    grad_output: Tensor, query: Tensor, context: Tensor, normalization: str, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of query and context: with W the query weights and G = dO C^T, dC = W^T dO and

    dQ = W * (G - rowsum(W * G)); for scaling dQ = G.
    """
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_context = torch.zeros_like(context)
    query_buffer, output_buffer, product_buffer = _buffer(query), _buffer(grad_output), _buffer(query)
    sum_buffer = _buffer(query)
    for (q, do, dq), (C, dC) in _blocks((query, grad_output, grad_query), (context, grad_context)):
        weights = _query_weights(q, query_buffer, normalization, scale)  # (R, n, K)
        do = _load(do, output_buffer, 1.0)  # (R, n, V)
        dC.baddbmm_(weights.mT, do)
        product = torch.bmm(do, C.mT, out=_fit(product_buffer, q))  # (R, n, K)
        if normalization == "softmax":
            row_sum = torch.mul(product, weights, out=_fit(sum_buffer, q)).sum(dim=2, keepdim=True)  # (R, n, 1)
            product.sub_(row_sum).mul_(weights)
        _store(product, dq, scale)
    return grad_query, grad_context


def _softmax_block(key: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P, m and s with exp(key - m) = s P for the positions of one block: (R, n, K), (R, K), (R, K).

    torch's fused softmax is much faster than torch.exp on CPU; its largest weight is exp(0) / s.
    """
    maximum = key.amax(dim=1)
    weights = torch.softmax(key, dim=1, out=_fit(buffer, key))
    empty = maximum == -torch.inf
    if empty.any():
        weights.masked_fill_(empty[:, None], 0.0)
    return weights, maximum, weights.amax(dim=1).reciprocal_().masked_fill_(empty, 0.0)


def _query_weights(query: Tensor, buffer: Tensor, normalization: str, scale: float) -> Tensor:
    query = _load(query, buffer, scale)
    return torch.softmax(query, dim=2, out=_fit(buffer, query)) if normalization == "softmax" else query


def _blocks(
    long: Sequence[Tensor], short: Sequence[Tensor]
) -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
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
    length = _BLOCK_ELEMENTS // (channels * rows) or 1
    for group in groups:
        for row in range(0, num_rows, rows):
            views = [tensor[row : row + rows] for tensor in group]
            for start in range(0, num_positions, length):
                yield [view[:, start : start + length] for view in views[: len(long)]], views[len(long) :]


def _rows_are_evenly_spaced(tensor: Tensor) -> bool:
    batch, heads = tensor.shape[:2]
    return batch == 1 or heads == 1 or tensor.stride(0) == heads * tensor.stride(1)


def _hidden_positions(key_mask: Tensor | None, key: Tensor) -> Tensor:
    """True where a position takes no part: (B, H, M, 1), or (B, H, M, 0) when every position takes part."""
    if key_mask is None:
        return key.new_empty((*key.shape[:3], 0), dtype=torch.bool)
    return (~key_mask)[:, None, :, None].expand(-1, key.shape[1], -1, -1).contiguous()


def _buffer(tensor: Tensor) -> Tensor:
    """Room for one block of the tensor, in the dtype that sums are kept in."""
    size = min(tensor.numel(), max(_BLOCK_ELEMENTS, tensor.shape[3]))
    return tensor.new_empty(size, dtype=accumulation_dtype(tensor.dtype))


def _fit(buffer: Tensor, block: Tensor) -> Tensor:
    return buffer[: block.numel()].view(block.shape)


def _load(block: Tensor, buffer: Tensor, scale: float, hidden: Tensor | None = None, fill: float = 0.0) -> Tensor:
    """scale * block in the buffer's dtype, `fill` where hidden; the block itself where that changes nothing."""
    anything_hidden = hidden is not None and hidden.shape[2] > 0
    if block.dtype == buffer.dtype and scale == 1.0 and not anything_hidden:
        return block
    loaded = _fit(buffer, block).copy_(block)
    if scale != 1.0:
        loaded.mul_(scale)
    return loaded.masked_fill_(hidden, fill) if hidden is not None and anything_hidden else loaded


def _store(block: Tensor, target: Tensor, scale: float) -> None:
    target.copy_(block if scale == 1.0 else block.mul_(scale))


def _product(left: Tensor, right: Tensor, target: Tensor, buffer: Tensor) -> None:
    """target = left @ right, through the buffer where the target is of another dtype."""
    if target.dtype == left.dtype:
        torch.bmm(left, right, out=target)
    else:
        target.copy_(torch.bmm(left, right, out=_fit(buffer, target)))
