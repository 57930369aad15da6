"""Linear attention by few operations on whole tensors that keep their weights for the backward pass.

Where autograd would keep as much, the formulas of `streaming.py` need fewer passes over it. Results are differentiable
to any order: weights are results as well, so that the formulas, written in differentiable operations of them, are
differentiated again.

Letters in comments: B batch, H heads, N query positions, M key positions, K key channels, V value channels.
"""

# pyright: reportIncompatibleMethodOverride=false
# (Functions have arguments of their own)

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.layout import positions_are_adjacent, product
from lineara.ops.linear.reference import count_positions, finite_shift, position_maximum, quotient
from lineara.ops.packed import Positions, Row, by_sequence, stacked
from lineara.ops.precision import times_scale, widened, without_autocast
from lineara.ops.tracing import may_overwrite

FUSES_MEANS = False


def summarize(
    key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, name: str, scale: float
) -> Summary:
    """As `reference.summarize`."""
    if cu_seqlens is not None:
        tensors = Positions(key), Positions(value), Positions(key_mask)
        return stacked(by_sequence(summarize, cu_seqlens, *tensors, None, name, scale))
    maximum, total, weighted_sum, _ = _Summarize.apply(key, value, key_mask, name, scale)
    return maximum, total, weighted_sum


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
    if cu_seqlens is not None:
        tensors = Positions(query), Row(total), Row(weighted_sum), Positions(gate)
        return torch.cat(by_sequence(attend, cu_seqlens, *tensors, None, name, scale), dim=2)
    return _Attend.apply(query, total, weighted_sum, gate, name, scale)[0]


class _Summarize(Function):
    """Maximum, total, weighted sum, and weights P = phi(K): dV = P dS and dK = phi'(K) * (V dS^T + ds + dP)."""

    @staticmethod
    def forward(
        ctx: Any, key: Tensor, value: Tensor, key_mask: Tensor | None, name: str, scale: float
    ) -> tuple[Tensor, ...]:
        phi = feature_map(name)
        hidden = None if key_mask is None else ~key_mask[:, None, :, None]  # (B, 1, M, 1)
        scaled, wide = times_scale(key, scale), widened(value)
        if phi.has_maximum:
            if hidden is not None:
                scaled = scaled.masked_fill(hidden, -torch.inf)
            maximum = position_maximum(scaled)  # (B, H, K)
            shift = finite_shift(maximum)[:, :, None]
            if may_overwrite(scaled):
                # (In order: products copy what lies otherwise.)
                own = None if positions_are_adjacent(scaled) else scaled.new_empty(scaled.shape)
                weights = torch.sub(scaled, shift, out=own).exp_()  # (B, H, M, K)
            else:
                weights = (scaled - shift).exp()
        else:
            weights = phi.of(scaled)
            maximum = weights.new_zeros((*key.shape[:2], key.shape[3]))
            if hidden is not None:
                weights = weights.masked_fill(hidden, 0.0)
        weighted_sum = weights.mT @ wide  # (B, H, K, V)
        # Hidden weights are 0, so that hidden values count only where they are not finite.
        ctx.hides_values = hidden is not None and not weighted_sum.isfinite().all()
        if hidden is not None and ctx.hides_values:
            weighted_sum = weights.mT @ wide.masked_fill(hidden, 0.0)
        total = count_positions(key, key_mask) if phi.counts_positions else weights.sum(dim=2)
        ctx.name, ctx.scale, ctx.dtype = name, scale, key.dtype
        ctx.save_for_backward(value, key_mask, weights)
        ctx.mark_non_differentiable(maximum)
        ctx.set_materialize_grads(False)
        return maximum, total, weighted_sum, weights

    @staticmethod
    def backward(ctx: Any, _: Any, grad_total: Any, grad_sum: Any, grad_weights: Any) -> tuple[Any, ...]:
        saved: tuple[Any, ...] = ctx.saved_tensors
        value, key_mask, weights = saved
        phi = feature_map(ctx.name)
        hidden: Any = None if key_mask is None else ~key_mask[:, None, :, None]
        grad_key = grad_value = None
        with without_autocast(value):
            if grad_sum is not None and ctx.needs_input_grad[1]:
                grad_value = product(weights, grad_sum)
            if ctx.needs_input_grad[0]:
                wide = widened(value)
                if ctx.hides_values:
                    wide = wide.masked_fill(hidden, 0.0)
                grad_key = torch.zeros_like(weights) if grad_sum is None else product(wide, grad_sum.mT)
                if grad_total is not None and not phi.counts_positions:
                    grad_key = torch.add(grad_key, grad_total[:, :, None], out=_in_place(grad_key, grad_total))
                if grad_weights is not None:
                    grad_key = torch.add(grad_key, grad_weights, out=_in_place(grad_key, grad_weights))
                grad_key = phi.times_slope(grad_key, weights)
                if ctx.scale != 1.0:
                    grad_key.mul_(ctx.scale)
            if hidden is not None:
                # (0 times a sum that is not finite is not 0; and maps without a maximum have slopes where hidden.)
                grad_key, grad_value = (
                    grad if grad is None else grad.masked_fill_(hidden, 0.0) for grad in (grad_key, grad_value)
                )
        grads = (grad if grad is None else grad.to(ctx.dtype) for grad in (grad_key, grad_value))
        return *grads, None, None, None


