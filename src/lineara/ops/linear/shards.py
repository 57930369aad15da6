"""Windows over positions that are sharded over ranks: which positions change ranks, and the operator that moves them.

`lineara::summarize_shard` is `lineara::summarize` for windows that may straddle the borders of shards: a window is
completed on the rank that has its first position. Everything else that ranks exchange is in `sequence_parallel.py`.

Letters in comments: B batch, H heads, M key positions, K key channels, V value channels, n positions that move,
D channels.
"""

# pyright: reportUnknownMemberType=false
# (torch.distributed and torch.library type their functions only in part)

import math
from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lineara.ops.dispatch import means_of
from lineara.ops.flops import count_flops
from lineara.ops.library import define
from lineara.ops.linear import reference, windows
from lineara.ops.linear.feature_maps import Summary
from lineara.ops.linear.operators import (
    FOUR,
    GRADS,
    KEYS,
    MAP,
    SUMMARY,
    WINDOWS,
    fake_summary,
    fake_summary_gradients,
    flops_of_summary,
    in_blocks,
    of_summary,
    save_summary,
    summary_gradients,
)
from lineara.ops.linear.windows import Keys, Windows
from lineara.ops.precision import register_autocast
from lineara.ops.sequence_parallel import process_group


def summarize(*arguments: Any) -> Summary:
    """What the operator computes: the summary of the windows that begin on this rank, completed by other ranks."""
    keys, name, scale, grid, impl = of_summary(arguments[:-1])
    means = means_of(impl, keys.key, keys.value)
    parts = Alignment(keys, grid, arguments[-1]).parts(keys)
    return reduce(reference.merge, (windows.summarize(means, part, of_part, name, scale) for part, of_part in parts))


def _summarize_backward(grad_total: Tensor, grad_weighted_sum: Tensor, maximum: Tensor, *arguments: Any):
    keys, name, scale, grid, impl = of_summary(arguments[:-1])
    means = in_blocks(means_of(impl, keys.key, keys.value))
    alignment = Alignment(keys, grid, arguments[-1])
    whole, rest = (
        windows.summarize_backward(means, grad_total, grad_weighted_sum, part, maximum, of_part, name, scale)
        for part, of_part in alignment.parts(keys)
    )
    weights = (keys.key.new_empty(0) if a is None or b is None else a + b for a, b in zip(whole[2:], rest[2:]))
    return *alignment.gradients(whole[:2], rest[:2]), *weights


