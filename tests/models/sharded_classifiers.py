"""Classifiers whose positions are shared among processes, and the program that one such process runs.

    python sharded_classifiers.py <rank> <number of ranks> <folder>

`test_sequence_classifier.py` starts the ranks and compares their files.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, MultiresolutionAttention
from lineara.nn.router import Router

VOCAB, CLASSES, MAX_LEN, BATCH = 11, 5, 23, 3


class Case(NamedTuple):
    attention: Callable[[int], nn.Module]
    positions: int
    lengths: list[int] | None = None  # valid positions of each sequence; None: no mask
    num_sequences: int = 1


CASES = {
    "mask": Case(partial(EfficientAttention, num_heads=2), 17, [17, 5, 11]),
    "one rank sees padding alone": Case(partial(EfficientAttention, num_heads=2), 17, [7, 3, 0]),
    "no mask": Case(partial(EfficientAttention, num_heads=3, normalization="scaling"), 23),
    "one position": Case(partial(EfficientAttention, num_heads=2), 1),
    "pairs": Case(partial(EfficientAttention, num_heads=2), 13, [13, 2, 5, 7, 3, 11], 2),
    "multiresolution": Case(
        partial(MultiresolutionAttention, num_heads=3, compression="conv", top_k=2), 19, [19, 5, 11]
    ),
    "multiresolution, one position": Case(partial(MultiresolutionAttention, num_heads=2), 1),
    "multiresolution pairs": Case(partial(MultiresolutionAttention, num_heads=2), 13, [13, 2, 5, 7, 3, 11], 2),
}
WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "replicated": DistributedDataParallel,
    "sharded weights": fully_shard,
}
LEARNS = "multiresolution"  # the case that is trained


def classifier_of(name: str) -> SequenceClassifier:
    torch.manual_seed(7)
    case = CASES[name]
    network = SequenceClassifier(
        VOCAB,
        CLASSES,
        MAX_LEN,
        attention=case.attention,
        dim=6,
        mlp_dim=7,
        head_dim=13,
        dropout=0.0,
        num_sequences=case.num_sequences,
    )
    return network.double()


def batch_of(name: str) -> dict[str, Tensor | None]:
    _, positions, lengths, num_sequences = CASES[name]
    generator = torch.Generator().manual_seed(3)
    shape = (BATCH, positions) if num_sequences == 1 else (BATCH, num_sequences, positions)
    tokens = torch.randint(1, VOCAB, shape, generator=generator)
    if lengths is None:
        return {"tokens": tokens, "mask": None}
    mask = (torch.arange(positions) < torch.tensor(lengths)[:, None]).view(shape)
    return {"tokens": tokens * mask, "mask": mask}


def loss_of(network: nn.Module, name: str) -> tuple[Tensor, Tensor]:
    logits = network(**batch_of(name))
    return logits, cross_entropy(logits, torch.arange(BATCH))


def results(network: nn.Module, name: str) -> dict[str, Tensor]:
    """The logits, and the gradients of all weights."""
    logits, loss = loss_of(network, name)
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in network.named_parameters()}
    return {"logits": logits.detach(), **gradients}


def balanced(network: nn.Module, parts: list[slice] | None = None) -> dict[str, Tensor]:
    """The gradients with load balancing: of a rank's own positions, or the mean over parts of all positions."""
    routers = [module for module in network.modules() if isinstance(module, Router)]
    logits: list[Tensor] = []
    for router in routers:
        router.logits.register_forward_hook(lambda _, __, found: logits.append(found))
    loss = loss_of(network, LEARNS)[1]
    if parts is None:
        terms = [router.last.load_balancing for router in routers]
    else:
        mask = batch_of(LEARNS)["mask"]
        terms = [_term(found[:, part], mask[:, part]) / len(parts) for found in logits for part in parts]
    (loss + 0.3 * sum(terms)).backward()
    return {key: parameter.grad for key, parameter in network.named_parameters()}


def _term(logits: Tensor, mask: Tensor) -> Tensor:
    """Heads times the sum over heads of share of the top 2 choices x mean probability, of (batch, positions, heads)."""
    probability = logits[mask].softmax(dim=1)  # (valid, heads)
    load = torch.bincount(probability.topk(2, dim=1).indices.flatten(), minlength=3).double() / (2 * len(probability))
    return 3 * (load * probability.mean(dim=0)).sum()


def learned(network: nn.Module) -> dict[str, Tensor]:
    """The weights after three steps."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(network, LEARNS)[1].backward()
        optimizer.step()
    return {
        key.removeprefix("module."): weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
        for key, weight in network.named_parameters()
    }


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    group = dist.group.WORLD
    found: dict[str, Any] = {name: results(classifier_of(name).shard_positions(group), name) for name in CASES}
    copied = copy.deepcopy(classifier_of(LEARNS).shard_positions(group))
    found["copy"] = results(copied, LEARNS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (num_ranks,), mesh_dim_names=("sequence",))
    seen: list[int] = []
    network = classifier_of(LEARNS).shard_positions(mesh)
    network.norm.register_forward_hook(lambda _, __, x: seen.append(x.shape[1]))
    found["mesh"] = results(network, LEARNS)
    found["positions"] = seen
    found["whole again"] = loss_of(network.shard_positions(None), LEARNS)[0].detach()
    found["balanced"] = balanced(classifier_of(LEARNS).shard_positions(group))
    for how, wrap in WRAPPED.items():
        found[how] = learned(wrap(classifier_of(LEARNS).shard_positions(group)))
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
