"""The feature maps of linear attention, and all that distinguishes one from another.

A map phi weighs keys, phi(scale K), and queries, phi(scale Q), channel by channel. This list and the language of the
GPU kernels (`triton_kernels.py`) are the only two places that know a map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

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
    times_slope: Callable[[Tensor, Tensor], Tensor]  # a gradient times phi'(x), in place; may overwrite phi(x)
    has_maximum: bool = False  # whether keys are shifted by their maximum
    divides_context: bool = False  # whether the sums over keys are divided by their total, and queries by nothing
    counts_positions: bool = False  # whether that total is the number of positions, not the sum of weights


_MAPS: dict[str, Map] = {
    "softmax": Map(
        of=lambda x: x.softmax(dim=3),
        of_block=lambda x, out: torch.softmax(x, dim=2, out=out),
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
        of=lambda x: x.clamp_max(0.0).exp() + x.relu(),
        of_block=lambda x, out: _add(x.relu(), to=torch.clamp(x, max=0.0, out=out).exp_()),
        times_slope=lambda gradient, weights: gradient.mul_(weights.clamp_(max=1.0)),
    ),
}


def feature_map(name: str) -> Map:
    """The map of a name; raise for a name that is none."""
    if name not in _MAPS:
        raise ValueError(f"feature_map must be one of {', '.join(map(repr, _MAPS))}, got {name!r}")
    return _MAPS[name]


def _add(positive: Tensor, *, to: Tensor) -> Tensor:
    # (A function, so that the first is computed before `to` writes over what it is made of.)
    return to.add_(positive)