class Alignment:
    """Which positions change ranks so that no window straddles a border of two shards.

    A window belongs to the rank that has its first position; the others hand theirs over: fewer positions than a window
    has, however long the shards are. Windows are counted along the first axis of the grid, by the least common multiple
    of all resolutions.
    """

    def __init__(self, keys: Keys, grid: Windows, group_name: str) -> None:
        key, key_shape = keys.key, grid.key_shape
        self._group = process_group(group_name)
        self._rank = dist.get_rank(self._group)
        # One number of 8 bytes says how long a shard is, and whether it has a mask.
        told = torch.tensor([2 * key_shape[0] + (keys.key_mask is not None)], dtype=torch.int64, device=key.device)
        heard = told.new_empty(dist.get_world_size(self._group))
        dist.all_gather_into_tensor(heard, told, self._group)
        numbers: list[int] = heard.tolist()  # pyright: ignore[reportUnknownVariableType]
        lengths = [number // 2 for number in numbers]
        self._masked = any(number % 2 for number in numbers)
        self._axes = tuple(key_shape[1:])
        self._grid = grid.within(max(sum(lengths), *self._axes, 1))
        multiple = math.lcm(*(min(resolution, max(1, sum(lengths))) for resolution in grid.resolutions))
        row = math.prod(self._axes)
        self._moves = [(*move, rows * row) for *move, rows in _moves(lengths, multiple)]
        handed = sum(count for source, _, count in self._moves if source == self._rank)
        kept = key.shape[2] - handed
        whole = kept - kept % (multiple * row) if row else 0
        self._sizes = [handed, whole, kept - whole]
        self._rows = row

    def parts(self, keys: Keys) -> list[tuple[Keys, Windows]]:
        """The aligned shard in two: windows that lie here, without a copy, and the one that other ranks complete."""
        key, value, key_mask, _, *weights = keys
        if self._masked and key_mask is None:
            key_mask = key.new_ones((key.shape[0], key.shape[2]), dtype=torch.bool)
        _, whole_key, key_here = torch.split(key, self._sizes, 2)
        _, whole_value, value_here = torch.split(value, self._sizes, 2)
        # Gradients are to lie in memory as their tensors do.
        self._strides = [torch.empty_like(tensor, device="meta").stride() for tensor in (key, value)]
        handed, whole, _ = self._sizes
        moving = [tensor[:, :, :handed] for tensor in (key, value)]
        if key_mask is not None:
            mask = key_mask[:, None, :handed, None].to(key.dtype)  # (B, 1, n, 1)
            moving.append(mask.expand(-1, key.shape[1], -1, -1))
        received: Tensor = _HandOver.apply(torch.cat(moving, dim=3), self, False)  # pyright: ignore[reportAssignmentType]
        rest_key = torch.cat([key_here, received[..., : key.shape[3]]], dim=2)
        rest_value = torch.cat([value_here, received[..., key.shape[3] : key.shape[3] + value.shape[3]]], dim=2)
        whole_mask = rest_mask = None
        if key_mask is not None:
            whole_mask = key_mask[:, handed : handed + whole]
            rest_mask = torch.cat([key_mask[:, handed + whole :], received[:, 0, :, -1] > 0], dim=1)
        parts = (whole_key, whole_value, whole_mask), (rest_key, rest_value, rest_mask)
        return [(Keys(*part, None, *weights), self._grid_of(part[0])) for part in parts]

    def gradients(self, of_whole: Sequence[Tensor], of_rest: Sequence[Tensor]) -> list[Tensor]:
        """From the gradients of both parts' keys and values, those of the shard's: what was handed over comes back."""
        here = self._sizes[2]
        returned = self.exchange(torch.cat([grad[:, :, here:] for grad in of_rest], dim=3), True)
        widths = [grad.shape[3] for grad in of_rest]
        gradients: list[Tensor] = []
        for strides, handed, whole, rest in zip(
            self._strides, torch.split(returned, widths, 3), of_whole, of_rest, strict=True
        ):
            shape = (*handed.shape[:2], sum(self._sizes), handed.shape[3])
            gradient = torch.empty_strided(shape, strides, dtype=whole.dtype, device=whole.device)
            for target, part in zip(torch.split(gradient, self._sizes, 2), (handed, whole, rest[:, :, :here])):
                target.copy_(part)
            gradients.append(gradient)
        return gradients

    def exchange(self, tensor: Tensor, back: bool) -> Tensor:
        """Hand over (B, H, n, D), the positions to go, and get those that come; or all of that `back`."""
        goes, comes = (1, 0) if back else (0, 1)
        sent = [(move[comes], move[2]) for move in self._moves if move[goes] == self._rank]
        got = [(move[goes], move[2]) for move in self._moves if move[comes] == self._rank]
        outgoing = [part.contiguous() for part in torch.split(tensor, [count for _, count in sent], 2)] if sent else []
        incoming = [tensor.new_empty((*tensor.shape[:2], count, tensor.shape[3])) for _, count in got]
        messages = [
            dist.P2POp(action, part, group=self._group, group_peer=rank)
            for action, peers, parts in ((dist.isend, sent, outgoing), (dist.irecv, got, incoming))
            for (rank, _), part in zip(peers, parts)
            if part.numel()
        ]
        for message in dist.batch_isend_irecv(messages) if messages else ():
            message.wait()
        return torch.cat(incoming, dim=2) if incoming else tensor[:, :, :0].contiguous()

    def _grid_of(self, key: Tensor) -> Windows:
        return self._grid._replace(key_shape=(key.shape[2] // self._rows if self._rows else 0, *self._axes))


class _HandOver(torch.autograd.Function):
    """`Alignment.exchange`, whose gradient is the exchange back, and the reverse."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, alignment: Alignment, back: bool) -> Tensor:
        ctx.alignment, ctx.back = alignment, back
        return alignment.exchange(tensor, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride] - one gradient
        return _HandOver.apply(grad, ctx.alignment, not ctx.back), None, None


def _moves(lengths: Sequence[int], multiple: int) -> list[tuple[int, int, int]]:
    """(source, destination, rows) of every rank that begins inside a window which begins on another rank."""
    starts = [0, *accumulate(lengths)]
    moves: list[tuple[int, int, int]] = []
    for source, length in enumerate(lengths):
        start = starts[source]
        rows = min(-start % multiple, length)
        if rows:
            first = start - start % multiple
            destination = next(rank for rank in range(source) if starts[rank] <= first < starts[rank + 1])
            moves.append((source, destination, rows))
    return moves


SUMMARIZE_SHARD = define(
    f"summarize_shard({KEYS}, {MAP}, {WINDOWS}, str impl, str group_name) -> {SUMMARY}",
    summarize,
    fake_summary,
    (summary_gradients(summarize, lambda: SUMMARIZE_SHARD_BACKWARD), save_summary),
)
SUMMARIZE_SHARD_BACKWARD = define(
    f"summarize_shard_backward({GRADS}, {KEYS}, {MAP}, {WINDOWS}, str impl, str group_name) -> {FOUR}",
    _summarize_backward,
    fake_summary_gradients,
)

register_autocast("summarize_shard", SUMMARIZE_SHARD, (0, 1, 4, 5))
count_flops("summarize_shard", flops_of_summary)
count_flops("summarize_shard_backward", lambda *arguments: 2 * flops_of_summary(*arguments[3:]))
