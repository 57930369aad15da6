"""Efficient attention in plain PyTorch: the definition of what is right, on any device.

Letters in comments: B batch, H heads, N query positions, M key positions, K key channels, V value channels.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lineara.ops.packed import Positions, Row, by_sequence, stacked
from lineara.ops.precision import accumulation_dtype
from lineara.ops.sequence_parallel import context_over_group, maximum_over_group, sums_over_group


class ContextSummary(NamedTuple):
    """What efficient attention keeps of a set of keys and values; `merge_contexts` joins two of them exactly.

    `maximum` (m), `total` (s) and `weighted_sum` (S) hold, for every key channel k and value channel v,

        m_k = max_i scale key_ik,   s_k = sum_i exp(scale key_ik - m_k),   S_kv = sum_i exp(scale key_ik - m_k) value_iv

    under softmax normalisation, and m_k = 0, s_k = number of valid positions, S_kv = sum_i scale key_ik value_iv under
    scaling. The context matrix is S / s either way. An empty set has m = -inf (softmax), s = 0 and S = 0. They are
    float64 for float64 inputs and float32 otherwise. The maximum is a shift that cancels in S / s: no gradient flows
    through it.
    """

    maximum: Tensor  # (batch, heads, key channels)
    total: Tensor  # (batch, heads, key channels)
    weighted_sum: Tensor  # (batch, heads, key channels, value channels)
    normalization: str
    scale: float


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    *,
    normalization: str,
    scale: float,
    group_name: str = "",
) -> Tensor:
    if group_name:
        summary = summarize_context(key, value, key_mask, cu_seqlens_key, normalization=normalization, scale=scale)
        context = context_over_ranks(summary, group_name)[2]
    else:
        context = context_of(key, value, normalization, scale, key_mask, cu_seqlens_key)
    return apply_context(query, context, normalization, scale, cu_seqlens_query)


def summarize_context(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    *,
    normalization: str,
    scale: float,
) -> ContextSummary:
    if cu_seqlens is not None:
        summarize = partial(summarize_context, normalization=normalization, scale=scale)
        parts = by_sequence(summarize, cu_seqlens, Positions(key), Positions(value), Positions(key_mask))
        maximum, total, weighted_sum = stacked([part[:3] for part in parts])
        return ContextSummary(maximum, total, weighted_sum, normalization, scale)
    num_valid = count_positions(key, key_mask)  # (B, H, K)
    fill = -torch.inf if normalization == "softmax" else 0.0
    key, value = prepare(key, value, scale, key_mask, fill)  # (B, H, M, K), (B, H, M, V)
    if normalization == "scaling":
        return ContextSummary(torch.zeros_like(num_valid), num_valid, key.mT @ value, normalization, scale)
    maximum = position_maximum(key).detach()  # (B, H, K)
    exponential = (key - finite_shift(maximum)[:, :, None, :]).exp()  # (B, H, M, K)
    total = exponential.sum(dim=2)  # (B, H, K)
    return ContextSummary(maximum, total, exponential.mT @ value, normalization, scale)


def merge_contexts(first: ContextSummary, second: ContextSummary) -> ContextSummary:
    maximum = torch.maximum(first.maximum, second.maximum)
    shift = finite_shift(maximum)
    first_factor = (first.maximum - shift).exp()
    second_factor = (second.maximum - shift).exp()
    return ContextSummary(
        maximum,
        first.total * first_factor + second.total * second_factor,
        first.weighted_sum * first_factor[..., None] + second.weighted_sum * second_factor[..., None],
        first.normalization,
        first.scale,
    )


def merge_over_group(summary: ContextSummary, group_name: str) -> ContextSummary:
    """The summary of the positions of all ranks: one message of maxima under softmax, and one of sums."""
    summary = _of_common_maximum(summary, group_name)
    total, weighted_sum = sums_over_group(summary.total, summary.weighted_sum, group_name)
    return summary._replace(total=total, weighted_sum=weighted_sum)


def context_over_ranks(summary: ContextSummary, group_name: str) -> tuple[Tensor, Tensor, Tensor]:
    """m and s of the positions of all ranks, both (B, H, K), and S / s, (B, H, K, V); with "" those of this rank."""
    if not group_name:
        return summary.maximum, summary.total, context_matrix(summary)
    summary = _of_common_maximum(summary, group_name)
    context, total = context_over_group(summary.total, summary.weighted_sum, group_name)
    return summary.maximum, total, context


def attend_context(query: Tensor, summary: ContextSummary, cu_seqlens: Tensor | None = None) -> Tensor:
    return apply_context(query, context_matrix(summary), summary.normalization, summary.scale, cu_seqlens)


def _of_common_maximum(summary: ContextSummary, group_name: str) -> ContextSummary:
    """The same sums relative to the largest maximum of all ranks."""
    if summary.normalization == "scaling":
        return summary
    maximum = maximum_over_group(summary.maximum.detach(), group_name)
    factor = (summary.maximum - finite_shift(maximum)).exp()
    return summary._replace(
        maximum=maximum, total=summary.total * factor, weighted_sum=summary.weighted_sum * factor[..., None]
    )


def apply_context(
    query: Tensor, context: Tensor, normalization: str, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    if cu_seqlens is not None:
        parts = by_sequence(apply_context, cu_seqlens, Positions(query), Row(context), normalization, scale)
        return torch.cat(parts, dim=2)
    scaled = times_scale(query, scale)  # (B, H, N, K)
    weights = scaled.softmax(dim=3) if normalization == "softmax" else scaled
    return (weights @ context).to(query.dtype)  # (B, H, N, V)


def context_matrix(summary: ContextSummary) -> Tensor:
    """S / s, and zeros where no position was valid: (B, H, K, V)."""
    divisor = torch.where(summary.total > 0, summary.total, 1.0)
    return summary.weighted_sum / divisor[..., None]


def count_positions(key: Tensor, key_mask: Tensor | None) -> Tensor:
    """The number of valid positions, once for every key channel: (B, H, K)."""
    shape = (key.shape[0], key.shape[1], key.shape[3])
    wide = accumulation_dtype(key.dtype)
    if key_mask is None:
        return key.new_full(shape, float(key.shape[2]), dtype=wide)
    return key_mask.sum(dim=1).to(wide)[:, None, None].repeat(1, *shape[1:])


def position_maximum(key: Tensor) -> Tensor:
    """The maximum over positions, -inf where there are none: (B, H, K)."""
    if key.shape[2] == 0:
        return key.new_full((key.shape[0], key.shape[1], key.shape[3]), -torch.inf)
    return key.amax(dim=2)


def finite_shift(maximum: Tensor) -> Tensor:
    """0 in place of the -inf that marks a channel without positions, so that -inf - (-inf) never arises."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def context_of(
    key: Tensor,
    value: Tensor,
    normalization: str,
    scale: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """rho_k(K)^T V: (B, H, K, V). (A function, so that its long tensors are gone when the queries' turn comes.)"""
    if cu_seqlens is not None:
        tensors = (Positions(key), Positions(value))
        return torch.cat(by_sequence(context_of, cu_seqlens, *tensors, normalization, scale, Positions(key_mask)))
    softmax = normalization == "softmax"
    # The lowest number, not -inf, so that the softmax of an item without valid positions is not NaN.
    fill = torch.finfo(accumulation_dtype(key.dtype)).min if softmax else 0.0
    key, value = prepare(key, value, scale, key_mask, fill)  # (B, H, M, K), (B, H, M, V)
    if not softmax:
        num_valid = count_positions(key, key_mask).clamp_min(1.0)  # (B, H, K)
        return key.mT @ value / num_valid[..., None]
    weights = key.softmax(dim=2)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, :, None], 0.0)
    return weights.mT @ value


def prepare(key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None, fill: float) -> tuple[Tensor, Tensor]:
    """Key (scaled) and value in the dtype of sums; `fill` and 0 in place of what masked positions hold."""
    key, value = times_scale(key, scale), value.to(accumulation_dtype(value.dtype))
    if key_mask is None:
        return key, value
    hidden = ~key_mask[:, None, :, None]  # (B, 1, M, 1)
    # A weight of 0 is not enough: a masked position may hold NaN, and 0 * NaN is NaN.
    return key.masked_fill(hidden, fill), value.masked_fill(hidden, 0.0)


def times_scale(tensor: Tensor, scale: float) -> Tensor:
    tensor = tensor.to(accumulation_dtype(tensor.dtype))
    return tensor if scale == 1.0 else tensor * scale
