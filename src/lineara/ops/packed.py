"""Packed sequences: sequences of several lengths, one after the other along the positions of a batch of one.

`cu_seqlens` holds where each begins, and last where the last one ends: (number of sequences + 1,), rising from 0 to the
number of positions. The kernels read it on the device; everything else computes sequence by sequence, by what is here.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")


def in_sequences(tensor: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many items a (B, H, positions, ...) tensor has: sequences where it is packed."""
    return tensor.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def by_sequence(
    compute: Callable[..., _Result],
    cu_seqlens: Tensor,
    long: Sequence[Tensor | None],
    short: Sequence[Tensor | None] = (),
) -> list[_Result]:
    """compute(*long, *short) for every sequence: its positions of the long tensors, its row of the short ones.

    A long tensor is (1, heads, positions, ...), or a mask (1, positions); None stays None.

    Raises:
        ValueError: unless cu_seqlens rises from 0 to the number of positions.
    """
    starts: list[int] = cu_seqlens.tolist()  # pyright: ignore[reportUnknownMemberType] - torch has no types for it
    return [
        compute(*(_positions(tensor, starts, i) for tensor in long), *(_row(tensor, i) for tensor in short))
        for i in range(len(starts) - 1)
    ]


def stacked(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Every sequence's results for the whole of it, (1, ...), as one item each."""
    return [torch.cat(tensors) for tensors in zip(*parts)]


def joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Every sequence's results for its positions, (1, H, positions, ...), one after the other again."""
    return [torch.cat(tensors, dim=2) for tensors in zip(*parts)]


def _positions(tensor: Tensor | None, starts: list[int], i: int) -> Tensor | None:
    if tensor is None:
        return None
    axis = 1 if tensor.dim() == 2 else 2
    if starts[0] != 0 or starts[-1] != tensor.shape[axis] or starts[i] > starts[i + 1]:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of positions, {tensor.shape[axis]}, got "
            f"{', '.join(map(str, starts[:8]))}{', ...' if len(starts) > 8 else ''}"
        )
    return tensor.narrow(axis, starts[i], starts[i + 1] - starts[i])


def _row(tensor: Tensor | None, i: int) -> Tensor | None:
    return None if tensor is None else tensor[i : i + 1]
