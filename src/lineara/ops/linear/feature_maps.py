"""The feature maps of linear attention, and all that distinguishes one from another.

A map phi weighs keys, phi(scale K), and queries, phi(scale Q), channel by channel. This list and the language of the
GPU kernels (`triton_kernels.py`) are the only two places that know a map.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

# Maps whose weights are divided by each query's own sum of weights, phi(q) . sum of phi(k).
KernelMap = Literal["relu", "elu"]
KERNEL_MAPS: tuple[str, ...] = get_args(KernelMap)
# What multiresolution attention takes.
FeatureMap = Literal["softmax", KernelMap]

# Of keys and values: maximum (B, H, K), total (B, H, K), weighted sum (B, H, K, V); see `reference.summarize`.
Summary = tuple[Tensor, Tensor, Tensor]


class Map(NamedTuple):
    """What the implementations must know of a map. Under softmax, phi of a key is exp(key - maximum over positions)."""

    of: Callable[[Tensor], Tensor]  # phi of queries, and of keys where there is no maximum; differentiable
    of_block: Callable[[Tensor, Tensor], Tensor]  # the same of (rows, positions, channels), written into the second
    times_slope: Callable[[Tensor, Tensor], Tensor]  # a gradient times phi'(x), in place, given phi(x)
    has_maximum: bool = False  # whether keys are shifted by their maximum
    divides_context: bool = False  # whether the sums over keys are divided by their total, and queries by nothing
    counts_positions: bool = False  # whether that total is the number of positions, not the sum of weights


def feature_map(name: str) -> Map:
    """The map of a name; raise for a name that is none."""
    if name not in _MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, _MAPS))}, got {name!r}")
    return _MAPS[name]


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(dim=3)


def _softmax_of_block(x: Tensor, out: Tensor) -> Tensor:
    return torch.softmax(x, dim=2, out=out)


def _times_weights(gradient: Tensor, weights: Tensor) -> Tensor:
    return gradient.mul_(weights)


def _same(x: Tensor, out: Tensor | None = None) -> Tensor:
    return x


def _times_one(gradient: Tensor, weights: Tensor) -> Tensor:
    return gradient


def _relu_of_block(x: Tensor, out: Tensor) -> Tensor:
    return torch.clamp(x, min=0.0, out=out)


def _where_positive(gradient: Tensor, weights: Tensor) -> Tensor:
    return gradient.masked_fill_(weights <= 0, 0.0)


def _elu_plus_one(x: Tensor) -> Tensor:
    # (Written such that it keeps its digits where it is small.)
    return x.clamp_max(0.0).exp() + x.relu()


def _elu_plus_one_of_block(x: Tensor, out: Tensor) -> Tensor:
    positive = x.relu()
    return torch.clamp(x, max=0.0, out=out).exp_().add_(positive)


def _times_at_most_one(gradient: Tensor, weights: Tensor) -> Tensor:
    return gradient.mul_(weights.clamp(max=1.0))


_MAPS: dict[str, Map] = {
    "softmax": Map(_softmax, _softmax_of_block, _times_weights, has_maximum=True, divides_context=True),
    "identity": Map(_same, _same, _times_one, divides_context=True, counts_positions=True),
    "relu": Map(torch.relu, _relu_of_block, _where_positive),
    "elu": Map(_elu_plus_one, _elu_plus_one_of_block, _times_at_most_one),
}
