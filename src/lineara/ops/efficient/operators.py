"""The implementations in passes (`streaming`, `triton`) as operators of torch.library: one boundary per call.

torch.compile and torch.export see one opaque node, so that no length and no number of blocks is compiled in. Where
gradients of gradients are asked for, the backward pass is that of the reference.
"""

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
from lineara.ops.efficient import reference
from lineara.ops.efficient.reference import ContextSummary
from lineara.ops.efficient.streaming import context_backward
from lineara.ops.flops import count_products
from lineara.ops.packed import in_sequences
from lineara.ops.precision import accumulation_dtype, register_autocast
from lineara.ops.sequence_parallel import sum_over_group


@custom_op("lineara::efficient_attention", mutates_args=())
def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    normalization: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs beside the inputs: maximum, total and context matrix."""
    run = passes("efficient", impl)
    inputs = (key, value, key_mask, normalization, scale, cu_seqlens_key)
    if group_name:
        maximum, total, weighted_sum = run.summarize(*inputs)
        summary = ContextSummary(maximum, total, weighted_sum, normalization, scale)
        maximum, total, context = reference.context_over_ranks(summary, group_name)
    else:
        maximum, total, context = run.context_of(*inputs)
    return run.attend(query, context, normalization, scale, cu_seqlens_query), maximum, total, context


@custom_op("lineara::efficient_attention_backward", mutates_args=())
def efficient_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = passes("efficient", impl)
    options = (normalization, scale, cu_seqlens_query)
    if group_name:
        grad_query, grad_context = run.attend_backward(grad_output, query, context, *options)
        grad_context = sum_over_group(grad_context, group_name)
        grad_total, grad_weighted_sum = context_backward(grad_context, context, total)
    else:
        grad_query, grad_total, grad_weighted_sum = run.attend_backward_to_sums(
            grad_output, query, total, context, *options
        )
    grad_key, grad_value = run.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, maximum, normalization, scale, cu_seqlens_key
    )
    return grad_query, grad_key, grad_value


@custom_op("lineara::summarize_context", mutates_args=())
def summarize_context(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalization: str,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return passes("efficient", impl).summarize(key, value, key_mask, normalization, scale, cu_seqlens)


@custom_op("lineara::summarize_context_backward", mutates_args=())
def summarize_context_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    maximum: Tensor,
    normalization: str,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return passes("efficient", impl).summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, maximum, normalization, scale, cu_seqlens
    )


@custom_op("lineara::attend_context", mutates_args=())
def attend_context(
    query: Tensor, context: Tensor, cu_seqlens: Tensor | None, normalization: str, scale: float, impl: str
) -> Tensor:
    return passes("efficient", impl).attend(query, context, normalization, scale, cu_seqlens)


@custom_op("lineara::attend_context_backward", mutates_args=())
def attend_context_backward(
    grad_output: Tensor,
    query: Tensor,
    context: Tensor,
    cu_seqlens: Tensor | None,
    normalization: str,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    return passes("efficient", impl).attend_backward(grad_output, query, context, normalization, scale, cu_seqlens)


# Shapes, dtypes and layouts, for tracing without data.


@efficient_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
    *_: Any,
):
    maximum, total, context = _fake_summary(key, value, cu_seqlens_key)
    return empty_like_query(query, value.shape[3]), maximum, total, context


@efficient_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@summarize_context.register_fake
def _(key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *_: Any):
    return _fake_summary(key, value, cu_seqlens)


@summarize_context_backward.register_fake
def _(grad_total: Tensor, grad_weighted_sum: Tensor, key: Tensor, value: Tensor, *_: Any):
    return torch.empty_like(key), torch.empty_like(value)


@attend_context.register_fake
def _(query: Tensor, context: Tensor, *_: Any):
    return empty_like_query(query, context.shape[3])


@attend_context_backward.register_fake
def _(grad_output: Tensor, query: Tensor, context: Tensor, *_: Any):
    return torch.empty_like(query), torch.empty_like(context, memory_format=torch.contiguous_format)


def _fake_summary(key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = (in_sequences(key, cu_seqlens), key.shape[1], key.shape[3])
    maximum = key.new_empty(shape, dtype=accumulation_dtype(key.dtype))
    return maximum, torch.empty_like(maximum), maximum.new_empty((*shape, value.shape[3]))


# Gradients.


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, grad_output: Tensor | None, *_: None):
    if grad_output is None:
        return (None,) * 10
    *tensors, maximum, total, context = ctx.saved_tensors
    if torch.is_grad_enabled():
        normalization, scale, group_name, _ = ctx.options

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
            options = {"normalization": normalization, "scale": scale, "group_name": group_name}
            return [reference.efficient_attention(query, key, value, *tensors[3:], **options)]

        gradients = reference_gradients(forward, tensors[:3], [grad_output])
    else:
        gradients = efficient_attention_backward(grad_output, *tensors, maximum, total, context, *ctx.options)
    return *gradients, *((None,) * 7)


def _save_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors, output[0])
    ctx.mark_non_differentiable(output[0])


def _summary_gradients(ctx: Any, _: Tensor, grad_total: Tensor, grad_weighted_sum: Tensor):
    *tensors, maximum = ctx.saved_tensors
    if torch.is_grad_enabled():
        normalization, scale, _ = ctx.options

        def forward(key: Tensor, value: Tensor) -> Sequence[Tensor]:
            summary = reference.summarize_context(key, value, *tensors[2:], normalization=normalization, scale=scale)
            return summary[1:3]

        gradients = reference_gradients(forward, tensors[:2], [grad_total, grad_weighted_sum])
    else:
        gradients = summarize_context_backward(grad_total, grad_weighted_sum, *tensors, maximum, *ctx.options)
    return *gradients, *((None,) * 5)


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors, ctx.options = inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors)


def _attend_gradients(ctx: Any, grad_output: Tensor):
    query, context, cu_seqlens = ctx.saved_tensors
    if torch.is_grad_enabled():
        normalization, scale, _ = ctx.options

        def forward(query: Tensor, context: Tensor) -> Sequence[Tensor]:
            return [reference.apply_context(query, context, normalization, scale, cu_seqlens)]

        gradients = reference_gradients(forward, (query, context), [grad_output])
    else:
        gradients = attend_context_backward(grad_output, query, context, cu_seqlens, *ctx.options)
    return *gradients, *((None,) * 4)


efficient_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
summarize_context.register_autograd(_summary_gradients, setup_context=_save_summary)
attend_context.register_autograd(_attend_gradients, setup_context=_save_attend)

register_autocast("efficient_attention", efficient_attention, 3)
register_autocast("summarize_context", summarize_context, 2)
register_autocast("attend_context", attend_context, 1)

count_products("efficient_attention", 1, positions_of=(0, 1), key=1, value=2)
count_products("efficient_attention_backward", 2, positions_of=(1, 2), key=2, value=3)
count_products("summarize_context", 1, positions_of=(0,), key=0, value=1)
count_products("summarize_context_backward", 2, positions_of=(2,), key=2, value=3)
count_products("attend_context", 1, positions_of=(0,), key=0, value=1)
count_products("attend_context_backward", 2, positions_of=(1,), key=1, value=2)
