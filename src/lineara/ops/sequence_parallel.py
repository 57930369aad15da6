"""Positions sharded over the ranks of a process group: what the operations exchange, and its gradients.

Every rank calls an operation with its own queries, keys and values, and gets the answers to its own queries from the
keys of all ranks. Only sums over positions travel, whatever the number of positions: see docs/sequence_parallel.md.
A gradient is that of the sum over ranks of every rank's loss, so every rank takes part in every backward pass.

Letters in comments: B batch, H heads, K key channels, V value channels, n positions that move, D channels.
"""

# pyright: reportUnknownMemberType=false
# (torch.distributed and torch.library type their functions only in part)

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lineara.ops.differentiation import reference_gradients
from lineara.ops.library import define
from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.reference import finite_shift, quotient

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh | None


def name_of_group(group: "Group") -> str:
    """The name under which torch knows the group, "" for None; raise unless this rank can talk to its ranks."""
    if group is None:
        return ""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "group must be None until torch.distributed is initialized, got "
            f"{type(group).__name__}; call torch.distributed.init_process_group first"
        )
    if isinstance(group, dist.device_mesh.DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group must be a mesh of one dimension, got {group.ndim} of them; pass mesh[name of the dimension]"
            )
        if group.get_coordinate() is None:
            raise ValueError("group must contain this rank, got a mesh without it; call this on the mesh's ranks only")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(
                "group must contain this rank, got a group without it; call this on the group's ranks only"
            )
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group.group_name


def process_group(group_name: str) -> "ProcessGroup":
    resolve: Callable[[str], ProcessGroup] = dist.distributed_c10d._resolve_process_group  # pyright: ignore - private
    return resolve(group_name)


def over_group(summary: Summary, name: str, group_name: str) -> tuple[Tensor, Tensor]:
    """Total and weighted sum of the positions of all ranks, for queries to attend to.

    Of a context that is divided by its total, the quotient travels back alone: the total is then 1.
    """
    _, total, weighted_sum = summary
    if not group_name:
        return total, weighted_sum
    if feature_map(name).has_maximum:
        _, total, weighted_sum = _of_common_maximum(summary, group_name)
    if feature_map(name).divides_context:
        context, _ = _context_over_group(total, weighted_sum, group_name)
        return torch.ones_like(total), context
    return _sums_over_group(total, weighted_sum, group_name)


def merge_over_group(summary: Summary, group_name: str) -> Summary:
    """The summary of the positions of all ranks: one message of maxima, and one of sums."""
    maximum, total, weighted_sum = _of_common_maximum(summary, group_name)
    return maximum, *_sums_over_group(total, weighted_sum, group_name)


def _of_common_maximum(summary: Summary, group_name: str) -> Summary:
    maximum = maximum_over_group(summary[0], group_name)
    factor = (summary[0] - finite_shift(maximum)).exp()
    return maximum, summary[1] * factor, summary[2] * factor[..., None]


def _sums_over_group(total: Tensor, weighted_sum: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    """The sums over ranks of (B, H, K) and (B, H, K, V), in one message."""
    both = sum_over_group(torch.cat([total[..., None], weighted_sum], dim=3), group_name)  # (B, H, K, 1 + V)
    return both[..., 0].contiguous(), both[..., 1:].contiguous()


# The collectives.


def _maximum(tensor: Tensor, group_name: str) -> Tensor:
    return _reduced(tensor, dist.ReduceOp.MAX, group_name)


def _sum(tensor: Tensor, group_name: str) -> Tensor:
    return _reduced(tensor, dist.ReduceOp.SUM, group_name)


def _reduced(tensor: Tensor, how: Any, group_name: str) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, how, process_group(group_name))
    return result


