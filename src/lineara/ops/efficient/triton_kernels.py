"""Efficient attention on the GPU: the passes of `streaming`, as kernels."""

from torch import Tensor

from lineara.ops import triton_kernels as kernels

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


def context_of(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.summarize(key, value, key_mask, _FEATURE_MAPS[normalization], scale, cu_seqlens, divide=True)


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


def attend_backward_to_sums(
    grad_output: Tensor,
    query: Tensor,
    total: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.attend_backward(
        grad_output, query, None, context, None, _FEATURE_MAPS[normalization], scale, cu_seqlens, divided_by=total
    )[:3]