class _Attend(Function):
    """gate * phi(Q) C or gate * phi(Q) S / (phi(Q) . s), and weights P = phi(Q); gradients as in `streaming.py`."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        total: Tensor,
        weighted_sum: Tensor,
        gate: Tensor | None,
        name: str,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        phi = feature_map(name)
        weights = phi.of(times_scale(query, scale))  # (B, H, N, K)
        output = product(weights, quotient(weighted_sum, total) if phi.divides_context else weighted_sum)
        factor = _times_gate(None if phi.divides_context else _inverse(weights, total), gate)
        if factor is not None:
            output = torch.mul(output, factor, out=_in_place(output))
        ctx.name, ctx.scale, ctx.dtype = name, scale, query.dtype
        ctx.save_for_backward(total, weighted_sum, gate, weights)
        ctx.set_materialize_grads(False)
        return output.to(query.dtype), weights

    @staticmethod
    def backward(ctx: Any, grad_output: Any, grad_weights: Any) -> tuple[Any, ...]:
        saved: tuple[Any, ...] = ctx.saved_tensors
        total, weighted_sum, gate, weights = saved
        phi = feature_map(ctx.name)
        share: Any = None
        grad_query: Any = None
        grad_total = grad_sum = grad_gate = None
        with without_autocast(weights):
            if grad_output is not None:
                grad_output = widened(grad_output)
                context = quotient(weighted_sum, total) if phi.divides_context else weighted_sum
                inverse = None if phi.divides_context else _inverse(weights, total)
                factor: Any = _times_gate(inverse, gate)
                grad_query = product(grad_output, context.mT)  # (B, H, N, K)
                if gate is not None or inverse is not None:
                    share = (grad_query * weights).sum(dim=3, keepdim=True)  # (B, H, N, 1)
                    share = share if inverse is None else share * inverse
                weighted = weights if factor is None else weights * factor
                grad_sum = weighted.mT @ grad_output  # (B, H, K, V)
                if gate is not None:
                    grad_gate = share[..., 0].to(gate.dtype)
                if factor is not None:
                    grad_query = torch.mul(grad_query, factor, out=_in_place(grad_query))
                if phi.divides_context:
                    grad_sum = quotient(grad_sum, total)
                    grad_total = (context * grad_sum).sum(dim=3).neg_()
                else:
                    apart, own = factor * share, _in_place(grad_query)  # (B, H, N, 1)
                    grad_query = torch.addcmul(grad_query, apart, total[:, :, None], value=-1.0, out=own)
                    grad_total = (weighted.mT @ share)[..., 0].neg_()
            if grad_weights is not None:
                grad_query = grad_weights.clone() if grad_query is None else grad_query + grad_weights
            if grad_query is not None and ctx.needs_input_grad[0]:
                if phi.has_maximum:
                    share = (grad_query * weights).sum(dim=3, keepdim=True)
                    grad_query = torch.sub(grad_query, share, out=_in_place(grad_query))
                grad_query = phi.times_slope(grad_query, weights)
                if ctx.scale != 1.0:
                    grad_query.mul_(ctx.scale)
                grad_query = grad_query.to(ctx.dtype)
        return grad_query, grad_total, grad_sum, grad_gate, None, None


def _inverse(weights: Tensor, total: Tensor) -> Tensor:
    """1 / (P . s), and 0 where P . s is not a normal number: (B, H, N, 1)."""
    denominator = weights @ total[..., None]
    return denominator.masked_fill(denominator < torch.finfo(denominator.dtype).tiny, torch.inf).reciprocal()


def _times_gate(inverse: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """What products are multiplied by, (B, H, N, 1); None for 1."""
    if gate is None:
        return inverse
    return gate[..., None] if inverse is None else inverse * gate[..., None]


def _in_place(tensor: Tensor, *others: Tensor) -> Tensor | None:
    """Where to write what is made of the tensor and others: into it, or, for None, into a new one."""
    return tensor if may_overwrite(tensor, *others) else None