def _context(total: Tensor, weighted_sum: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    total, weighted_sum = _sums_over_group(total, weighted_sum, group_name)
    return quotient(weighted_sum, total), total


def _fake_reduced(tensor: Tensor, group_name: str):
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _fake_context(total: Tensor, weighted_sum: Tensor, group_name: str):
    return _fake_reduced(weighted_sum, group_name), _fake_reduced(total, group_name)


def _save_name(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group_name = inputs[1]


def _sum_gradients(ctx: Any, grad: Tensor):
    return sum_over_group(grad, ctx.group_name), None


def _no_gradients(ctx: Any, _: Tensor):
    return None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.mark_non_differentiable(output)


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    total, weighted_sum, ctx.group_name = inputs
    ctx.save_for_backward(total, weighted_sum, *output)
    ctx.mark_non_differentiable(output[1])


def _context_gradients(ctx: Any, grad_context: Tensor, _: Tensor):
    total, weighted_sum, context, sum_of_totals = ctx.saved_tensors
    if torch.is_grad_enabled():

        def forward(total: Tensor, weighted_sum: Tensor) -> Sequence[Tensor]:
            total, weighted_sum = _sums_over_group(total, weighted_sum, ctx.group_name)
            return [quotient(weighted_sum, total)]

        return *reference_gradients(forward, (total, weighted_sum), [grad_context]), None
    grad_weighted_sum = quotient(sum_over_group(grad_context, ctx.group_name), sum_of_totals)
    return -(context * grad_weighted_sum).sum(dim=3), grad_weighted_sum, None


# The largest of all ranks' numbers, which are shifts that cancel: no gradient.
maximum_over_group = define(
    "maximum_over_group(Tensor tensor, str group_name) -> Tensor",
    _maximum,
    _fake_reduced,
    (_no_gradients, _save_nothing),
)
# The sum of all ranks' tensors; its gradient is the sum of all ranks' gradients.
sum_over_group = define(
    "sum_over_group(Tensor tensor, str group_name) -> Tensor", _sum, _fake_reduced, (_sum_gradients, _save_name)
)
# The quotient of all ranks' sums, and their total. An operator of its own, because its backward pass needs one message
# of the size of the context: that of both sums apart, which `_sums_over_group` has, is larger.
_context_over_group = define(
    "context_over_group(Tensor total, Tensor weighted_sum, str group_name) -> (Tensor context, Tensor total)",
    _context,
    _fake_context,
    (_context_gradients, _save_context),
)


class Part(NamedTuple):
    """Some keys and values of this rank, on a grid of their own."""

    key: Tensor  # (B, H, M, K)
    value: Tensor  # (B, H, M, V)
    key_mask: Tensor | None  # (B, M)
    key_shape: tuple[int, ...]


class Alignment:
    """Which positions change ranks so that no window straddles a border of two shards.

    A window belongs to the rank that has its first position; the others hand theirs over: fewer positions than a window
    has, however long the shards are. Windows are counted along the first axis of the grid, by the least common multiple
    of all resolutions.
    """

    def __init__(
        self, key: Tensor, key_mask: Tensor | None, key_shape: Sequence[int], resolutions: Sequence[int], name: str
    ) -> None:
        self._group = process_group(name)
        self._rank = dist.get_rank(self._group)
        # One number of 8 bytes says how long a shard is, and whether it has a mask.
        told = torch.tensor([2 * key_shape[0] + (key_mask is not None)], dtype=torch.int64, device=key.device)
        heard = told.new_empty(dist.get_world_size(self._group))
        dist.all_gather_into_tensor(heard, told, self._group)
        numbers: list[int] = heard.tolist()  # pyright: ignore[reportUnknownVariableType]
        lengths = [number // 2 for number in numbers]
        self._masked = any(number % 2 for number in numbers)
        self._axes = tuple(key_shape[1:])
        self.largest = max(1, sum(lengths), *self._axes)
        multiple = math.lcm(*(min(resolution, max(1, sum(lengths))) for resolution in resolutions))
        row = math.prod(self._axes)
        self._moves = [(*move, rows * row) for *move, rows in _moves(lengths, multiple)]
        handed = sum(count for source, _, count in self._moves if source == self._rank)
        kept = key.shape[2] - handed
        whole = kept - kept % (multiple * row) if row else 0
        self._sizes = [handed, whole, kept - whole]
        self._rows = row

    def parts(self, key: Tensor, value: Tensor, key_mask: Tensor | None) -> tuple[Part, Part]:
        """The aligned shard in two: windows that lie here, without a copy, and the one that other ranks complete."""
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
        return (
            Part(whole_key, whole_value, whole_mask, self._shape(whole_key)),
            Part(rest_key, rest_value, rest_mask, self._shape(rest_key)),
        )

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

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        return (tensor.shape[2] // self._rows if self._rows else 0, *self._axes)


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
