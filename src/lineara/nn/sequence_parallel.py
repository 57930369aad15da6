"""Layers whose positions are sharded over the ranks of a process group."""

from typing import TYPE_CHECKING, TypeVar

from torch import nn

from lineara.nn.non_local_attention import NonLocalAttention2d, NonLocalAttention3d
from lineara.nn.sequence_attention import ShardedPositions
from lineara.nn.softmax_attention import SoftmaxAttention
from lineara.ops.sequence_parallel import name_of_group

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group

# They need the keys of all ranks, not sums over them.
_EVERY_KEY = (SoftmaxAttention, NonLocalAttention2d, NonLocalAttention3d, nn.MultiheadAttention)

Module = TypeVar("Module", bound=nn.Module)


def shard_positions(module: Module, group: "Group") -> Module:
    """Let every attention layer of a module attend from this rank's positions to those of all ranks of a group.

    From then on every rank calls the module with its own part of the positions, in the order of ranks for layers with
    resolutions: consecutive parts of a sequence, of the height of a map, of the depth of a volume; masks and the
    context of cross-attention likewise. Parts may differ in length and be empty. What else the module does must act on
    every position alone, as linear maps, layer norms and dropout do; convolutions of more than one position, batch
    norms, pooling and encodings of positions do not, and are not looked for. Weights are the same on all ranks; the
    gradients that a rank finds are its share of those of the sum of all ranks' losses.

    Args:
        module: a layer of `lineara.nn`, or anything that contains some; changed in place.
        group: a torch.distributed ProcessGroup or a DeviceMesh of one dimension; None: all positions are here again.

    Returns:
        The module.

    Raises:
        ValueError: for a module without such a layer or with softmax attention, whose cost and traffic are those of all
            positions, or a group that this rank cannot talk to. Nothing is changed then.
        TypeError: for a module or a group that is none.

    Cost: none here; in every call the messages of the operation, whatever the number of positions.

    Source: ours; see docs/sequence_parallel.md.
    """
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}; pass a network or a layer")
    name_of_group(group)
    for name, layer in module.named_modules():  # pyright: ignore[reportUnknownVariableType] - torch types it in part
        if isinstance(layer, _EVERY_KEY):
            raise ValueError(
                "module must not contain softmax attention, which needs the keys of all ranks, got "
                f"{type(layer).__name__}{f' at {name}' if name else ''}; use EfficientAttention in its place"
            )
    layers = [layer for layer in module.modules() if isinstance(layer, ShardedPositions)]
    if not layers:
        raise ValueError(
            f"module must contain an attention layer of lineara.nn, got {type(module).__name__} without one"
        )
    for layer in layers:
        layer.group = group
    return module
