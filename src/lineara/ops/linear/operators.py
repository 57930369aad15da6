"""The family as operators of torch.library: `lineara::summarize`, `lineara::attend` and their backward passes.

torch.compile, selective checkpointing and FLOP counters see one opaque node for each, so that no length and no number
of blocks is compiled in: where "auto" leaves the choice to the size, it is made in here. Where gradients of gradients
are asked for, the backward pass is that of the reference.

(torch.library.custom_op would do, but its first call imports torch._dynamo: 2 seconds and 180 MB.)
"""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lineara.ops.dispatch import means_of
from lineara.ops.flops import count_flops, num_windows, products
from lineara.ops.library import define, reference_gradients, run
from lineara.ops.linear import reference, streaming, windows
from lineara.ops.linear.blocks import empty_like_query
from lineara.ops.linear.feature_maps import Summary
from lineara.ops.linear.windows import Keys, Windows
from lineara.ops.packed import in_sequences
from lineara.ops.precision import accumulation_dtype, register_autocast

KEYS = "Tensor key, Tensor value, Tensor? key_mask, Tensor? cu_seqlens, Tensor? key_weight, Tensor? value_weight"
MAP = "str feature_map, float scale"
WINDOWS = "SymInt[] resolutions, SymInt[] key_shape, str compression"
_QUERY = "Tensor query, Tensor total, Tensor weighted_sum, Tensor? gate, Tensor? cu_seqlens"
_NUM_KEYS = len(Keys._fields)


# Keys and values to summaries.


def summarize(*arguments: Any) -> Summary:
    """What the operator computes; by the reference it is differentiable."""
    keys, name, scale, grid, impl = of_summary(arguments)
    maximum, *sums = windows.summarize(means_of(impl, keys.key, keys.value), keys, grid, name, scale)
    return maximum.contiguous(), *sums  # pyright: ignore[reportReturnType] - there are two


def summarize_backward(grad_total: Tensor, grad_weighted_sum: Tensor, maximum: Tensor, *arguments: Any):
    keys, name, scale, grid, impl = of_summary(arguments)
    means = in_blocks(means_of(impl, keys.key, keys.value))
    given = windows.summarize_backward(means, grad_total, grad_weighted_sum, keys, maximum, grid, name, scale)
    # (An empty tensor for a weight that is not there: an operator returns tensors.)
    return tuple(keys.key.new_empty(0) if grad is None else grad for grad in given)


def of_summary(arguments: Sequence[Any]) -> tuple[Keys, str, float, Windows, str]:
    name, scale, *grid, impl = arguments[_NUM_KEYS:]
    return Keys(*arguments[:_NUM_KEYS]), name, scale, Windows(*grid), impl


def fake_summary(key: Tensor, value: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None, *_: Any):
    shape = (in_sequences(key, cu_seqlens), key.shape[1], key.shape[3])
    maximum = key.new_empty(shape, dtype=accumulation_dtype(key.dtype))
    return maximum, torch.empty_like(maximum), maximum.new_empty((*shape, value.shape[3]))


def fake_summary_gradients(grad_total: Tensor, grad_weighted_sum: Tensor, maximum: Tensor, *keys: Any):
    key, value, _, _, *weights = keys[:_NUM_KEYS]
    like = (key.new_empty(0) if weight is None else torch.empty_like(weight) for weight in weights)
    return torch.empty_like(key), torch.empty_like(value), *like


def save_summary(ctx: Any, inputs: tuple[Any, ...], output: Summary) -> None:
    ctx.options = inputs[_NUM_KEYS:]
    ctx.save_for_backward(*inputs[:_NUM_KEYS], output[0])
    ctx.mark_non_differentiable(output[0])
    ctx.set_materialize_grads(False)  # of the maximum


def summary_gradients(compute: Callable[..., Summary], backward: Callable[[], Any]) -> Callable[..., Any]:
    """The backward function of an operator that computes a summary, given the operator of its own backward pass."""

    def gradients(ctx: Any, _: Tensor, grad_total: Tensor | None, grad_sum: Tensor | None):
        key, value, key_mask, cu_seqlens, *weights, maximum = ctx.saved_tensors
        grads = (
            torch.zeros_like(maximum) if grad_total is None else grad_total,
            maximum.new_zeros((*maximum.shape, value.shape[3])) if grad_sum is None else grad_sum,
        )
        if not torch.is_grad_enabled():
            inputs = key, value, key_mask, cu_seqlens, *weights, *ctx.options
            found = list(run(backward(), *grads, maximum, *inputs))
        else:
            name, scale, resolutions, key_shape, compression, _, *group = ctx.options
            options = name, scale, resolutions, key_shape, compression, "reference", *group

            def forward(key: Tensor, value: Tensor, *weights: Tensor) -> Sequence[Tensor]:
                return compute(key, value, key_mask, cu_seqlens, *(weights or (None, None)), *options)[1:]

            there = [weight for weight in weights if weight is not None]
            found = [*reference_gradients(forward, [key, value, *there], grads), None, None]
        of_weights = (None if weight is None else grad for weight, grad in zip(weights, found[2:]))
        return *found[:2], None, None, *of_weights, *((None,) * len(ctx.options))

    return gradients


