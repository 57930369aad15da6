"""Kernel attention in plain PyTorch: the definition of what is right, on any device.

Letters in comments: B batch, H heads, N query positions, M key positions, K key channels, V value channels.
"""

import torch
from torch import Tensor

from lineara.ops.efficient.reference import prepare, times_scale
from lineara.ops.packed import Positions, Row, by_sequence, stacked
from lineara.ops.sequence_parallel import sums_over_group


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    *,
    feature_map: str,
    scale: float,
    group_name: str = "",
) -> Tensor:
    total, weighted_sum = summarize(key, value, feature_map, scale, key_mask, cu_seqlens_key)
    if group_name:
        total, weighted_sum = sums_over_group(total, weighted_sum, group_name)
    return apply(query, total, weighted_sum, feature_map, scale, cu_seqlens_query)


def summarize(
    key: Tensor,
    value: Tensor,
    feature_map: str,
    scale: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The sums over positions of phi(key), (B, H, K), and of phi(key)^T value, (B, H, K, V)."""
    if cu_seqlens is not None:
        tensors = (Positions(key), Positions(value))
        parts = by_sequence(summarize, cu_seqlens, *tensors, feature_map, scale, Positions(key_mask))
        total, weighted_sum = stacked(parts)
        return total, weighted_sum
    key, value = prepare(key, value, scale, key_mask, 0.0)  # (B, H, M, K), (B, H, M, V)
    weights = features(key, feature_map)
    if key_mask is not None:
        weights = weights.masked_fill(~key_mask[:, None, :, None], 0.0)
    return weights.sum(dim=2), weights.mT @ value


def apply(
    query: Tensor,
    total: Tensor,
    weighted_sum: Tensor,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    if cu_seqlens is not None:
        sums = (Row(total), Row(weighted_sum))
        return torch.cat(by_sequence(apply, cu_seqlens, Positions(query), *sums, feature_map, scale), dim=2)
    weights = features(times_scale(query, scale), feature_map)  # (B, H, N, K)
    denominator = weights @ total[..., None]  # (B, H, N, 1)
    defined = denominator >= torch.finfo(denominator.dtype).tiny
    # (A division, because the gradient of a reciprocal squares it, which overflows early.)
    output = weights @ weighted_sum / torch.where(defined, denominator, 1.0) * defined  # (B, H, N, V)
    return output.to(query.dtype)


def features(tensor: Tensor, feature_map: str) -> Tensor:
    """relu(x), or elu(x) + 1, which is written such that it keeps its digits where it is small."""
    if feature_map == "relu":
        return tensor.relu()
    return tensor.clamp_max(0.0).exp() + tensor.relu()
