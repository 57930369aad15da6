"""The streaming implementation of kernel attention as an operator of torch.library, with gradients of any order."""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lineara.ops.differentiation import reference_gradients
from lineara.ops.kernel import reference, streaming
from lineara.ops.precision import accumulation_dtype
from lineara.ops.sequence_parallel import sums_over_group


@custom_op("lineara::kernel_attention", mutates_args=())
def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    feature_map: str,
    scale: float,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs beside the inputs: total and weighted sum."""
    total, weighted_sum = streaming.summarize(key, value, key_mask, feature_map, scale)
    if group_name:
        total, weighted_sum = sums_over_group(total, weighted_sum, group_name)
    return streaming.attend(query, total, weighted_sum, None, feature_map, scale), total, weighted_sum


@custom_op("lineara::kernel_attention_backward", mutates_args=())
def kernel_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    total: Tensor,
    weighted_sum: Tensor,
    feature_map: str,
    scale: float,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_total, grad_weighted_sum, _ = streaming.attend_backward(
        grad_output, query, total, weighted_sum, None, feature_map, scale
    )
    if group_name:
        grad_total, grad_weighted_sum = sums_over_group(grad_total, grad_weighted_sum, group_name)
    grad_key, grad_value = streaming.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, feature_map, scale
    )
    return grad_query, grad_key, grad_value


@kernel_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any):
    batch, heads, key_dim = key.shape[0], key.shape[1], key.shape[3]
    total = key.new_empty((batch, heads, key_dim), dtype=accumulation_dtype(key.dtype))
    weighted_sum = total.new_empty((batch, heads, key_dim, value.shape[3]))
    return query.new_empty((*query.shape[:3], value.shape[3])), total, weighted_sum


@kernel_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, key_mask, ctx.feature_map, ctx.scale, ctx.group_name = inputs
    ctx.save_for_backward(query, key, value, key_mask, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: None):
    query, key, value, key_mask, total, weighted_sum = ctx.saved_tensors
    options = {"feature_map": ctx.feature_map, "scale": ctx.scale, "group_name": ctx.group_name}
    if grad_output is None:
        return (None,) * 7
    if torch.is_grad_enabled():

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
            return [reference.kernel_attention(query, key, value, key_mask=key_mask, **options)]

        gradients = reference_gradients(forward, (query, key, value), [grad_output])
    else:
        gradients = kernel_attention_backward(grad_output, query, key, value, key_mask, total, weighted_sum, **options)
    return *gradients, None, None, None, None


kernel_attention.register_autograd(_gradients, setup_context=_save)
