"""Positions sharded over the ranks of a process group: what the operations exchange, and its gradients.

Every rank calls an operation with its own queries, keys and values, and gets the answers to its own queries from the
keys of all ranks. Only sums over positions travel, whatever the number of positions: see docs/sequence_parallel.md.
A gradient is that of the sum over ranks of every rank's loss, so every rank takes part in every backward pass.

Letters in comments: B batch, H heads, K key channels, V value channels.
"""

# pyright: reportUnknownMemberType=false
# (torch.distributed and torch.library type their functions only in part)

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lineara.ops.library import define, reference_gradients
from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.reference import finite_shift, quotient
from lineara.ops.tracing import transform_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    Group = ProcessGroup | DeviceMesh | None


def name_of_group(group: "Group", *tensors: Tensor | None) -> str:
    """The name under which torch knows the group, "" for None; raise unless this rank can talk to its ranks.

    And raise where the tensors are transformed, or have tangents, which messages would lose.
    """
    if group is None:
        return ""
    if transform := transform_of(*tensors):
        raise ValueError(
            f"group must be None under {transform}, got {type(group).__name__}; gather all positions on one rank"
        )
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
    maximum = maximum_over_group(summary[0].detach(), group_name)
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
maximum_over_group = define("maximum_over_group(Tensor tensor, str group_name) -> Tensor", _maximum, _fake_reduced)
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
