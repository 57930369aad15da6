"""A training step of the multiresolution layer on the CPU against the efficient layer of equal width.

    python benchmarks/multiresolution_cpu.py > benchmarks/results/multiresolution-cpu-<hardware>-<yyyy-mm>.md

A step is the layer's forward pass and the gradients of its input and of all its weights. Times are medians over rounds
in one process; in every round each contender is called once, in random order. Memory is each contender's own fresh
process (see `lineara.measure`). A quiet machine is the caller's business.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lineara.measure import median_seconds, peak_memory
from lineara.measure.machine import environment
from lineara.nn import EfficientAttention, MultiresolutionAttention

HEADS = 4
WIDTHS = (64, 256)
LENGTHS = (1024, 4096, 16384, 65536)
LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "efficient": partial(EfficientAttention, num_heads=HEADS),
    "multiresolution": partial(MultiresolutionAttention, num_heads=HEADS),
    "soft": partial(MultiresolutionAttention, num_heads=HEADS, top_k=HEADS),
    "no routing": partial(MultiresolutionAttention, num_heads=HEADS, routing=None),
    "max": partial(MultiresolutionAttention, num_heads=HEADS, compression="max"),
    "conv": partial(MultiresolutionAttention, num_heads=HEADS, compression="conv"),
    "elu": partial(MultiresolutionAttention, num_heads=HEADS, feature_map="elu"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the rounds of one row")
    parser.add_argument("--positions", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()

    print("# A training step of the multiresolution layer on the CPU\n")
    print(f"{HEADS} heads, float32, batch 1. {environment(Path(__file__).parent)}\n")
    print("`multiresolution` has the layer's defaults, with resolutions 8, 4, 2, 1; the columns after it change one")
    print(
        "option each. Milliseconds are medians, in brackets the extremes of all rounds; then ratios to `efficient`.\n"
    )
    for width in WIDTHS:
        print(f"## Time, {width} channels\n")
        print(f"| positions | rounds | {' | '.join(LAYERS)} | {' | '.join(f'{name} /' for name in others())} |")
        print("|---" * (2 + len(LAYERS) + len(others())) + "|")
        medians = {n: time_row(width, n, options.seconds) for n in options.positions}
        print()
        first, last = (n for n in (4096, 65536)) if {4096, 65536} <= medians.keys() else (None, None)
        if first and last:
            ratio = medians[last]["multiresolution"] / last / (medians[first]["multiresolution"] / first)
            print(f"Time per position at 65,536 over that at 4,096, multiresolution: {ratio:.2f}.\n")
    print("## Peak memory of a step beyond its input and weights, MB\n")
    print("| channels | positions | efficient | multiresolution | ratio |")
    print("|---|---|---|---|---|")
    for width in WIDTHS:
        for positions in options.positions:
            memory_row(width, positions)
    print()
    answer_queries()


def others() -> list[str]:
    return [name for name in LAYERS if name != "efficient"]


def time_row(width: int, positions: int, max_seconds: float) -> dict[str, float]:
    x, gradient = torch.randn(1, positions, width, requires_grad=True), torch.randn(1, positions, width)
    layers = {name: make(width) for name, make in LAYERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        step(layer, x, gradient)
    end = time.perf_counter() + max_seconds
    while time.perf_counter() < end or len(seconds["efficient"]) < 5:
        for name in random.sample(list(layers), len(layers)):
            start = time.perf_counter()
            step(layers[name], x, gradient)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cells = [
        f"{1e3 * medians[name]:.1f} ({1e3 * min(values):.1f}-{1e3 * max(values):.1f})"
        for name, values in seconds.items()
    ]
    ratios = [f"{medians[name] / medians['efficient']:.2f}" for name in others()]
    print(f"| {positions} | {len(seconds['efficient'])} | {' | '.join([*cells, *ratios])} |", flush=True)
    return medians


def step(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(layer(x), [x, *layer.parameters()], gradient)


def memory_row(width: int, positions: int) -> None:
    import multiresolution_cpu  # this file as a module, so that a fresh process can find what it is to call

    weighed = {
        name: peak_memory(partial(multiresolution_cpu.make_step, name, width, positions)) / 1e6
        for name in ("efficient", "multiresolution")
    }
    ratio = weighed["multiresolution"] / weighed["efficient"]
    cells = " | ".join(f"{megabytes:.1f}" for megabytes in weighed.values())
    print(f"| {width} | {positions} | {cells} | {ratio:.2f} |", flush=True)


def make_step(name: str, width: int, positions: int) -> Callable[[], object]:
    x, gradient = torch.randn(1, positions, width, requires_grad=True), torch.randn(1, positions, width)
    layer = LAYERS[name](width)
    step(layer, x[:, :64], gradient[:, :64])
    return partial(step, layer, x, gradient)


def answer_queries() -> None:
    """Three ways to answer routed queries: all heads and a gate, the chosen head by gathering, and by sorting."""
    print("## Three ways to answer queries that chose one head each\n")
    print("Forward pass from the contexts on, 4 heads: every head answers every query and a gate selects (what the")
    print(
        "library does); the rows of each head are gathered, answered and scattered; all rows are sorted by head once.\n"
    )
    print("| channels | positions | gate, ms | gather, ms | sort, ms |")
    print("|---|---|---|---|---|")
    for width in WIDTHS:
        for positions in LENGTHS:
            per_head = width // HEADS
            query, context = torch.randn(HEADS, positions, per_head), torch.randn(HEADS, per_head, per_head)
            choice = torch.randint(HEADS, (positions,))
            calls = [partial(way, query, context, choice) for way in (by_gate, by_gather, by_sort)]
            for call in calls[1:]:
                torch.testing.assert_close(call(), calls[0]())
            milliseconds = [f"{1e3 * median_seconds(call, max_seconds=2.0).median:.2f}" for call in calls]
            print(f"| {width} | {positions} | {' | '.join(milliseconds)} |", flush=True)


def by_gate(query: Tensor, context: Tensor, choice: Tensor) -> Tensor:
    gate = (choice == torch.arange(len(query))[:, None]).float()  # (H, N)
    return query.softmax(dim=2) @ context * gate[..., None]  # (H, N, V)


def by_gather(query: Tensor, context: Tensor, choice: Tensor) -> Tensor:
    output = query.new_zeros((*query.shape[:2], context.shape[2]))
    for head in range(len(query)):
        rows = (choice == head).nonzero()[:, 0]
        output[head].index_copy_(0, rows, query[head].index_select(0, rows).softmax(dim=1) @ context[head])
    return output


def by_sort(query: Tensor, context: Tensor, choice: Tensor) -> Tensor:
    heads, positions, _ = query.shape
    order = choice.argsort()
    chosen = query[choice[order], order].softmax(dim=1)  # (N, K), the rows of a head side by side
    counts = choice.bincount(minlength=heads).tolist()
    answers = torch.cat([part @ context[head] for head, part in enumerate(chosen.split(counts))])
    output = query.new_zeros((heads, positions, context.shape[2]))
    output[choice[order], order] = answers
    return output


if __name__ == "__main__":
    main()
