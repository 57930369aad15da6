"""Kernel attention on the GPU: the passes of `streaming`, as kernels."""

from torch import Tensor

from lineara.ops import triton_kernels as kernels
from lineara.ops.triton_kernels import attend, attend_backward

__all__ = ["attend", "attend_backward", "summarize", "summarize_backward"]


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return kernels.summarize(key, value, key_mask, feature_map, scale, cu_seqlens)[1:]


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
    no_maximum = grad_total
    return kernels.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, no_maximum, feature_map, scale, cu_seqlens
    )
