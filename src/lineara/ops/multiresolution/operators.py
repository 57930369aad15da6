"""Multiresolution attention in passes (`streaming`, `triton`) as an operator of torch.library."""

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
from lineara.ops.efficient.streaming import context_backward
from lineara.ops.flops import Shape, count_flops, num_windows, products
from lineara.ops.multiresolution import reference
from lineara.ops.multiresolution.streaming import Compression
from lineara.ops.precision import accumulation_dtype, register_autocast
from lineara.ops.sequence_parallel import Alignment, Part, sum_over_group, sums_over_group


@custom_op("lineara::multiresolution_attention", mutates_args=())
def multiresolution_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    key_mask: Tensor | None,
    resolutions: Sequence[int],
    key_shape: Sequence[int],
    compression: str,
    feature_map: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, and what the backward pass needs beside the inputs: maximum, total and context."""
    run = passes("multiresolution", impl)
    parts, resolutions, _ = _parts(key, value, key_mask, resolutions, key_shape, compression, group_name)
    summaries = [
        run.summarize(
            part.key,
            part.value,
            part.key_mask,
            key_weight,
            value_weight,
            Compression(resolutions, part.key_shape, compression),
            feature_map,
            scale,
        )
        for part in parts
    ]
    maximum, total, context = reference.join(summaries, feature_map, scale, group_name)
    output = passes("kernel", impl).attend(query, total, context, gate, feature_map, scale)
    return output, maximum, total, context


@custom_op("lineara::multiresolution_attention_backward", mutates_args=())
def multiresolution_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    key_mask: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    context: Tensor,
    resolutions: Sequence[int],
    key_shape: Sequence[int],
    compression: str,
    feature_map: str,
    scale: float,
    group_name: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, gate and both weights; empty for what is not there."""
    run = passes("multiresolution", impl)
    grad_query, grad_total, grad_context, grad_gate = passes("kernel", impl).attend_backward(
        grad_output, query, total, context, gate, feature_map, scale
    )
    if feature_map == "softmax":
        grad_context = sum_over_group(grad_context, group_name) if group_name else grad_context
        grad_total, grad_context = context_backward(grad_context, context, total)
    elif group_name:
        grad_total, grad_context = sums_over_group(grad_total, grad_context, group_name)
    parts, resolutions, alignment = _parts(key, value, key_mask, resolutions, key_shape, compression, group_name)
    of_parts = [
        run.summarize_backward(
            grad_total,
            grad_context,
            part.key,
            part.value,
            part.key_mask,
            key_weight,
            value_weight,
            maximum,
            Compression(resolutions, part.key_shape, compression),
            feature_map,
            scale,
        )
        for part in parts
    ]
    grad_key, grad_value, *of_weights = of_parts[0]
    if alignment is not None:
        grad_key, grad_value = alignment.gradients(of_parts[0][:2], of_parts[1][:2])
        of_weights = [None if a is None or b is None else a + b for a, b in zip(of_parts[0][2:], of_parts[1][2:])]
    # (One empty tensor for each: results of an operator must not share memory.)
    optional = (query.new_empty(0) if grad is None else grad for grad in (grad_gate, *of_weights))
    return grad_query, grad_key, grad_value, *optional  # pyright: ignore[reportReturnType] - there are three


def _parts(
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    resolutions: Sequence[int],
    key_shape: Sequence[int],
    compression: str,
    group_name: str,
) -> tuple[Sequence[Part], Sequence[int], Alignment | None]:
    """What is summarised on this rank, with which resolutions, and how it came here."""
    if not group_name:
        return [Part(key, value, key_mask, tuple(key_shape))], resolutions, None
    alignment = Alignment(key, key_mask, key_shape, resolutions, group_name)
    resolutions = reference.within(resolutions, compression, alignment.largest)
    return alignment.parts(key, value, key_mask), resolutions, alignment


@multiresolution_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any):
    batch, heads, key_dim = key.shape[0], key.shape[1], key.shape[3]
    maximum = key.new_empty((batch, heads, key_dim), dtype=accumulation_dtype(key.dtype))
    context = maximum.new_empty((batch, heads, key_dim, value.shape[3]))
    output = empty_like_query(query, value.shape[3])
    return output, maximum, torch.empty_like(maximum), context


@multiresolution_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    key_weight: Tensor | None,
    value_weight: Tensor | None,
    *_: Any,
):
    optional = (gate, key_weight, value_weight)
    return tuple(
        query.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in (query, key, value, *optional)
    )


_NUM_TENSORS = 6  # that have gradients: query, key, value, gate and both weights
_NUM_OPTIONS = 8  # that have none


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[: _NUM_TENSORS + 1], inputs[_NUM_TENSORS + 1 :]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: None):
    *tensors, key_mask, maximum, total, context = ctx.saved_tensors
    if grad_output is None:
        return (None,) * (_NUM_TENSORS + _NUM_OPTIONS)
    if torch.is_grad_enabled():
        names = ("resolutions", "key_shape", "compression", "feature_map", "scale", "group_name")
        gradients = _differentiable_gradients(tensors, key_mask, grad_output, dict(zip(names, ctx.options)))
    else:
        given = multiresolution_attention_backward(
            grad_output, *tensors, key_mask, maximum, total, context, *ctx.options
        )
        gradients = [None if tensor is None else grad for tensor, grad in zip(tensors, given)]
    return *gradients, *((None,) * _NUM_OPTIONS)


def _differentiable_gradients(
    tensors: Sequence[Tensor | None], key_mask: Tensor | None, grad_output: Tensor, options: dict[str, Any]
) -> list[Tensor | None]:
    there = [tensor for tensor in tensors if tensor is not None]

    def forward(*given: Tensor) -> Sequence[Tensor]:
        values = iter(given)
        names = ("gate", "key_weight", "value_weight")
        query, key, value = (next(values) for _ in range(3))
        optional = {name: None if tensor is None else next(values) for name, tensor in zip(names, tensors[3:])}
        return [reference.multiresolution_attention(query, key, value, key_mask=key_mask, **optional, **options)]

    gradients = iter(reference_gradients(forward, there, [grad_output]))
    return [None if tensor is None else next(gradients) for tensor in tensors]


multiresolution_attention.register_autograd(_gradients, setup_context=_save)
register_autocast("multiresolution_attention", multiresolution_attention, _NUM_TENSORS)


def _flops(query: Shape, key: Shape, value: Shape, *rest: Any) -> int:
    resolutions, key_shape = rest[-7], rest[-6]
    positions = sum(query[2] + num_windows(key_shape, resolution) for resolution in resolutions)
    return products(1, positions, (key[0], 1, *key[2:]), value)


def _backward_flops(_: Shape, *arguments: Any) -> int:
    return 2 * _flops(*arguments)


count_flops("multiresolution_attention", _flops)
count_flops("multiresolution_attention_backward", _backward_flops)
