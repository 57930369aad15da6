"""Calls of the operations whose positions are sharded over processes, and the program that one such process runs.

    python sharded_calls.py <rank> <number of ranks> <folder>

The folder gets one file per rank, of what every call gave there; `test_sequence_parallel.py` starts the ranks and joins
their files. Every rank makes the same whole tensors and takes its shard of them.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lineara import ops
from lineara.ops.linear import blocks

BATCH, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5, 7
QUERIES, KEYS = 23, 29
# Lengths of shards, of queries and of keys, by the number of ranks.
SHARDS = {
    "uneven": {1: ([23], [29]), 2: ([19, 4], [6, 23]), 4: ([5, 1, 11, 6], [7, 3, 17, 2])},
    "empty": {1: ([23], [29]), 2: ([23, 0], [0, 29]), 4: ([0, 23, 0, 0], [4, 2, 0, 23])},
    "short": {1: ([23], [29]), 2: ([1, 22], [28, 1]), 4: ([1, 2, 3, 17], [1, 1, 1, 26])},
    "rows": {1: ([23], [35]), 2: ([3, 20], [15, 20]), 4: ([3, 11, 0, 9], [10, 5, 0, 20])},
}


@dataclass(frozen=True)
class Call:
    """One call: of which operation, with which options, on which shards."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    shards: str = "uneven"
    mask: bool = False
    twice: bool = False  # gradients of gradients too
    dtype: torch.dtype = torch.float64
    grid: tuple[int, ...] = ()  # sizes of the key grid beyond its first axis


MULTIRESOLUTION = {"resolutions": (5, 3, 1)}


def _calls() -> dict[str, Call]:
    """Every option with every implementation; shards, masks and second gradients take turns."""
    found: list[Call] = []
    for impl in ("streaming", "reference"):
        for shards, masked in (("uneven", True), ("empty", False)):
            add = partial(Call, shards=shards, mask=masked, twice=impl == "reference" or masked)
            found.append(add("context", {"impl": impl, "scale": 0.7}))
            for normalization in ("softmax", "scaling"):
                found.append(add("efficient_attention", {"impl": impl, "normalization": normalization, "scale": 0.7}))
            for feature_map in ("relu", "elu"):
                found.append(add("kernel_attention", {"impl": impl, "feature_map": feature_map, "scale": 0.7}))
        for i, compression in enumerate(("mean", "max", "conv")):
            add = partial(Call, "multiresolution_attention", twice=impl == "reference" or compression == "conv")
            options = {"impl": impl, "compression": compression}
            for j, feature_map in enumerate(("softmax", "relu", "elu")):
                shards = ("uneven", "empty", "short")[(i + j) % 3]
                found.append(add(MULTIRESOLUTION | options | {"feature_map": feature_map}, shards, (i + j) % 2 == 0))
            found.append(add(options | {"resolutions": (2, 2, 1)}, "rows", True, grid=(5,)))
        options = {"impl": impl, "resolutions": (3, 2, 10**9)}
        found.append(Call("multiresolution_attention", options, "rows", grid=(5,), twice=True))
    for dtype in (torch.float32, torch.bfloat16):
        found.append(Call("efficient_attention", {"impl": "streaming"}, mask=True, dtype=dtype))
        found.append(Call("kernel_attention", {"impl": "streaming"}, mask=True, dtype=dtype))
        found.append(Call("multiresolution_attention", MULTIRESOLUTION | {"impl": "streaming"}, mask=True, dtype=dtype))
    return {_title(call): call for call in found}


def _title(call: Call) -> str:
    options = (str(option).replace(" ", "") for option in call.options.values())
    flags = (name for name, flag in (("masked", call.mask), ("grid", call.grid)) if flag)
    return "-".join((call.name, *options, call.shards, *flags, str(call.dtype).removeprefix("torch.")))


CALLS = _calls()


