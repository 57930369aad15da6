"""Linear attention block by block: the reference's mathematics with nothing as long as the sequence kept beside it.

A block of positions is converted, mapped and multiplied while it is in the processor's cache, in buffers that are
allocated once; a running maximum per key channel makes the position softmax exact over any number of blocks. The
backward passes recompute the weights from the inputs instead of saving them.

Letters in comments: B batch, H heads, R rows of a block (some of the B * H), n positions of a block, N query positions,
M key positions, K key channels, V value channels.
"""

import torch
from torch import Tensor

from lineara.ops.linear.blocks import Buffer, any_hidden, empty_like_query, hidden_positions, row_blocks
from lineara.ops.linear.feature_maps import Map, Summary, feature_map
from lineara.ops.linear.layout import product
from lineara.ops.linear.reference import count_positions, finite_shift, quotient
from lineara.ops.packed import Positions, Row, by_sequence, joined, stacked
from lineara.ops.precision import accumulation_dtype

FUSES_MEANS = False


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
    *,
    may_hold_anything: bool = False,
) -> Summary:
    """As `reference.summarize`; values that are masked have been replaced where they `may_hold_anything`."""
    if cu_seqlens is not None:
        tensors = Positions(key), Positions(value), Positions(key_mask)
        return stacked(by_sequence(summarize, cu_seqlens, *tensors, None, name, scale))
    phi = feature_map(name)
    shape = (key.shape[0], key.shape[1], key.shape[3])
    maximum = key.new_full(shape, -torch.inf if phi.has_maximum else 0.0, dtype=accumulation_dtype(key.dtype))
    total = count_positions(key, key_mask) if phi.counts_positions else torch.zeros_like(maximum)
    make = maximum.new_empty if key.shape[2] else maximum.new_zeros
    weighted_sum = make((*shape, value.shape[3]))
    hidden = hidden_positions(key_mask, key)
    key_buffer, value_buffer = Buffer(key), Buffer(value)

    for (m, s, S), blocks in row_blocks((key, value, hidden), (maximum, total, weighted_sum)):
        for i, (k, v, hide) in enumerate(blocks):
            hide = any_hidden(hide)
            k = key_buffer.load(k, scale, hide if phi.has_maximum else None, -torch.inf)  # (R, n, K)
            v = value_buffer.load(v, 1.0)  # (R, n, V)
            if phi.has_maximum:
                new_maximum = torch.maximum(m, k.amax(dim=1))  # (R, K)
                shift = finite_shift(new_maximum)
                weights = torch.sub(k, shift[:, None], out=key_buffer.fit(k)).exp_()
                if i:
                    kept = (m - shift).exp_()
                    s.mul_(kept)
                    S.mul_(kept[:, :, None])
                m.copy_(new_maximum)
            else:
                weights = _weights(k, key_buffer, hide, phi)
            if not phi.counts_positions:
                s.add_(weights.sum(dim=1))
            _add_product(S, weights.mT, v, first=i == 0)
    if key_mask is not None and not may_hold_anything and not weighted_sum.isfinite().all():
        # Hidden weights are 0, but 0 times a value that is not finite is not.
        value = value.masked_fill(hidden[:, :1], 0.0)
        return summarize(key, value, key_mask, None, name, scale, may_hold_anything=True)
    return maximum, total, weighted_sum


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
) -> tuple[Tensor, Tensor]:
    """Gradients of key and value: with P = phi(K), dV = P dS and dK = phi'(K) * (V dS^T + ds).

    Under softmax P = exp(K - m), which is its own slope. A total that counts positions has no gradient.
    """
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    if cu_seqlens is not None:
        sums = Row(grad_total), Row(grad_weighted_sum)
        inputs = Positions(key), Positions(value), Positions(key_mask), None, Row(maximum)
        joined(by_sequence(summarize_backward, cu_seqlens, *sums, *inputs, name, scale), grad_key, grad_value)
        return grad_key, grad_value
    phi = feature_map(name)
    hidden = hidden_positions(key_mask, key)
    sums = finite_shift(maximum), grad_total.contiguous(), grad_weighted_sum.contiguous()
    key_buffer, value_buffer = Buffer(key), Buffer(value)
    grad_key_buffer, grad_value_buffer = Buffer(key), Buffer(value)

    for (m, ds, dS), blocks in row_blocks((key, value, grad_key, grad_value, hidden), sums):
        for k, v, dk, dv, hide in blocks:
            hide = any_hidden(hide)
            k = key_buffer.load(k, scale)  # (R, n, K)
            v = value_buffer.load(v, 1.0)  # (R, n, V)
            if phi.has_maximum:
                weights = torch.sub(k, m[:, None], out=key_buffer.fit(k)).exp_()
            else:
                weights = phi.of_block(k, key_buffer.fit(k))
            with grad_value_buffer.storing(dv) as grad:
                product(weights, dS, grad)
                if hide is not None:
                    grad.masked_fill_(hide, 0.0)
            with grad_key_buffer.storing(dk) as grad:
                product(v, dS.mT, grad)
                if not phi.counts_positions:
                    grad.add_(ds[:, None])
                phi.times_slope(grad, weights)
                if scale != 1.0:
                    grad.mul_(scale)
                if hide is not None:
                    grad.masked_fill_(hide, 0.0)
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
    """As `reference.attend`."""
    output = empty_like_query(query, weighted_sum.shape[3])
    if cu_seqlens is not None:
        tensors = Positions(query), Row(total), Row(weighted_sum), Positions(gate)
        parts = by_sequence(attend, cu_seqlens, *tensors, None, name, scale)
        return joined([(part,) for part in parts], output)[0]
    phi = feature_map(name)
    query_buffer, output_buffer = Buffer(query), Buffer(output)
    sums = total.contiguous(), weighted_sum.contiguous()
    for (z, S), blocks in row_blocks((query, output, _gates(gate, query)), sums):
        C = quotient(S, z) if phi.divides_context else S  # (R, K, V)
        for q, o, g in blocks:
            weights = _query_weights(q, query_buffer, scale, phi)  # (R, n, K)
            factor = _times_gate(_inverse(weights, z, phi), g)
            with output_buffer.storing(o) as answers:
                product(weights, C, answers)
                if factor is not None:
                    answers.mul_(factor)
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
    """Gradients of query, total, weighted sum and gate.

    With P = phi(Q), i = 1 / (P . z), T = dO C^T and the output's share r = rowsum(P * T) i: dgate = r,
    dC = P^T (g i dO), dz = -P^T (g i r) and dP = g i (T - r z). A divided context has i = 1 and z = 0, and
    dS = dC / s, ds = -rowsum(C * dS); under softmax over channels dQ = P * g (T - r).
    """
    if cu_seqlens is not None:
        tensors = (Positions(grad_output), Positions(query), Row(total), Row(weighted_sum), Positions(gate), None)
        parts = by_sequence(attend_backward, cu_seqlens, *tensors, name, scale)
        grad_total, grad_weighted_sum = stacked([part[1:3] for part in parts])
        grad_gate = None if gate is None else torch.cat([part[3] for part in parts], dim=2)
        (grad_query,) = joined([part[:1] for part in parts], torch.empty_like(query))
        return grad_query, grad_total, grad_weighted_sum, grad_gate
    phi = feature_map(name)
    sums = total.contiguous(), weighted_sum.contiguous()
    grad_query = torch.empty_like(query)
    grad_total, grad_sum = (torch.zeros_like(tensor) for tensor in sums)
    gates = _gates(gate, query)
    grad_gates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    query_buffer, output_buffer, grad_query_buffer = Buffer(query), Buffer(grad_output), Buffer(query)
    long = query, grad_output, grad_query, gates, grad_gates
    for (z, S, dz, dS), blocks in row_blocks(long, (*sums, grad_total, grad_sum)):
        C = quotient(S, z) if phi.divides_context else S  # (R, K, V)
        for i, (q, do, dq, g, dg) in enumerate(blocks):
            weights = _query_weights(q, query_buffer, scale, phi)  # (R, n, K)
            do = output_buffer.load(do, 1.0)  # (R, n, V)
            inverse = _inverse(weights, z, phi)
            factor = _times_gate(inverse, g)  # (R, n, 1)
            weighted = weights if factor is None else weights * factor  # (R, n, K)
            _add_product(dS, weighted.mT, do, first=i == 0)
            with grad_query_buffer.storing(dq) as grad:
                product(do, C.mT, grad)  # (R, n, K)
                if phi.has_maximum:
                    share = grad.mul_(weights).sum(dim=2, keepdim=True)  # (R, n, 1)
                    grad.addcmul_(weights, share, value=-1.0)
                else:
                    share = (grad * weights).sum(dim=2, keepdim=True)
                    if inverse is not None:
                        share.mul_(inverse)
                        dz[:, :, None].baddbmm_(weighted.mT, share, alpha=-1.0)
                        grad.sub_(share * z[:, None])
                    phi.times_slope(grad, weights)
                if factor is not None:
                    grad.mul_(factor)
                if scale != 1.0:
                    grad.mul_(scale)
            if gate is not None:
                dg.copy_(share.view(dg.shape))
        if phi.divides_context:
            # Dividing here keeps exp(K - m) within [0, 1] in the long pass that follows, which stays exact where
            # exp(K - log s - m) would cancel large numbers.
            dS.copy_(quotient(dS, z))
            torch.sum(C * dS, dim=2, out=dz).neg_()
    return grad_query, grad_total, grad_sum, None if gate is None else grad_gates[..., 0]


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add left @ right, to nothing where it is the first."""
    if first:
        torch.bmm(left, right, out=total)
    else:
        total.baddbmm_(left, right)


def _query_weights(query: Tensor, buffer: Buffer, scale: float, phi: Map) -> Tensor:
    loaded = buffer.load(query, scale)
    return phi.of_block(loaded, buffer.fit(loaded))


def _weights(key: Tensor, buffer: Buffer, hidden: Tensor | None, phi: Map) -> Tensor:
    weights = phi.of_block(key, buffer.fit(key))
    return weights if hidden is None else weights.masked_fill(hidden, 0.0)


def _inverse(weights: Tensor, total: Tensor, phi: Map) -> Tensor | None:
    """1 / (weights . total), and 0 where that is not a normal number: (R, n, 1); None for a divided context."""
    if phi.divides_context:
        return None
    denominator = torch.bmm(weights, total[:, :, None], out=weights.new_empty((*weights.shape[:2], 1)))  # (R, n, 1)
    return denominator.reciprocal().masked_fill_(denominator < torch.finfo(denominator.dtype).tiny, 0.0)


def _times_gate(inverse: Tensor | None, gate: Tensor) -> Tensor | None:
    """What the products are multiplied with: (R, n, 1), or None for 1."""
    if not gate.shape[2]:
        return inverse
    gate = gate.reshape(-1, *gate.shape[2:])
    return gate if inverse is None else inverse * gate


def _gates(gate: Tensor | None, query: Tensor) -> Tensor:
    """(B, H, N, 1), or (B, H, 0, 1) without a gate."""
    return query.new_empty((*query.shape[:2], 0, 1)) if gate is None else gate[..., None]
