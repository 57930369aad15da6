"""Efficient attention block by block: the reference's mathematics with nothing as long as the sequence kept beside it.

A block of positions is converted, exponentiated and multiplied while it is in the processor's cache, in buffers that
are allocated once; a running maximum per key channel makes the position softmax exact over any number of blocks. The
backward passes recompute both softmaxes from the inputs instead of saving them.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, N query positions,
M key positions, K key channels, V value channels.
"""

import torch
from torch import Tensor

from lineara.ops.blocks import Buffer, blocks, empty_like_query, hidden_positions
from lineara.ops.efficient.reference import ContextSummary, context_matrix, count_positions, finite_shift
from lineara.ops.packed import Positions, Row, by_sequence, joined, stacked
from lineara.ops.precision import accumulation_dtype


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and weighted sum (B, H, K, V) of `reference.ContextSummary`."""
    if cu_seqlens is not None:
        parts = by_sequence(
            summarize, cu_seqlens, Positions(key), Positions(value), Positions(key_mask), normalization, scale
        )
        maximum, total, weighted_sum = stacked(parts)
        return maximum, total, weighted_sum
    softmax = normalization == "softmax"
    wide = accumulation_dtype(key.dtype)
    batch, heads, _, key_dim = key.shape
    maximum = key.new_full((batch, heads, key_dim), -torch.inf if softmax else 0.0, dtype=wide)
    total = torch.zeros_like(maximum) if softmax else count_positions(key, key_mask)
    weighted_sum = key.new_zeros((batch, heads, key_dim, value.shape[3]), dtype=wide)
    hidden = hidden_positions(key_mask, key)
    key_buffer, value_buffer = Buffer(key), Buffer(value)

    for (k, v, hide), (m, s, S) in blocks((key, value, hidden), (maximum, total, weighted_sum)):
        k = key_buffer.load(k, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            new_maximum = torch.maximum(m, k.amax(dim=1))  # (R, K)
            shift = finite_shift(new_maximum)
            k = torch.sub(k, shift[:, None], out=key_buffer.fit(k)).exp_()
            kept = (m - shift).exp_()
            s.mul_(kept).add_(k.sum(dim=1))
            S.mul_(kept[:, :, None])
            m.copy_(new_maximum)
        S.baddbmm_(k.mT, v)
    return maximum, total, weighted_sum


def context_of(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum (B, H, K), total (B, H, K) and context matrix (B, H, K, V)."""
    maximum, total, weighted_sum = summarize(key, value, key_mask, normalization, scale, cu_seqlens)
    return maximum, total, context_matrix(ContextSummary(maximum, total, weighted_sum, normalization, scale))


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    maximum: Tensor,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value: with E = exp(K - m), dV = E dS and dK = E * (V dS^T + ds).

    For scaling dV = K dS and dK = V dS^T.
    """
    if cu_seqlens is not None:
        sums, inputs = (
            (Row(grad_total), Row(grad_weighted_sum)),
            (Positions(key), Positions(value), Positions(key_mask)),
        )
        options = (Row(maximum), normalization, scale)
        parts = by_sequence(summarize_backward, cu_seqlens, *sums, *inputs, *options)
        grad_key, grad_value = joined(parts, torch.empty_like(key), torch.empty_like(value))
        return grad_key, grad_value
    softmax = normalization == "softmax"
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    hidden = hidden_positions(key_mask, key)
    shift = finite_shift(maximum)
    key_buffer, value_buffer = Buffer(key), Buffer(value)
    grad_key_buffer, grad_value_buffer = Buffer(key), Buffer(value)

    for (k, v, dk, dv, hide), (m, ds, dS) in blocks(
        (key, value, grad_key, grad_value, hidden), (shift, grad_total, grad_weighted_sum)
    ):
        k = key_buffer.load(k, scale, hide, -torch.inf if softmax else 0.0)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        if softmax:
            k = torch.sub(k, m[:, None], out=key_buffer.fit(k)).exp_()
        with grad_value_buffer.storing(dv) as product:
            torch.bmm(k, dS, out=product)
        with grad_key_buffer.storing(dk) as product:
            torch.bmm(v, dS.mT, out=product)
            if softmax:
                product.add_(ds[:, None]).mul_(k)
            elif hide.shape[2]:
                product.masked_fill_(hide, 0.0)
            if scale != 1.0:
                product.mul_(scale)
    return grad_key, grad_value


def context_backward(grad_context: Tensor, context: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of total and weighted sum: context = S / s, so dS = dC / s and ds = -rowsum(C * dC) / s.

    Dividing here keeps exp(K - m) within [0, 1] in the long pass that follows, which stays exact where
    exp(K - log s - m) would cancel large numbers.
    """
    grad_weighted_sum = grad_context / torch.where(total > 0, total, 1.0)[..., None]
    return -(context * grad_weighted_sum).sum(dim=3), grad_weighted_sum


def attend(
    query: Tensor, context: Tensor, normalization: str, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The query weights of every position, times the context matrix: (B, H, N, V)."""
    if cu_seqlens is not None:
        parts = by_sequence(attend, cu_seqlens, Positions(query), Row(context), normalization, scale)
        return torch.cat(parts, dim=2, out=empty_like_query(query, context.shape[3]))
    output = empty_like_query(query, context.shape[3])
    query_buffer, output_buffer = Buffer(query), Buffer(output)
    for (q, o), (C,) in blocks((query, output), (context,)):
        with output_buffer.storing(o) as product:
            torch.bmm(_query_weights(q, query_buffer, normalization, scale), C, out=product)
    return output


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of query and context: with weights W and G = dO C^T, dC = W^T dO and dQ = W * (G - rowsum(W * G)).

    For scaling dQ = G.
    """
    if cu_seqlens is not None:
        long = (Positions(grad_output), Positions(query))
        parts = by_sequence(attend_backward, cu_seqlens, *long, Row(context), normalization, scale)
        (grad_query,) = joined([part[:1] for part in parts], torch.empty_like(query))
        return grad_query, stacked([part[1:] for part in parts])[0]
    grad_query = torch.empty_like(query)
    grad_context = torch.zeros_like(context, memory_format=torch.contiguous_format)
    query_buffer, output_buffer, grad_query_buffer = Buffer(query), Buffer(grad_output), Buffer(query)
    for (q, do, dq), (C, dC) in blocks((query, grad_output, grad_query), (context, grad_context)):
        weights = _query_weights(q, query_buffer, normalization, scale)  # (R, n, K)
        do = output_buffer.load(do, 1.0)  # (R, n, V)
        dC.baddbmm_(weights.mT, do)
        with grad_query_buffer.storing(dq) as product:
            torch.bmm(do, C.mT, out=product)  # (R, n, K)
            if normalization == "softmax":
                row_sum = product.mul_(weights).sum(dim=2, keepdim=True)  # (R, n, 1)
                product.addcmul_(weights, row_sum, value=-1.0)
            if scale != 1.0:
                product.mul_(scale)
    return grad_query, grad_context


def attend_backward_to_sums(
    grad_output: Tensor,
    query: Tensor,
    total: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, total and weighted sum, where the context is the one divided by the other."""
    grad_query, grad_context = attend_backward(grad_output, query, context, normalization, scale, cu_seqlens)
    return grad_query, *context_backward(grad_context, context, total)


def _query_weights(query: Tensor, buffer: "Buffer", normalization: str, scale: float) -> Tensor:
    query = buffer.load(query, scale)
    return torch.softmax(query, dim=2, out=buffer.fit(query)) if normalization == "softmax" else query
