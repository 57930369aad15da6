"""Kernel attention block by block, and the part of multiresolution attention that answers queries.

Like efficient attention's blocks, those here are converted, mapped and multiplied while they are in the processor's
cache, and the backward passes recompute the features from the inputs.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, K key channels,
V value channels.
"""

import torch
from torch import Tensor

from lineara.ops.blocks import Buffer, blocks, empty_like_query, hidden_positions
from lineara.ops.packed import Positions, Row, by_sequence, joined, stacked
from lineara.ops.precision import accumulation_dtype


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over positions of phi(key), (B, H, K), and of phi(key)^T value, (B, H, K, V)."""
    if cu_seqlens is not None:
        inputs = (Positions(key), Positions(value), Positions(key_mask))
        total, weighted_sum = stacked(by_sequence(summarize, cu_seqlens, *inputs, feature_map, scale))
        return total, weighted_sum
    batch, heads, _, key_dim = key.shape
    total = key.new_zeros((batch, heads, key_dim), dtype=accumulation_dtype(key.dtype))
    weighted_sum = total.new_zeros((batch, heads, key_dim, value.shape[3]))
    hidden = hidden_positions(key_mask, key)
    key_buffer, value_buffer = Buffer(key), Buffer(value)
    for (k, v, hide), (z, S) in blocks((key, value, hidden), (total, weighted_sum)):
        weights = _key_features(k, key_buffer, hide, feature_map, scale)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        z.add_(weights.sum(dim=1))
        S.baddbmm_(weights.mT, v)
    return total, weighted_sum


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value: with P = phi(K), dV = P dS and dK = phi'(K) * (V dS^T + dz)."""
    if cu_seqlens is not None:
        sums, inputs = (
            (Row(grad_total), Row(grad_weighted_sum)),
            (Positions(key), Positions(value), Positions(key_mask)),
        )
        parts = by_sequence(summarize_backward, cu_seqlens, *sums, *inputs, feature_map, scale)
        grad_key, grad_value = joined(parts, torch.empty_like(key), torch.empty_like(value))
        return grad_key, grad_value
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    hidden = hidden_positions(key_mask, key)
    key_buffer, value_buffer = Buffer(key), Buffer(value)
    grad_key_buffer, grad_value_buffer = Buffer(key), Buffer(value)
    for (k, v, dk, dv, hide), (dz, dS) in blocks(
        (key, value, grad_key, grad_value, hidden), (grad_total, grad_weighted_sum)
    ):
        weights = _key_features(k, key_buffer, hide, feature_map, scale)  # (R, n, K)
        v = value_buffer.load(v, 1.0, hide, 0.0)  # (R, n, V)
        with grad_value_buffer.storing(dv) as product:
            torch.bmm(weights, dS, out=product)
        with grad_key_buffer.storing(dk) as product:
            torch.bmm(v, dS.mT, out=product)
            _times_slope(product.add_(dz[:, None]), weights, feature_map, scale)
    return grad_key, grad_value


