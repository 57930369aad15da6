"""The feature maps of linear attention, and all that distinguishes one from another.

A map phi weighs keys, phi(scale K), and queries, phi(scale Q), channel by channel. This list and the language of the
GPU kernels (`triton_kernels.py`) are the only two places that know a map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lineara.ops.linear.layout import softmax
from lineara.ops.tracing import is_traced, may_overwrite, transform_of

# Maps whose weights are divided by each query's own sum of weights, phi(q) . sum of phi(k).
KernelMap = Literal["relu", "elu"]
KERNEL_MAPS: tuple[str, ...] = get_args(KernelMap)
# What multiresolution attention takes.
FeatureMap = Literal["softmax", KernelMap]

# Of keys and values: maximum (B, H, K), total (B, H, K), weighted sum (B, H, K, V); see `reference.summarize`.
Summary = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Map:
    """What the implementations must know of a map. Under softmax, phi of a key is exp(key - maximum over positions)."""

    of: Callable[[Tensor], Tensor]  # phi of queries, and of keys where there is no maximum; differentiable
    of_block: Callable[[Tensor, Tensor], Tensor]  # the same of (rows, positions, channels), written into the second
    times_slope: Callable[[Tensor, Tensor], Tensor]  # a gradient times phi'(x), in place, given phi(x)
    has_maximum: bool = False  # whether keys are shifted by their maximum
    divides_context: bool = False  # whether the sums over keys are divided by their total, and queries by nothing
    counts_positions: bool = False  # whether that total is the number of positions, not the sum of weights


_MAPS: dict[str, Map] = {
    "softmax": Map(
        of=lambda x: softmax(x, 3),
        of_block=lambda x, out: softmax(x, 2, out),
        times_slope=lambda gradient, weights: gradient.mul_(weights),
        has_maximum=True,
        divides_context=True,
    ),
    "identity": Map(
        of=lambda x: x,
        of_block=lambda x, out: x,
        times_slope=lambda gradient, weights: gradient,
        divides_context=True,
        counts_positions=True,
    ),
    "relu": Map(
        of=lambda x: x.relu(),
        of_block=lambda x, out: torch.clamp(x, min=0.0, out=out),
        times_slope=lambda gradient, weights: gradient.masked_fill_(weights <= 0, 0.0),
    ),
    "elu": Map(  # elu + 1, written such that it keeps its digits where it is small
        of=lambda x: _elu(x),
        of_block=lambda x, out: _add(x.relu(), to=torch.clamp(x, max=0.0, out=out).exp_()),
        times_slope=lambda gradient, weights: gradient.mul_(weights.clamp(max=1.0)),
    ),
}


def feature_map(name: str) -> Map:
    """The map of a name; raise for a name that is none."""
    if name not in _MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, _MAPS))}, got {name!r}")
    return _MAPS[name]


def _elu(x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad and not is_traced() and not transform_of(x):
        return _Elu.apply(x)  # pyright: ignore[reportReturnType] - a tensor
    negative, positive = x.clamp_max(0.0), x.relu()
    return negative.exp_().add_(positive) if not is_traced() and may_overwrite(x) else negative.exp() + positive


class _Elu(torch.autograd.Function):
    """elu(x) + 1, whose slope is min(elu(x) + 1, 1): one tensor is kept, not four."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        weights = _elu(x)  # without gradients
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weights,) = ctx.saved_tensors
        return gradient * weights.clamp_max(1.0)


def _add(positive: Tensor, *, to: Tensor) -> Tensor:
    # (A function, so that the first is computed before `to` writes over what it is made of.)
    return to.add_(positive)
