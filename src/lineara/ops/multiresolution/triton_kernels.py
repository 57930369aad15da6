"""Multiresolution attention on the GPU: means over windows of a sequence inside the kernels, the rest as streaming."""

import torch
from torch import Tensor

from lineara.ops import triton_kernels as kernels
from lineara.ops.multiresolution import streaming
from lineara.ops.multiresolution.streaming import Compression, groups


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    compression: Compression,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _fused(compression):
        return streaming.summarize(
            key, value, key_mask, key_weight, value_weight, compression, feature_map, scale, "triton"
        )
    parts = [
        kernels.summarize(key[:, heads], value[:, heads], key_mask, feature_map, scale, window=resolution)
        for heads, resolution in groups(compression.resolutions)
    ]
    maximum, total, weighted_sum = (torch.cat(tensors, dim=1) for tensors in zip(*parts))
    return maximum, total, weighted_sum


def summarize_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    maximum: Tensor,
    compression: Compression,
    feature_map: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    inputs = (grad_total, grad_weighted_sum, key, value, key_mask)
    if not _fused(compression):
        return streaming.summarize_backward(
            *inputs, key_weight, value_weight, maximum, compression, feature_map, scale, "triton"
        )
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    for heads, resolution in groups(compression.resolutions):
        kernels.summarize_backward(
            grad_total[:, heads],
            grad_weighted_sum[:, heads],
            key[:, heads],
            value[:, heads],
            key_mask,
            maximum[:, heads],
            feature_map,
            scale,
            window=resolution,
            into=(grad_key[:, heads], grad_value[:, heads]),
        )
    return grad_key, grad_value, None, None


def _fused(compression: Compression) -> bool:
    return compression.kind == "mean" and len(compression.key_shape) == 1
