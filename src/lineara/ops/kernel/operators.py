"""Kernel attention in passes (`streaming`, `triton`) as an operator of torch.library, with gradients of any order."""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lineara.ops.blocks import empty_like_query
from lineara.ops.differentiation import reference_gradients
from lineara.ops.dispatch import passes
from lineara.ops.flops import count_products
from lineara.ops.kernel import reference
from lineara.ops.packed import in_sequences
from lineara.ops.precision import accumulation_dtype, register_autocast
from lineara.ops.sequence_parallel import sums_over_group


@custom_op("lineara::kernel_attention", mutates_args=())
def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    feature_map: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs beside the inputs: total and weighted sum."""
    run = passes("kernel", impl)
    total, weighted_sum = run.summarize(key, value, key_mask, feature_map, scale, cu_seqlens_key)
    if group_name:
        total, weighted_sum = sums_over_group(total, weighted_sum, group_name)
    output = run.attend(query, total, weighted_sum, None, feature_map, scale, cu_seqlens_query)
    return output, total, weighted_sum


@custom_op("lineara::kernel_attention_backward", mutates_args=())
def kernel_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    total: Tensor,
    weighted_sum: Tensor,
    feature_map: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = passes("kernel", impl)
    grad_query, grad_total, grad_weighted_sum, _ = run.attend_backward(
        grad_output, query, total, weighted_sum, None, feature_map, scale, cu_seqlens_query
    )
    if group_name:
        grad_total, grad_weighted_sum = sums_over_group(grad_total, grad_weighted_sum, group_name)
    grad_key, grad_value = run.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, feature_map, scale, cu_seqlens_key
    )
    return grad_query, grad_key, grad_value


@kernel_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    *_: Any,
):
    shape = (in_sequences(key, cu_seqlens_key), key.shape[1], key.shape[3])
    total = key.new_empty(shape, dtype=accumulation_dtype(key.dtype))
    return empty_like_query(query, value.shape[3]), total, total.new_empty((*shape, value.shape[3]))


@kernel_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: None):
    if grad_output is None:
        return (None,) * 10
    *tensors, total, weighted_sum = ctx.saved_tensors
    if torch.is_grad_enabled():
        feature_map, scale, group_name, _ = ctx.options

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
            options = {"feature_map": feature_map, "scale": scale, "group_name": group_name}
            return [reference.kernel_attention(query, key, value, *tensors[3:], **options)]

        gradients = reference_gradients(forward, tensors[:3], [grad_output])
    else:
        gradients = kernel_attention_backward(grad_output, *tensors, total, weighted_sum, *ctx.options)
    return *gradients, *((None,) * 7)


kernel_attention.register_autograd(_gradients, setup_context=_save)
register_autocast("kernel_attention", kernel_attention, 3)

count_products("kernel_attention", 1, positions_of=(0, 1), key=1, value=2)
count_products("kernel_attention_backward", 2, positions_of=(1, 2), key=2, value=3)
