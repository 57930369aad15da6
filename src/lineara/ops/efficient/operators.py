"""The streaming implementation as operators of torch.library: one boundary per call, with gradients of any order.

torch.compile and torch.export see one opaque node instead of a loop, so that no length and no number of blocks is
compiled in. Where gradients of gradients are asked for, the backward pass is that of the reference.
"""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from lineara.ops.differentiation import reference_gradients
from lineara.ops.efficient import reference, streaming
from lineara.ops.efficient.reference import ContextSummary
from lineara.ops.precision import accumulation_dtype
from lineara.ops.sequence_parallel import sum_over_group


@custom_op("lineara::efficient_attention", mutates_args=())
def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    normalization: str,
    scale: float,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs beside the inputs: maximum, total and context matrix."""
    maximum, total, weighted_sum = streaming.summarize(key, value, key_mask, normalization, scale)
    summary = ContextSummary(maximum, total, weighted_sum, normalization, scale)
    maximum, total, context = reference.context_over_ranks(summary, group_name)
    return streaming.attend(query, context, normalization, scale), maximum, total, context


@custom_op("lineara::efficient_attention_backward", mutates_args=())
def efficient_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    context: Tensor,
    normalization: str,
    scale: float,
    group_name: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_context = streaming.attend_backward(grad_output, query, context, normalization, scale)
    if group_name:
        grad_context = sum_over_group(grad_context, group_name)
    grad_total, grad_weighted_sum = streaming.context_backward(grad_context, context, total)
    grad_key, grad_value = streaming.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, maximum, normalization, scale
    )
    return grad_query, grad_key, grad_value


@custom_op("lineara::summarize_context", mutates_args=())
def summarize_context(
    key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return streaming.summarize(key, value, key_mask, normalization, scale)


@custom_op("lineara::summarize_context_backward", mutates_args=())
def summarize_context_backward(
    grad_total: Tensor,
    grad_weighted_sum: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    maximum: Tensor,
    normalization: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return streaming.summarize_backward(
        grad_total, grad_weighted_sum, key, value, key_mask, maximum, normalization, scale
    )


@custom_op("lineara::attend_context", mutates_args=())
def attend_context(query: Tensor, context: Tensor, normalization: str, scale: float) -> Tensor:
    return streaming.attend(query, context, normalization, scale)


@custom_op("lineara::attend_context_backward", mutates_args=())
def attend_context_backward(
    grad_output: Tensor, query: Tensor, context: Tensor, normalization: str, scale: float
) -> tuple[Tensor, Tensor]:
    return streaming.attend_backward(grad_output, query, context, normalization, scale)


# Shapes and dtypes, for tracing without data.


@efficient_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any):
    maximum, total, context = _fake_summary(key, value)
    return query.new_empty((*query.shape[:3], value.shape[3])), maximum, total, context


@efficient_attention_backward.register_fake
def _(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any):
    return _fake_contiguous(query), _fake_contiguous(key), _fake_contiguous(value)


@summarize_context.register_fake
def _(key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str, scale: float):
    return _fake_summary(key, value)


@summarize_context_backward.register_fake
def _(grad_total: Tensor, grad_weighted_sum: Tensor, key: Tensor, value: Tensor, *_: Any):
    return _fake_contiguous(key), _fake_contiguous(value)


@attend_context.register_fake
def _(query: Tensor, context: Tensor, normalization: str, scale: float):
    return query.new_empty((*query.shape[:3], context.shape[3]))


@attend_context_backward.register_fake
def _(grad_output: Tensor, query: Tensor, context: Tensor, normalization: str, scale: float):
    return _fake_contiguous(query), torch.empty_like(context)


def _fake_summary(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, _, key_dim = key.shape
    wide = accumulation_dtype(key.dtype)
    maximum = key.new_empty((batch, heads, key_dim), dtype=wide)
    return (
        maximum,
        torch.empty_like(maximum),
        key.new_empty((batch, heads, key_dim, value.shape[3]), dtype=wide),
    )


def _fake_contiguous(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


# Gradients.


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, key, value, key_mask, ctx.normalization, ctx.scale, ctx.group_name = inputs
    ctx.save_for_backward(query, key, value, key_mask, *output[1:])
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, grad_output: Tensor | None, *_: None):
    query, key, value, key_mask, maximum, total, context = ctx.saved_tensors
    options = {"normalization": ctx.normalization, "scale": ctx.scale, "group_name": ctx.group_name}
    if grad_output is None:
        return (None,) * 7
    if torch.is_grad_enabled():

        def forward(query: Tensor, key: Tensor, value: Tensor) -> Sequence[Tensor]:
            return [reference.efficient_attention(query, key, value, key_mask=key_mask, **options)]

        gradients = reference_gradients(forward, (query, key, value), [grad_output])
    else:
        gradients = efficient_attention_backward(
            grad_output, query, key, value, key_mask, maximum, total, context, **options
        )
    return *gradients, None, None, None, None


def _save_summary(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    key, value, key_mask, ctx.normalization, ctx.scale = inputs
    ctx.save_for_backward(key, value, key_mask, output[0])
    ctx.mark_non_differentiable(output[0])


def _summary_gradients(ctx: Any, _: Tensor, grad_total: Tensor, grad_weighted_sum: Tensor):
    key, value, key_mask, maximum = ctx.saved_tensors
    options = {"normalization": ctx.normalization, "scale": ctx.scale}
    if torch.is_grad_enabled():

        def forward(key: Tensor, value: Tensor) -> Sequence[Tensor]:
            return reference.summarize_context(key, value, key_mask=key_mask, **options)[1:3]

        gradients = reference_gradients(forward, (key, value), [grad_total, grad_weighted_sum])
    else:
        gradients = summarize_context_backward(grad_total, grad_weighted_sum, key, value, key_mask, maximum, **options)
    return *gradients, None, None, None


def _save_attend(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, context, ctx.normalization, ctx.scale = inputs
    ctx.save_for_backward(query, context)


def _attend_gradients(ctx: Any, grad_output: Tensor):
    query, context = ctx.saved_tensors
    if torch.is_grad_enabled():

        def forward(query: Tensor, context: Tensor) -> Sequence[Tensor]:
            return [reference.apply_context(query, context, ctx.normalization, ctx.scale)]

        gradients = reference_gradients(forward, (query, context), [grad_output])
    else:
        gradients = attend_context_backward(grad_output, query, context, ctx.normalization, ctx.scale)
    return *gradients, None, None


efficient_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
summarize_context.register_autograd(_summary_gradients, setup_context=_save_summary)
attend_context.register_autograd(_attend_gradients, setup_context=_save_attend)
