"""The plan on paper of docs/scale.md: what an encoder would need on 1 to 1,024 GPUs, and what can be checked here.

    python benchmarks/scale_plan.py

The first part holds the plan's formulas against what torch counts and what this machine measures. The second is
arithmetic with assumed hardware, and says so: nothing of it has been run.
"""

import argparse
import math
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lineara.measure import peak_memory
from lineara.measure.machine import environment
from lineara.nn import EfficientAttention, EncoderBlock

DIM, HEAD_DIM, LAYERS = 1024, 64, 24
RANKS = (1, 8, 64, 256, 1024)
INPUTS = {
    "image of 16,384 x 16,384, patches of 4 x 4": 4096**2,
    "image of 16,384 x 16,384, every pixel": 16384**2,
    "sequence of 100 million": 100_000_000,
}
# Assumptions: an H200 by its data sheet, and a network of 400 Gbit/s for each GPU.
GPU_BYTES, USABLE = 141e9, 0.8
FLOPS_A_SECOND, USED = 989e12, 0.4
NETWORK_BYTES_A_SECOND, LATENCY = 50e9, 10e-6
# Tensors of (positions, dim) beside a block's input at the worst moment of its backward pass.
WORKING_TENSORS = 21


def block_flops(positions: int, dim: int) -> int:
    """Forward: four projections and a feed-forward part four times as wide, context and answers."""
    return positions * (24 * dim**2 + 4 * dim * HEAD_DIM)


def traffic(dim: int) -> tuple[int, int]:
    """Bytes that a rank gives to the all-reduces of a layer, forward and backward, whatever the positions."""
    heads = dim // HEAD_DIM
    return 4 * heads * (2 * HEAD_DIM + HEAD_DIM**2), 4 * heads * HEAD_DIM**2


def memory_bytes(positions: float, ranks: int) -> float:
    """bfloat16 activations, of every block its input and of one all; weights and Adam, spread over the ranks."""
    activations = 2 * DIM * positions * (LAYERS + WORKING_TENSORS)
    return activations + 16 * 12 * DIM**2 * LAYERS / ranks + 2 * 2 * 12 * DIM**2


def most_positions(ranks: int) -> float:
    """That fit on one rank."""
    return (USABLE * GPU_BYTES - memory_bytes(0, ranks)) / (memory_bytes(1, ranks) - memory_bytes(0, ranks))


def seconds(positions: float, ranks: int) -> tuple[float, float]:
    """Of a training step: arithmetic (forward, forward again, backward), and the all-reduces of all layers."""
    compute = 4 * LAYERS * block_flops(1, DIM) * positions / (FLOPS_A_SECOND * USED)
    if ranks == 1:
        return compute, 0.0
    moved = 2 * (1 - 1 / ranks) * (2 * traffic(DIM)[0] + traffic(DIM)[1])  # the forward pass is computed twice
    messages = 5 * 2 * math.log2(ranks) * LATENCY
    return compute, LAYERS * (moved / NETWORK_BYTES_A_SECOND + messages)


def plan() -> str:
    lines = [
        f"{LAYERS} blocks of {DIM} channels, heads of {HEAD_DIM}: {12 * DIM**2 * LAYERS / 1e6:.0f} million weights.",
        "",
        "| input | GPUs | positions per GPU | memory per GPU | fits | arithmetic | all-reduces | share of the step |",
        "|---|--:|--:|--:|---|--:|--:|--:|",
    ]
    for name, positions in INPUTS.items():
        for ranks in RANKS:
            mine = positions / ranks
            compute, network = seconds(mine, ranks)
            fits = "yes" if mine <= most_positions(ranks) else "no"
            memory = f"{readable(memory_bytes(mine, ranks) / 1e9)} GB"
            times = f"{readable(compute)} s | {network * 1e3:.3g} ms | {network / (network + compute):.2%}"
            lines.append(f"| {name} | {ranks:,} | {mine:,.0f} | {memory} | {fits} | {times} |")
    lines += ["", "| what | GPUs | |", "|---|--:|--:|"]
    forward, backward = traffic(DIM)
    lines.append(f"| bytes that a GPU gives to the all-reduces of a layer, forward | any | {forward:,} |")
    lines.append(f"| the same, backward | any | {backward:,} |")
    for name, positions in INPUTS.items():
        lines.append(f"| keys and values of a layer, {name} | | {readable(4 * DIM * positions / 1e9)} GB |")
    for ranks in RANKS:
        millions = readable(most_positions(ranks) * ranks / 1e6)
        lines.append(f"| positions that fit | {ranks:,} | {millions} million |")
    return "\n".join(lines)


def readable(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def checks() -> str:
    lines = ["| formula | says | found | found / said |", "|---|--:|--:|--:|"]
    for dim in (256, 512):
        block = EncoderBlock(dim, EfficientAttention(dim, num_heads=dim // HEAD_DIM))
        with FlopCounterMode(display=False) as counter:
            block(torch.randn(1, 1000, dim))
        found, said = counter.get_total_flops(), block_flops(1000, dim)
        lines.append(
            f"| operations of a block of {dim} channels, 1,000 positions | {said:,} | {found:,} | {found / said:.3f} |"
        )
    for dim, positions in ((256, 65536), (512, 65536)):
        # (The process that is measured must be able to import it.)
        found = peak_memory(partial(import_module(Path(__file__).stem).block_call, dim, positions))
        said = WORKING_TENSORS * positions * dim * 4
        what = f"bytes of its forward and backward pass, {dim} channels, {positions:,} positions, float32"
        lines.append(f"| {what} | {said:,} | {found:,} | {found / said:.3f} |")
    return "\n".join(lines)


def block_call(dim: int, positions: int):
    block = EncoderBlock(dim, EfficientAttention(dim, num_heads=dim // HEAD_DIM))
    x = torch.randn(1, positions, dim, requires_grad=True)
    gradient = torch.randn(1, positions, dim)
    block(x[:, :64]).sum().backward()
    x.grad = torch.ones_like(x)
    return lambda: block(x).backward(gradient)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"# A plan on paper\n\n{environment(Path(__file__).parent)}\n")
    print(f"## The formulas, held against this machine\n\n{checks()}\n\n## The plan, not run\n\n{plan()}")


if __name__ == "__main__":
    main()
