"""Layers whose positions are sharded over processes, and the program that one such process runs.

    python sharded_layers.py <rank> <number of ranks> <folder>

`test_sequence_parallel.py` starts the ranks and joins their files.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lineara.nn import (
    EfficientAttention,
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    EncoderBlock,
    MultiresolutionAttention,
    MultiresolutionAttention2d,
)
from lineara.nn.multiresolution_attention import MultiresolutionAttention3d
from lineara.nn.sequence_parallel import shard_positions

DIM = 12


def _encoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(DIM, DIM),
        EncoderBlock(DIM, EfficientAttention(DIM, 2, normalization="scaling")),
        EncoderBlock(DIM, MultiresolutionAttention(DIM, 3, compression="conv", top_k=2)),
        EncoderBlock(DIM, MultiresolutionAttention(DIM, 2, feature_map="elu")),
    )


# By name: a layer, the shape of its input, the axis of positions, its two shards, and those of the context.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, list[int], list[int] | None]] = {
    "sequence": (partial(EfficientAttention, DIM, 3, scale=0.7), (2, 17, DIM), 1, [4, 13], None),
    "sequence, one rank empty": (partial(EfficientAttention, DIM, 3), (2, 17, DIM), 1, [17, 0], None),
    "cross-attention": (partial(EfficientAttention, DIM, 3), (2, 17, DIM), 1, [4, 13], [10, 1]),
    "multiresolution cross-attention": (partial(MultiresolutionAttention, DIM, 3), (2, 17, DIM), 1, [4, 13], [10, 1]),
    "fewer key heads": (partial(EfficientAttention, DIM, 4, num_key_heads=2), (2, 17, DIM), 1, [4, 13], None),
    "multiresolution, fewer key heads": (
        partial(MultiresolutionAttention, DIM, 4, num_key_heads=2, top_k=2),
        (2, 17, DIM),
        1,
        [4, 13],
        [10, 1],
    ),
    "encoder": (_encoder, (2, 19, DIM), 1, [6, 13], None),
    "1d": (partial(EfficientAttention1d, DIM, 2), (2, DIM, 17), 2, [5, 12], None),
    "2d": (partial(EfficientAttention2d, DIM, 2), (2, DIM, 7, 5), 2, [3, 4], [5, 6]),
    "2d, one rank empty": (partial(EfficientAttention2d, DIM, 2), (2, DIM, 7, 5), 2, [0, 7], None),
    "3d": (partial(EfficientAttention3d, DIM, 2), (2, DIM, 5, 3, 2), 2, [1, 4], None),
    "multiresolution 2d": (partial(MultiresolutionAttention2d, DIM, 3), (2, DIM, 7, 5), 2, [3, 4], None),
    "multiresolution 3d, one rank empty": (
        partial(MultiresolutionAttention3d, DIM, 2, compression="conv"),
        (2, DIM, 5, 3, 2),
        2,
        [5, 0],
        None,
    ),
}
WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": DistributedDataParallel,
    "sharded weights": fully_shard,
    "compiled": partial(torch.compile, fullgraph=True, backend="aot_eager"),
}


def layer_of(name: str) -> nn.Module:
    torch.manual_seed(7)
    return LAYERS[name][0]().double()


def results(layer: nn.Module, name: str, rank: int | None = None) -> dict[str, Tensor]:
    """The output, and the gradients of input, context and weights: of a rank's shard, or of everything."""
    _, shape, axis, lengths, context_lengths = LAYERS[name]
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, weight = draw(*shape), draw(*shape)
    context = draw(*shape[:axis], sum(context_lengths), *shape[axis + 1 :]) if context_lengths else None
    mask = None
    if "encoder" not in name:
        mask = torch.rand(shape[0], sum(context_lengths or lengths), *shape[3:], generator=generator) > 0.3
    if rank is not None:
        x, weight = (tensor.split(lengths, axis)[rank] for tensor in (x, weight))
        context = None if context is None else context.split(context_lengths, axis)[rank]
        mask = None if mask is None else mask.split(context_lengths or lengths, 1)[rank]
    leaves = {"x": x.clone().requires_grad_()}
    if context is not None:
        leaves["context"] = context.clone().requires_grad_()
    output = layer(*leaves.values(), **({} if mask is None else {"key_mask": mask}))
    (output * weight).sum().backward()
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    return {"output": output.detach(), **{key: leaf.grad for key, leaf in leaves.items()}, **gradients}


def wrapped(how: str, rank: int) -> dict[str, Tensor]:
    layer = shard_positions(layer_of("encoder"), dist.group.WORLD)
    found = results(WRAPPED[how](layer), "encoder", rank)
    return {
        key.removeprefix("module.").removeprefix("_orig_mod."): tensor.full_tensor()
        if isinstance(tensor, DTensor)
        else tensor
        for key, tensor in found.items()
    }


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    found: dict[str, Any] = {name: results(shard_positions(layer_of(name), group), name, rank) for name in LAYERS}
    found["copy"] = results(copy.deepcopy(shard_positions(layer_of("encoder"), group)), "encoder", rank)
    for how in WRAPPED:
        found[how] = wrapped(how, rank)
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
