"""What attention over the volume costs in PSMNet: the module alone, a training step, and a full frame.

    python benchmarks/psmnet_cpu.py > benchmarks/results/psmnet-cpu-<hardware>-<yyyy-mm>.md

Module: 32 channels on 48 x 135 x 240 positions, the quarter volume of a 540 x 960 frame of 192 disparities, forward
pass. Counted are the tensors that the paper counts: 4 of the volume's size, and the n x n map of the non-local module.
Step: forward pass, gradients and update on one 256 x 512 crop of 192 disparities. Frame: forward pass in evaluation, on
540 x 960. Times are medians over rounds in one process, in every round each network once, in random order. Memory is
each case's own fresh process (see `lineara.measure`). A quiet machine is the caller's business.
"""

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attention.shapes import PaperCount
from torch import Tensor

from lineara.measure import median_seconds, peak_memory
from lineara.measure.machine import environment
from lineara.models import PSMNet
from lineara.nn import EfficientAttention3d

CHANNELS = 32
VOLUME = (48, 135, 240)
ARMS = {"PSMNet": None, "EA-PSMNet": EfficientAttention3d}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="calls of each network")
    options = parser.parse_args()
    print("# Attention over PSMNet's volume on the CPU\n")
    print(f"float32, batch 1, 192 disparities. {environment(Path(__file__).parent)}\n")
    module()
    compare("A training step on a crop of 256 x 512", "step", options.rounds)
    compare("A full frame of 540 x 960, forward pass", "frame", options.rounds)


def module() -> None:
    count = PaperCount("PSMNet", CHANNELS, math.prod(VOLUME))
    print(f"## The module alone: {CHANNELS} channels, {count.positions:,} positions, forward pass\n")
    print("| module | counted | measured | seconds |")
    print("|---|---|---|---|")
    timing = median_seconds(make_module(), min_repeats=3)
    measured = peak_memory(call("make_module"))
    print(f"| efficient | {count.efficient_bytes / 1e6:,.0f} MB | {measured / 1e6:,.0f} MB | {timing.median:.2f} |")
    print(f"| non-local | {count.non_local_bytes / 1e12:.2f} TB | not measured | not measured |\n", flush=True)


def compare(title: str, kind: str, rounds: int) -> None:
    print(f"## {title}\n")
    calls = {name: make(name, kind) for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    for once in calls.values():
        once()
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    calls.clear()
    print("| network | median, s | extremes, s | peak memory, MB |")
    print("|---|---|---|---|")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_memory(call("make", name, kind)) / 1e6 for name in ARMS}
    for name, values in seconds.items():
        print(f"| {name} | {medians[name]:.2f} | {min(values):.2f}-{max(values):.2f} | {peaks[name]:,.0f} |")
    share = medians["EA-PSMNet"] / medians["PSMNet"] - 1
    print(f"\nWith attention: {share:+.1%} time, {peaks['EA-PSMNet'] - peaks['PSMNet']:+,.0f} MB.\n", flush=True)


def call(name: str, *arguments: str) -> Callable[[], Callable[[], object]]:
    import psmnet_cpu  # this file as a module, so that a fresh process can find what it is to call

    return partial(getattr(psmnet_cpu, name), *arguments)


def make_module() -> Callable[[], Tensor]:
    layer = EfficientAttention3d(CHANNELS).requires_grad_(False)
    x = torch.randn(1, CHANNELS, *VOLUME)
    layer(x[:, :, :4])
    return partial(layer, x)


def make(name: str, kind: str) -> Callable[[], object]:
    torch.manual_seed(0)
    network = PSMNet(192, ARMS[name])
    size = (256, 512) if kind == "step" else (540, 960)
    left, right = torch.randn(2, 1, 3, *size).unbind()
    if kind == "frame":
        network.eval().requires_grad_(False)
        network(left[..., :32, :64], right[..., :32, :64])
        return partial(network, left, right)
    optimizer = torch.optim.Adam(network.parameters())
    truth = 100 * torch.rand(1, *size)

    def step() -> None:
        optimizer.zero_grad()
        sum((answer - truth).abs().mean() for answer in network(left, right)).backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
