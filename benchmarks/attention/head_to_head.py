"""What a user would write, call by call, against this library on the CPU: ahead, level or behind.

    python benchmarks/attention/head_to_head.py > benchmarks/results/head-to-head-<hardware>-<yyyy-mm>.md

In every round each contender of a row is called once, in random order, in one process on one thread. A ratio is the
contender's median time by ours: above 1.03 we are ahead, below 0.97 behind, level between. The last column is the
spread of our times by their median, from the tenth to the ninetieth percentile: differences below it mean nothing.
A quiet machine is the caller's business.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY / "benchmarks")]

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, scaled_dot_product_attention

from attention.contenders import channels_first
from attention.rounds import Step, time_in_rounds
from lineara.measure.cost import plain
from lineara.measure.machine import environment
from lineara.nn import EfficientAttention, EfficientAttention2d
from lineara.ops import efficient_attention, kernel_attention

BEHIND, AHEAD = 0.97, 1.03
_Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Cell:
    """One row: the call of this library and those that it is compared with, on the same inputs."""

    part: str
    name: str
    ours: _Call
    peers: dict[str, _Call]
    inputs: Sequence[Tensor]
    gradients: bool = False
    weights: Sequence[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.name}, {'forward + backward' if self.gradients else 'forward'}"


# What users write.


def plain_elu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = elu(query) + 1, elu(key) + 1
    return query @ (key.mT @ value) / (query @ key.sum(2)[..., None])


def plain_masked(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor) -> Tensor:
    key = key.masked_fill(~key_mask[:, None, :, None], -torch.inf)
    return plain(query, key, value)


class PerHead(nn.Module):
    """Efficient attention on maps as the authors' module has it: one head after the other, joined by cat."""

    def __init__(self, layer: EfficientAttention2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, heads = self.layer, self.layer.num_heads
        maps = (part(x).flatten(2).chunk(heads, 1) for part in (layer.queries, layer.keys, layer.values))
        attended = [
            (key.softmax(2) @ value.mT).mT @ query.softmax(1)  # (B, V, N)
            for query, key, value in zip(*maps)
        ]
        return layer.reprojection(torch.cat(attended, 1).unflatten(2, x.shape[2:])) + x


class Plain(nn.Module):
    """The layer for sequences around the plain composition."""

    def __init__(self, layer: EfficientAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        query, key, value = (
            part(x).unflatten(2, (layer.num_heads, -1)).transpose(1, 2)
            for part in (layer.query, layer.key, layer.value)
        )
        return layer.output(plain(query, key, value).transpose(1, 2).flatten(2))


# The rows.


def both(**cell: Any) -> Iterator[Cell]:
    """A row without gradients and one with."""
    inputs = cell.pop("inputs")
    for gradients in (False, True):
        given = [tensor.detach().requires_grad_(gradients and tensor.is_floating_point()) for tensor in inputs]
        yield Cell(inputs=given, gradients=gradients, **cell)


def compiled(call: _Call) -> _Call:
    return torch.compile(call, dynamic=False, fullgraph=True)


def cells() -> Iterator[Cell]:
    def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(shape, dtype=dtype) for _ in range(3)]

    for heads in (1, 8):
        for length in (64, 256, 1024, 4096, 16384, 65536):
            peers = {"plain": channels_first}
            if heads == 8 and length in (1024, 4096):
                peers["compiled"] = compiled(channels_first)
            yield from both(
                part="maps",
                name=f"efficient_attention (1, {heads}, {length}, 64), channels first",
                ours=lambda *maps: efficient_attention(*(tensor.mT for tensor in maps)).mT,
                peers=peers,
                inputs=tensors(1, heads, 64, length),
            )
    for channels, side, heads in ((64, 64, 1), (64, 256, 1), (256, 64, 8)):
        layer = EfficientAttention2d(channels, heads)
        yield from both(
            part="maps",
            name=f"EfficientAttention2d, {channels} x {side} x {side}, {heads} head{'s' * (heads > 1)}",
            ours=layer,
            peers={"authors' form": PerHead(layer)},
            inputs=tensors(1, channels, side, side)[:1],
            weights=list(layer.parameters()),
        )
    for length in (64, 196, 256, 1024, 4096, 16384, 65536):
        peers = {"plain": plain}
        if length in (1024, 4096):
            peers |= {"compiled": compiled(plain)}
        if length <= 4096:
            peers |= {"SDPA": scaled_dot_product_attention}
        yield from both(
            part="sequences",
            name=f"efficient_attention (1, 8, {length}, 64)",
            ours=efficient_attention,
            peers=peers,
            inputs=tensors(1, 8, length, 64),
        )
    for length in (64, 196, 1024, 4096, 65536):
        yield from both(
            part="sequences",
            name=f"kernel_attention, elu, (1, 8, {length}, 64)",
            ours=kernel_attention,
            peers={"plain": plain_elu} | ({"compiled": compiled(plain_elu)} if length in (1024, 4096) else {}),
            inputs=tensors(1, 8, length, 64),
        )
    for length in (256, 1024, 16384):
        yield from both(
            part="bfloat16",
            name=f"efficient_attention (1, 8, {length}, 64), bfloat16",
            ours=efficient_attention,
            peers={"plain": plain},
            inputs=tensors(1, 8, length, 64, dtype=torch.bfloat16),
        )
    for batch, heads, length, channels in ((4096, 4, 16, 16), (1024, 3, 49, 32), (64, 6, 196, 64)):
        yield from both(
            part="many short sequences",
            name=f"efficient_attention ({batch}, {heads}, {length}, {channels}), layers' layout",
            ours=efficient_attention,
            peers={"plain": plain},
            inputs=[tensor.transpose(1, 2) for tensor in tensors(batch, length, heads, channels)],
        )
    for batch, heads, length in ((32, 2, 1024), (8, 8, 512)):
        key_mask = torch.arange(length) < torch.linspace(length // 2, length, batch)[:, None]
        yield from both(
            part="masks",
            name=f"efficient_attention ({batch}, {heads}, {length}, 64), layers' layout, a quarter masked",
            ours=lambda query, key, value, key_mask: efficient_attention(query, key, value, key_mask=key_mask),
            peers={"plain": plain_masked},
            inputs=[*(tensor.transpose(1, 2) for tensor in tensors(batch, length, heads, 64)), key_mask],
        )
    yield from both(
        part="short calls",
        name="efficient_attention (1, 1, 16, 16)",
        ours=efficient_attention,
        peers={"plain": plain, "SDPA": scaled_dot_product_attention},
        inputs=tensors(1, 1, 16, 16),
    )
    for batch, length, dim, heads in ((1, 64, 256, 4), (8, 128, 768, 12), (8, 196, 384, 6)):
        layer = EfficientAttention(dim, heads).eval()
        softmax = nn.MultiheadAttention(dim, heads, batch_first=True).eval()
        yield from both(
            part="layers",
            name=f"EfficientAttention, {batch} x {length} positions x {dim} channels",
            ours=layer,
            peers={"plain": Plain(layer), "nn.MultiheadAttention": partial(of_itself, softmax)},
            inputs=tensors(batch, length, dim)[:1],
            weights=[*layer.parameters(), *softmax.parameters()],
        )


def of_itself(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def step(cell: Cell, call: _Call) -> Step:
    wanted = [tensor for tensor in (*cell.inputs, *cell.weights) if tensor.requires_grad]

    def run() -> object:
        if not cell.gradients:
            with torch.no_grad():
                return call(*cell.inputs)
        output = call(*cell.inputs)
        return output, torch.autograd.grad(output, wanted, torch.ones_like(output), allow_unused=True)

    return Step(lambda turn: run)


def verdict(ratio: float) -> str:
    return "behind" if ratio < BEHIND else "ahead" if ratio > AHEAD else "level"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the calls of one contender in one row")
    parser.add_argument("--only", default="", help="rows whose text holds this, such as 'maps' or '4096'")
    parser.add_argument("--no_compile", action="store_true", help="leave out compiled contenders, which need minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("# Head to head on the CPU\n")
    print('float32 unless it says bfloat16, `impl="auto"`, gradients of all inputs and weights.', end=" ")
    print(f"{environment(REPOSITORY)}\n")
    print("| call | contender | ms | contender / ours | verdict | calls | our spread |")
    print("|---" * 7 + "|")
    verdicts: Counter[str] = Counter()
    for cell in cells():
        if options.only not in f"{cell.part}: {cell}":
            continue
        peers = {name: peer for name, peer in cell.peers.items() if not (options.no_compile and name == "compiled")}
        steps = {name: step(cell, call) for name, call in (("lineara", cell.ours), *peers.items())}
        spreads, failures = time_in_rounds(steps, device="cpu", max_seconds=options.seconds)
        for error in failures.values():
            raise error
        ours = spreads.pop("lineara")
        spread = f"{ours.low / ours.median:.2f} to {ours.high / ours.median:.2f}"
        for name, theirs in spreads.items():
            ratio = theirs.median / ours.median
            verdicts[verdict(ratio)] += 1
            print(
                f"| {cell} | {name} | {ours.median * 1e3:.3f} | {ratio:.2f} | {verdict(ratio)} | {ours.repeats} | "
                f"{spread} |",
                flush=True,
            )
    print(f"\nCells: {verdicts['ahead']} ahead, {verdicts['level']} level, {verdicts['behind']} behind.")


if __name__ == "__main__":
    main()
