"""Layers whose projections are split over processes, and the program that one such process runs.

    python parallel_layers.py <rank> <number of ranks> <folder>

`test_tensor_parallel.py` starts the ranks and compares their files.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, EncoderBlock, MultiresolutionAttention, SoftmaxAttention

with warnings.catch_warnings():  # torch itself imports what it has deprecated
    warnings.simplefilter("ignore", FutureWarning)
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

DIM, CONTEXT_DIM = 12, 10
COLUMNS, ROWS = ColwiseParallel, RowwiseParallel
PLAN = {"query": COLUMNS, "key": COLUMNS, "value": COLUMNS, "output": ROWS}


def _encoder() -> nn.Module:
    return EncoderBlock(DIM, EfficientAttention(DIM, 4, normalization="scaling"))


# By name: a layer, how it is split, whether there is a context, and a mask.
LAYERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], bool, bool]] = {
    "efficient": (partial(EfficientAttention, DIM, 4, key_dim=20), PLAN, False, False),
    "efficient, masked": (partial(EfficientAttention, DIM, 2, scale=0.7), PLAN, False, True),
    "efficient, context": (partial(EfficientAttention, DIM, 4, context_dim=CONTEXT_DIM), PLAN, True, True),
    "efficient, fewer key heads": (partial(EfficientAttention, DIM, 4, num_key_heads=2), PLAN, False, True),
    "softmax": (partial(SoftmaxAttention, DIM, 4, value_dim=20), PLAN, False, False),
    "softmax, masked": (partial(SoftmaxAttention, DIM, 2), PLAN, False, True),
    "softmax, context": (partial(SoftmaxAttention, DIM, 4, context_dim=CONTEXT_DIM), PLAN, True, True),
    "encoder": (
        _encoder,
        {f"attention.{name}": style for name, style in PLAN.items()} | {"mlp.0": COLUMNS, "mlp.3": ROWS},
        False,
        True,
    ),
}
# What cannot be split so: a layer, how one tries.
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "cut heads": (partial(EfficientAttention, DIM, 3), PLAN),
    "cut key heads": (partial(EfficientAttention, DIM, 2, num_key_heads=1), PLAN),
    "all but output": (
        partial(EfficientAttention, DIM, 4),
        {key: style for key, style in PLAN.items() if style is COLUMNS},
    ),
    "output alone": (partial(EfficientAttention, DIM, 4), {"output": ROWS}),
    "split queries alone": (partial(SoftmaxAttention, DIM, 4), {"query": COLUMNS, "output": ROWS}),
    "one key head, whole": (
        partial(EfficientAttention, DIM, 4, num_key_heads=1),
        {"query": COLUMNS, "output": ROWS},
    ),
    "split keys alone": (partial(EfficientAttention, DIM, 4), {"key": COLUMNS, "value": COLUMNS}),
    "multiresolution": (partial(MultiresolutionAttention, DIM, 4), PLAN),
}


def layer_of(name: str) -> nn.Module:
    torch.manual_seed(7)
    return (LAYERS | REFUSED)[name][0]().double()


def result(layer: nn.Module, name: str) -> dict[str, Tensor]:
    """The output, and the gradients of input and context."""
    _, _, across, masked = LAYERS[name]
    generator = torch.Generator().manual_seed(3)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    leaves = [draw(2, 17, DIM).requires_grad_()]
    if across:
        leaves.append(draw(2, 19, CONTEXT_DIM).requires_grad_())
    mask = torch.rand(2, leaves[-1].shape[1], generator=generator) > 0.3 if masked else None
    output = layer(*leaves, key_mask=mask)
    (output * draw(2, 17, DIM)).sum().backward()
    found = {"output": output.detach(), **{f"leaf {i}": leaf.grad for i, leaf in enumerate(leaves)}}
    return {key: tensor + 0.0 for key, tensor in found.items()}  # which waits for what is still on its way


def split(name: str, mesh: Any) -> nn.Module:
    plan = (LAYERS | REFUSED)[name][1]
    return parallelize_module(layer_of(name), mesh, {key: style() for key, style in plan.items()})


def refusal(name: str, mesh: Any) -> str:
    try:
        split(name, mesh)(torch.ones(2, 17, DIM, dtype=torch.float64))
    except ValueError as error:
        return str(error)
    return "nothing"


def reset() -> dict[str, Tensor]:
    """The weights of a network made without memory, sharded, and reset."""
    with torch.device("meta"):
        network = SequenceClassifier(
            11, 5, 23, attention=partial(MultiresolutionAttention, num_heads=3, compression="conv"), dim=6
        )
    fully_shard(network).to_empty(device="cpu")
    for parameter in network.parameters():
        nn.init.constant_(parameter, torch.nan)
    with warnings.catch_warnings():  # of random numbers, whose being the same on all ranks does not matter here
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    return {key: parameter.detach().full_tensor() for key, parameter in network.named_parameters()}


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    mesh = dist.device_mesh.init_device_mesh("cpu", (num_ranks,))
    found: dict[str, Any] = {name: result(split(name, mesh), name) for name in LAYERS}
    found |= {name: refusal(name, mesh) for name in REFUSED}
    found["reset"] = reset()
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
