"""Feature maps hold the positions of one channel side by side: how to compute on them without a copy.

Letters in comments: B batch, H heads, N positions, D and E channels.
"""

import torch
from torch import Tensor

from lineara.ops.tracing import is_traced


def positions_are_adjacent(tensor: Tensor) -> bool:
    """Whether (..., N, D) is a view of what lies in memory as (..., D, N)."""
    return tensor.stride(-2) == 1 and not is_traced() and tensor.stride(-1) != 1


def softmax(tensor: Tensor, axis: int, out: Tensor | None = None) -> Tensor:
    """Over positions or channels, the last two axes, laid out as it is (torch would copy a map first).

    `out` must lie as the tensor does: torch writes into another layout as if it were contiguous.
    """
    if not positions_are_adjacent(tensor):
        return torch.softmax(tensor, axis, out=out)
    return torch.softmax(tensor.mT, 2 * tensor.dim() - 3 - axis, out=None if out is None else out.mT).mT


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left @ right, (..., N, E), of (..., N, D) and (..., D, E), laid out as `out` or the left one is."""
    multiply = torch.bmm if left.dim() == 3 else torch.matmul
    if not positions_are_adjacent(left if out is None else out):
        return multiply(left, right, out=out)
    return multiply(right.mT, left.mT, out=None if out is None else out.mT).mT
