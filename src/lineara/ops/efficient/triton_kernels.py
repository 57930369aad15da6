"""Efficient attention on the GPU: the passes of `streaming`, as kernels."""

from torch import Tensor

from lineara.ops import triton_kernels as kernels
from lineara.ops.efficient.streaming import context_backward

__all__ = ["attend", "attend_backward", "context_backward", "summarize", "summarize_backward"]

_FEATURE_MAPS = {"softmax": "softmax", "scaling": "identity"}


def summarize(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.summarize(key, value, key_mask, _FEATURE_MAPS[normalization], scale, cu_seqlens)


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
    return kernels.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, maximum, _FEATURE_MAPS[normalization], scale, cu_seqlens
    )


def attend(
    query: Tensor, context: Tensor, normalization: str, scale: float, cu_seqlens: Tensor | None = None
) -> Tensor:
    return kernels.attend(query, None, context, None, _FEATURE_MAPS[normalization], scale, cu_seqlens)


def attend_backward(
    grad_output: Tensor,
    query: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    grad_query, _, grad_context, _ = kernels.attend_backward(
        grad_output, query, None, context, None, _FEATURE_MAPS[normalization], scale, cu_seqlens
    )
    return grad_query, grad_context