def attend(
    query: Tensor,
    total: Tensor,
    context: Tensor,
    gate: Tensor | None,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """gate * (phi(query) context) / (phi(query) . total), (B, H, N, V); under softmax the denominator is 1.

    The gate is (B, H, N) or None.
    """
    if cu_seqlens is not None:
        tensors = (Positions(query), Row(total), Row(context), Positions(gate))
        parts = by_sequence(attend, cu_seqlens, *tensors, feature_map, scale)
        return torch.cat(parts, dim=2, out=empty_like_query(query, context.shape[3]))
    output = empty_like_query(query, context.shape[3])
    query_buffer, output_buffer = Buffer(query), Buffer(output)
    for (q, o, g), (z, C) in blocks((query, output, _gates(gate, query)), (total, context)):
        weights = _query_features(q, query_buffer, feature_map, scale)  # (R, n, K)
        factor = _times_gate(_inverse(weights, z, feature_map), g)
        with output_buffer.storing(o) as product:
            torch.bmm(weights, C, out=product)
            if factor is not None:
                product.mul_(factor)
    return output


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    total: Tensor,
    context: Tensor,
    gate: Tensor | None,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, total, context and gate.

    With P = phi(Q), i = 1 / (P . z), T = dO C^T and the output's share r = rowsum(P * T) i: dgate = r,
    dC = P^T (g i dO), dz = -P^T (g i r) and dP = g i (T - r z). Softmax has i = 1, z = 0 and dQ = P * g (T - r).
    """
    if cu_seqlens is not None:
        tensors = (Positions(grad_output), Positions(query), Row(total), Row(context), Positions(gate))
        parts = by_sequence(attend_backward, cu_seqlens, *tensors, feature_map, scale)
        grad_total, grad_context = stacked([part[1:3] for part in parts])
        grad_gate = None if gate is None else torch.cat([part[3] for part in parts], dim=2)
        (grad_query,) = joined([part[:1] for part in parts], torch.empty_like(query))
        return grad_query, grad_total, grad_context, grad_gate
    softmax = feature_map == "softmax"
    grad_query = torch.empty_like(query)
    grad_total = torch.zeros_like(total, memory_format=torch.contiguous_format)
    grad_context = torch.zeros_like(context, memory_format=torch.contiguous_format)
    gates = _gates(gate, query)
    grad_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    query_buffer, output_buffer, grad_query_buffer = Buffer(query), Buffer(grad_output), Buffer(query)
    for (q, do, dq, g, dg), (z, C, dz, dC) in blocks(
        (query, grad_output, grad_query, gates, grad_gates), (total, context, grad_total, grad_context)
    ):
        weights = _query_features(q, query_buffer, feature_map, scale)  # (R, n, K)
        do = output_buffer.load(do, 1.0)  # (R, n, V)
        inverse = _inverse(weights, z, feature_map)
        factor = _times_gate(inverse, g)
        weighted = weights if factor is None else weights * factor  # (R, n, K)
        dC.baddbmm_(weighted.mT, do)
        with grad_query_buffer.storing(dq) as product:
            torch.bmm(do, C.mT, out=product)  # (R, n, K)
            share = (product * weights).sum(dim=2, keepdim=True)  # (R, n, 1)
            if inverse is not None:
                share.mul_(inverse)
            if gate is not None:
                dg.copy_(share)
            if softmax:
                product.sub_(share).mul_(weighted)
                if scale != 1.0:
                    product.mul_(scale)
            else:
                dz[:, :, None].baddbmm_(weighted.mT, share, alpha=-1.0)
                assert factor is not None, "only softmax has none"
                product.sub_(share * z[:, None]).mul_(factor)
                _times_slope(product, weights, feature_map, scale)
    return grad_query, grad_total, grad_context, None if gate is None else grad_gates[..., 0]


def _key_features(key: Tensor, buffer: Buffer, hidden: Tensor, feature_map: str, scale: float) -> Tensor:
    key = buffer.load(key, scale, hidden, 0.0)
    weights = _features(key, buffer, feature_map)
    return weights.masked_fill_(hidden, 0.0) if hidden.shape[2] else weights


def _query_features(query: Tensor, buffer: Buffer, feature_map: str, scale: float) -> Tensor:
    query = buffer.load(query, scale)
    if feature_map == "softmax":
        return torch.softmax(query, dim=2, out=buffer.fit(query))
    return _features(query, buffer, feature_map)


def _features(block: Tensor, buffer: Buffer, feature_map: str) -> Tensor:
    if feature_map == "relu":
        return torch.clamp(block, min=0.0, out=buffer.fit(block))
    positive = block.relu()
    return torch.clamp(block, max=0.0, out=buffer.fit(block)).exp_().add_(positive)


def _times_slope(gradient: Tensor, weights: Tensor, feature_map: str, scale: float) -> None:
    """Multiply by d phi(scale x) / dx, which the weights tell: relu has 1 above 0, elu + 1 has min(phi, 1)."""
    if feature_map == "relu":
        gradient.masked_fill_(weights <= 0, 0.0)
    else:
        gradient.mul_(weights.clamp(max=1.0))
    if scale != 1.0:
        gradient.mul_(scale)


def _inverse(weights: Tensor, total: Tensor, feature_map: str) -> Tensor | None:
    """1 / (weights . total), and 0 where that is not a normal number: (R, n, 1); None is the 1 that softmax has."""
    if feature_map == "softmax":
        return None
    denominator = torch.bmm(weights, total[:, :, None], out=weights.new_empty((*weights.shape[:2], 1)))  # (R, n, 1)
    return denominator.reciprocal().masked_fill_(denominator < torch.finfo(denominator.dtype).tiny, 0.0)


def _times_gate(inverse: Tensor | None, gate: Tensor) -> Tensor | None:
    """What the products are multiplied with: (R, n, 1), or None for 1."""
    if not gate.shape[1]:
        return inverse
    return gate if inverse is None else inverse * gate


def _gates(gate: Tensor | None, query: Tensor) -> Tensor:
    """(B, H, N, 1), or (B, H, 0, 1) without a gate."""
    return query.new_empty((*query.shape[:2], 0, 1)) if gate is None else gate[..., None]