# Queries to answers.


def attend(*arguments: Any) -> Tensor:
    *inputs, impl = arguments
    means = means_of(impl, arguments[0])
    output = means.attend(*inputs)
    # (The others lay their output out as was promised to the tracer.)
    return empty_like_query(arguments[0], output.shape[3]).copy_(output) if means is reference else output


def attend_backward(grad_output: Tensor, *arguments: Any):
    *inputs, impl = arguments
    *given, grad_gate = in_blocks(means_of(impl, arguments[0])).attend_backward(grad_output, *inputs)
    return *given, arguments[0].new_empty(0) if grad_gate is None else grad_gate


def _fake_answers(query: Tensor, total: Tensor, weighted_sum: Tensor, *_: Any):
    return empty_like_query(query, weighted_sum.shape[3])


def _fake_gradients_of_answers(
    grad_output: Tensor, query: Tensor, total: Tensor, weighted_sum: Tensor, gate: Tensor | None, *_: Any
):
    sums = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (total, weighted_sum))
    return torch.empty_like(query), *sums, query.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def _save_query(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.options = inputs[5:]
    ctx.save_for_backward(*inputs[:5])


def _gradients_of_answers(ctx: Any, grad_output: Tensor):
    *tensors, cu_seqlens = ctx.saved_tensors
    if torch.is_grad_enabled():
        there = [tensor for tensor in tensors if tensor is not None]

        def forward(query: Tensor, total: Tensor, weighted_sum: Tensor, gate: Tensor | None = None):
            return [reference.attend(query, total, weighted_sum, gate, cu_seqlens, *ctx.options[:2])]

        given = reference_gradients(forward, there, [grad_output])
    else:
        given = run(ATTEND_BACKWARD, grad_output, *tensors, cu_seqlens, *ctx.options)
    return *given[:3], None if tensors[3] is None else given[3], None, *((None,) * len(ctx.options))


def in_blocks(means: ModuleType) -> ModuleType:
    """What has backward passes: streaming for the reference, whose are autograd's."""
    return streaming if means is reference else means


SUMMARY = "(Tensor maximum, Tensor total, Tensor weighted_sum)"
GRADS = "Tensor grad_total, Tensor grad_weighted_sum, Tensor maximum"
FOUR = "(Tensor, Tensor, Tensor, Tensor)"

SUMMARIZE = define(
    f"summarize({KEYS}, {MAP}, {WINDOWS}, str impl) -> {SUMMARY}",
    summarize,
    fake_summary,
    (summary_gradients(summarize, lambda: SUMMARIZE_BACKWARD), save_summary),
)
SUMMARIZE_BACKWARD = define(
    f"summarize_backward({GRADS}, {KEYS}, {MAP}, {WINDOWS}, str impl) -> {FOUR}",
    summarize_backward,
    fake_summary_gradients,
)
ATTEND = define(
    f"attend({_QUERY}, {MAP}, str impl) -> Tensor", attend, _fake_answers, (_gradients_of_answers, _save_query)
)
ATTEND_BACKWARD = define(
    f"attend_backward(Tensor grad_output, {_QUERY}, {MAP}, str impl) -> {FOUR}",
    attend_backward,
    _fake_gradients_of_answers,
)
register_autocast("summarize", SUMMARIZE, (0, 1, 4, 5))
register_autocast("attend", ATTEND, (0, 3))


def flops_of_summary(*arguments: Any) -> int:
    key, value = arguments[:2]
    resolutions, key_shape = arguments[_NUM_KEYS + 2 : _NUM_KEYS + 4]
    positions = sum(num_windows(key_shape, resolution) for resolution in resolutions)
    if not resolutions:
        return products(key[2], key, value)
    return products(positions, (key[0], 1, *key[2:]), value)


def _flops_of_answers(query: Sequence[int], total: Sequence[int], weighted_sum: Sequence[int], *_: Any) -> int:
    return products(query[2], query, weighted_sum)


count_flops("summarize", flops_of_summary)
count_flops("attend", _flops_of_answers)
count_flops("summarize_backward", lambda *arguments: 2 * flops_of_summary(*arguments[3:]))
count_flops("attend_backward", lambda *arguments: 2 * _flops_of_answers(*arguments[1:]))