def results(call: Call, rank: int = 0, num_ranks: int = 1, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Of one shard the output and the gradients of all tensors; where asked for, those of these gradients too."""
    sharded, shared, mask = _whole_tensors(call)
    of_queries, of_keys = SHARDS[call.shards][num_ranks]
    shards = [tensor.split(of_queries if i in (0, 3) else of_keys, 2)[rank] for i, tensor in enumerate(sharded)]
    shard_mask = None if mask is None else mask.split(of_keys, 1)[rank]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*shards, *shared)]
    output = _run(call, leaves, shard_mask, of_keys[rank], group)
    like = torch.linspace(-1.0, 2.0, QUERIES, dtype=output.dtype).split(of_queries)[rank][:, None]
    loss = (output * like).sum()
    given = [output, *torch.autograd.grad(loss, leaves, retain_graph=True)]
    if call.twice:
        # (These come from the reference, the ones above from what was asked for.)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        # (Of shared weights every rank has a share of the gradient only, and any function of it must be linear.)
        factors = [gradient.detach().cos() for gradient in gradients[: len(shards)]] + [3.0 for _ in shared]
        loss = sum((gradient * factor).sum() for gradient, factor in zip(gradients, factors))
        given += [*gradients, *torch.autograd.grad(loss, leaves)]
    return [tensor.detach() for tensor in given]


def joined(call: Call, shards: list[list[Tensor]]) -> list[Tensor]:
    """What the ranks gave, as one process would give it: positions side by side, shares of shared weights added."""
    num_sharded = 4 if call.name == "multiresolution_attention" else 3
    num_leaves = num_sharded + (2 if call.options.get("compression") == "conv" else 0)
    whole: list[Tensor] = []
    for index, tensors in enumerate(zip(*shards)):
        is_sharded = index == 0 or (index - 1) % num_leaves < num_sharded
        whole.append(torch.cat(tensors, dim=2) if is_sharded else torch.stack(tensors).sum(dim=0))
    return whole


def _whole_tensors(call: Call) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(5)
    keys = sum(SHARDS[call.shards][1][1])
    sizes = [(BATCH, HEADS, QUERIES, KEY_DIM), (BATCH, HEADS, keys, KEY_DIM), (BATCH, HEADS, keys, VALUE_DIM)]
    shared: list[tuple[int, ...]] = []
    if call.name == "multiresolution_attention":
        sizes.append((BATCH, HEADS, QUERIES))
        if call.options.get("compression") == "conv":
            largest = max(call.options["resolutions"]) ** (1 + len(call.grid))
            shared = [(HEADS, KEY_DIM, largest), (HEADS, VALUE_DIM, largest)]
    tensors = [
        torch.randn(*size, generator=generator, dtype=torch.float64).to(call.dtype) for size in (*sizes, *shared)
    ]
    mask = torch.rand(BATCH, keys, generator=generator) > 0.4 if call.mask else None
    if mask is not None:
        # A whole rank is masked, in any number of ranks but one, and what is masked is NaN.
        mask[:, -2:] = False
        mask[0, : max(SHARDS[call.shards][4][1][:2])] = False
        for tensor in tensors[1:3]:
            tensor.masked_fill_(~mask[:, None, :, None], torch.nan)
    return tensors[: len(sizes)], tensors[len(sizes) :], mask


def _run(call: Call, leaves: list[Tensor], mask: Tensor | None, keys: int, group: dist.ProcessGroup | None) -> Tensor:
    query, key, value, *others = leaves
    options = {"key_mask": mask, "group": group} | call.options
    if call.name == "context":
        # Of every rank two parts, merged here and then over the group.
        options.pop("group")
        impl = options["impl"]
        middle = keys // 2
        halves = (slice(middle), slice(middle, None))
        parts = [
            ops.summarize_context(
                key[:, :, half], value[:, :, half], **options | {"key_mask": None if mask is None else mask[:, half]}
            )
            for half in halves
        ]
        return ops.attend_context(query, ops.merge_contexts(*parts, group=group), impl=impl)
    if call.name == "multiresolution_attention":
        names = ("gate", "key_weight", "value_weight")
        options |= dict(zip(names, others))
        if call.grid:
            options["key_shape"] = (keys // call.grid[0], *call.grid)
    return getattr(ops, call.name)(query, key, value, **options)


# Traffic.

COUNTED = {
    "efficient_attention softmax": ("efficient_attention", {}),
    "efficient_attention scaling": ("efficient_attention", {"normalization": "scaling"}),
    "kernel_attention": ("kernel_attention", {}),
    "multiresolution_attention softmax": ("multiresolution_attention", MULTIRESOLUTION),
    "multiresolution_attention elu": ("multiresolution_attention", MULTIRESOLUTION | {"feature_map": "elu"}),
}
COMPILED = ("kernel_attention",)  # and a mesh, and a reference; layers are compiled in the tests of nn
LENGTHS = (15, 2025)  # of every shard: whole windows, so that none travels


class Traffic:
    """Bytes that this rank gives to each kind of collective."""

    def __init__(self) -> None:
        self.bytes = {"all_reduce": 0, "all_gather_into_tensor": 0, "batch_isend_irecv": 0}
        for name in self.bytes:
            setattr(dist, name, self._counting(name, getattr(dist, name)))

    def _counting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            tensors = {
                "all_reduce": lambda: [arguments[0]],
                "all_gather_into_tensor": lambda: [arguments[1]],
                "batch_isend_irecv": lambda: [op.tensor for op in arguments[0] if op.op is dist.isend],
            }[name]()
            self.bytes[name] += sum(tensor.nbytes for tensor in tensors)
            return collective(*arguments)

        return counted

    def since_last(self) -> dict[str, int]:
        found = dict(self.bytes)
        self.bytes.update(dict.fromkeys(self.bytes, 0))
        return found


def traffic(operation: str, options: dict[str, Any], impl: str, length: int, counter: Traffic) -> list[dict[str, int]]:
    group = dist.group.WORLD
    sizes = ((length, KEY_DIM), (length, KEY_DIM), (length, VALUE_DIM))
    tensors = [torch.randn(BATCH, HEADS, *size, requires_grad=True) for size in sizes]
    counter.since_last()
    output = getattr(ops, operation)(*tensors, **options, impl=impl, group=group)
    forward = counter.since_last()
    output.sum().backward()
    return [forward, counter.since_last()]


# Wrong calls, meshes, groups of some ranks, compiled calls.


def reason(group: Any) -> str:
    tensor = torch.zeros(1, 1, 2, 3)
    try:
        ops.efficient_attention(tensor, tensor, tensor, group=group)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def compiled_difference(name: str, options: dict[str, Any], group: Any) -> float:
    """The largest difference between a compiled call and the same one, over the output and all gradients."""

    def call(*tensors: Tensor) -> Tensor:
        return getattr(ops, name)(*tensors, **options, group=group)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    rank = dist.get_rank()
    sizes = ((7 + rank, KEY_DIM), (11 - rank, KEY_DIM), (11 - rank, VALUE_DIM))
    generator = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(BATCH, HEADS, *size, generator=generator).double().requires_grad_() for size in sizes]
    both: list[list[Tensor]] = []
    for function in (call, compiled):
        output = function(*tensors)
        both.append([output, *torch.autograd.grad(output.sin().sum(), tensors)])
    return max(float((one - other).detach().abs().max()) for one, other in zip(*both))


# Packed sequences: of every sequence each of two ranks has a part.

PARTS = ((5, 0, 7), (2, 3, 1))


def packed(rank: int | None = None) -> list[Tensor]:
    """For every sequence the output and the gradients of query, key and value: of a rank's parts, or whole."""
    generator = torch.Generator().manual_seed(11)
    lengths = [sum(lengths) for lengths in zip(*PARTS)]
    tensors = [
        [torch.randn(1, HEADS, length, channels, generator=generator).double() for length in lengths]
        for channels in (KEY_DIM, KEY_DIM, VALUE_DIM)
    ]
    if rank is None:
        calls = [[[tensor] for tensor in sequence] for sequence in zip(*tensors)]
    else:
        calls = [
            [[tensor.split([part[i] for part in PARTS], 2)[rank] for i, tensor in enumerate(kind)] for kind in tensors]
        ]
    results: list[Tensor] = []
    for call in calls:
        leaves = [torch.cat(kind, dim=2).requires_grad_() for kind in call]
        options: dict[str, Any] = {}
        if rank is not None:
            ends = torch.tensor([0, *PARTS[rank]]).cumsum(0, dtype=torch.int32)
            options = {"cu_seqlens_query": ends, "cu_seqlens_key": ends, "group": dist.group.WORLD}
        output = ops.efficient_attention(*leaves, **options)
        given = [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]
        sizes = lengths[len(results) // 4 :][:1] if rank is None else list(PARTS[rank])
        split = [tensor.split(sizes, 2) for tensor in given]
        results += [kind[i] for i in range(len(sizes)) for kind in split]
    return results


def main(rank: int, num_ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    # Blocks so small that every shard has several.
    blocks._BLOCK_ELEMENTS = 60
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(folder / "store"), num_ranks), rank=rank, world_size=num_ranks
    )
    found: dict[str, Any] = {title: results(call, rank, num_ranks, dist.group.WORLD) for title, call in CALLS.items()}
    if num_ranks == 2:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        some = next(title for title, call in CALLS.items() if call.name == "multiresolution_attention")
        found["mesh"] = (some, results(CALLS[some], rank, num_ranks, mesh))
        square = dist.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "sequence"))
        first = dist.new_group([0])
        found["reasons"] = {
            "square": reason(square),
            "member": reason(first),
            "mesh member": reason(dist.device_mesh.DeviceMesh("cpu", [0])),
            "name": reason("sequence"),
            "dimension": reason(square["sequence"]),
        }
        counter = Traffic()
        found["traffic"] = {
            (title, impl, length): traffic(*call, impl, length, counter)
            for title, call in COUNTED.items()
            for impl in ("streaming", "reference")
            for length in LENGTHS
        }
        found["halo"] = {
            impl: traffic("multiresolution_attention", MULTIRESOLUTION, impl, 16, counter)
            for impl in ("streaming", "reference")
        }
        compiled = {title: (*COUNTED[title], dist.group.WORLD) for title in COMPILED}
        compiled["reference"] = ("efficient_attention", {"impl": "reference"}, dist.group.WORLD)
        compiled["mesh"] = ("efficient_attention", {}, mesh)
        found["compiled"] = {title: compiled_difference(*call) for title, call in compiled.items()}
        found["packed"] = packed(rank)
    if num_ranks == 4:
        odd = dist.new_group([1, 3])
        if rank in (1, 3):
            found["odd"] = {title: results(call, rank // 2, 2, odd) for title, call in CALLS.items() if call.grid}
    dist.barrier()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
