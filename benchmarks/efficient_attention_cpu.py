"""Efficient attention on the CPU against the plain composition, the popular package's form, and dot-product attention.

    python benchmarks/efficient_attention_cpu.py > benchmarks/results/efficient-attention-cpu-<hardware>-<yyyy-mm>.md

Times are medians over rounds in one process; in every round each contender is called once, in random order, so that
whatever else the machine does meets all of them. Memory is each contender's own fresh process (see `lineara.measure`).
A quiet machine is the caller's business.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lineara.measure import Case, measure_costs
from lineara.measure.machine import environment
from lineara.ops import efficient_attention, softmax_attention

HEADS, HEAD_DIM = 8, 64
LENGTHS = (256, 512, 1024, 2048, 4096, 16384, 65536)
LONGEST_SOFTMAX = 16384


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.softmax(dim=3) @ (key.softmax(dim=2).mT @ value)


def einsum(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    context = torch.einsum("bhnd,bhne->bhde", key.softmax(dim=2), value)
    return torch.einsum("bhnd,bhde->bhne", query.softmax(dim=3), context)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "lineara": lambda *tensors: efficient_attention(*tensors, impl="streaming"),
    "plain": plain,
    "einsum": einsum,
    "softmax": softmax_attention,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of one row")
    parser.add_argument("--positions", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()

    print("# Efficient attention on the CPU\n")
    print(f"{HEADS} heads of {HEAD_DIM} channels, float32, batch 1. {environment(Path(__file__).parent)}\n")
    print("`lineara` is `ops.efficient_attention(impl='streaming')`, which `impl='auto'` picks on a CPU; `plain` is")
    print("`q.softmax(-1) @ (k.softmax(-2).mT @ v)`; `einsum` the same as two einsums; `softmax` torch's own")
    print("scaled_dot_product_attention. Milliseconds are medians; in brackets the extremes of all rounds.\n")
    for backward in (False, True):
        print(f"## {'Forward and backward' if backward else 'Forward'}\n")
        ratios = "plain / lineara | einsum / lineara | softmax / lineara"
        print(f"| positions | rounds | {' | '.join(CONTENDERS)} | {ratios} |")
        print("|---|---|---|---|---|---|---|---|---|")
        for positions in options.positions:
            print(row(positions, backward, options.seconds), flush=True)
        print()
    memory_table()


def row(positions: int, backward: bool, max_seconds: float) -> str:
    tensors = [torch.randn(1, HEADS, positions, HEAD_DIM, requires_grad=backward) for _ in range(3)]
    names = [name for name in CONTENDERS if name != "softmax" or positions <= LONGEST_SOFTMAX]
    expected = plain(*tensors)
    torch.testing.assert_close(CONTENDERS["lineara"](*tensors), expected, rtol=1e-4, atol=1e-6)
    gradient = torch.randn_like(expected)

    def call(name: str) -> float:
        start = time.perf_counter()
        output = CONTENDERS[name](*tensors)
        if backward:
            torch.autograd.grad(output, tensors, gradient)
        return time.perf_counter() - start

    for name in names:
        call(name)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + max_seconds
    while (time.perf_counter() < end and len(times["plain"]) < 500) or len(times["plain"]) < 5:
        # In random order: nobody always finds the same neighbour's leavings in the cache.
        for name in random.sample(names, len(names)):
            times[name].append(call(name))
    medians = {name: statistics.median(times[name]) for name in names}
    cells = [
        f"{1e3 * medians[name]:.4g} ({1e3 * min(times[name]):.3g}-{1e3 * max(times[name]):.3g})"
        if name in names
        else "not measured"
        for name in CONTENDERS
    ]
    ratios = [
        f"{medians[name] / medians['lineara']:.2f}" if name in names else "" for name in ("plain", "einsum", "softmax")
    ]
    return f"| {positions} | {len(times['plain'])} | {' | '.join(cells + ratios)} |"


def memory_table() -> None:
    print("## Peak memory of forward and backward, beyond inputs, output and gradients (MB)\n")
    print("| positions | lineara | plain | einsum |")
    print("|---|---|---|---|")
    for positions in (4096, 16384, 65536):
        names = ("efficient", "plain", "einsum")
        costs = measure_costs([Case(name, positions, True, heads=HEADS, head_dim=HEAD_DIM) for name in names])
        print(f"| {positions} | {' | '.join(f'{cost.extra_bytes / 1e6:.1f}' for cost in costs)} |", flush=True)


if __name__ == "__main__":
    main()
