"""Packed sequences: sequences of several lengths, one after the other along the positions of a batch of one.

`cu_seqlens` holds where each begins, and last where the last one ends: (number of sequences + 1,), rising from 0 to the
number of positions. The kernels read it on the device; everything else computes sequence by sequence, by what is here.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Positions(NamedTuple):
    """An argument of which every sequence gets its positions: (1, heads, positions, ...), a mask, or None."""

    tensor: Tensor | None


class Row(NamedTuple):
    """An argument of which every sequence gets its item: (number of sequences, ...), or None."""

    tensor: Tensor | None


def in_sequences(tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many items a (B, H, positions, ...) tensor has: sequences where it is packed."""
    return tensor.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def by_sequence(compute: Callable[..., Any], cu_seqlens: Tensor, *arguments: object) -> list[Any]:
    """compute(*arguments) for every sequence, with its part of those that are `Positions` or `Row`.

    Raises:
        ValueError: unless cu_seqlens rises from 0 to the number of positions.
    """
    starts: list[int] = cu_seqlens.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return [
        compute(*(_of_sequence(argument, start, end, i, starts) for argument in arguments))
        for i, (start, end) in enumerate(pairwise(starts))
    ]


def cut(cu_seqlens: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Of every sequence, its positions of all tensors: a tuple of tensors, and of None where None was given."""
    return by_sequence(lambda *parts: parts, cu_seqlens, *map(Positions, tensors))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]


def stacked(parts: Sequence[Sequence[Tensor]]) -> tuple[Any, ...]:
    """Every sequence's results for the whole of it, (1, ...), as one item each."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts))


def joined(parts: Sequence[Sequence[Tensor]], *into: Tensor) -> list[Tensor]:
    """Every sequence's results for its positions, (1, H, positions, ...), one after the other again, in those given."""
    for i, target in enumerate(into):
        # (torch.cat does not write into a target that is a single number with strides.)
        places = torch.split(target, [part[i].shape[2] for part in parts], dim=2)
        for place, part in zip(places, parts):
            place.copy_(part[i])
    return list(into)


def _of_sequence(argument: object, start: int, end: int, i: int, starts: list[int]) -> object:
    if isinstance(argument, Row):
        return None if argument.tensor is None else argument.tensor[i : i + 1]
    if not isinstance(argument, Positions):
        return argument
    if argument.tensor is None:
        return None
    axis = 1 if argument.tensor.dim() == 2 else 2
    num_positions = argument.tensor.shape[axis]
    if starts[0] != 0 or starts[-1] != num_positions or not 0 <= start <= end <= num_positions:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of positions, {num_positions}, got "
            f"{', '.join(map(str, starts[:8]))}{', ...' if len(starts) > 8 else ''}"
        )
    return argument.tensor.narrow(axis, start, end - start)
