"""Efficient attention with its positions sharded over processes: memory and time of each, and bytes exchanged.

    python benchmarks/sequence_parallel_cpu.py > benchmarks/results/sequence-parallel-cpu-<hardware>-<yyyy-mm>.md

Every process has one thread and an equal part of the positions, and talks by gloo; one process is without a group.
Memory is the most resident memory during forward and backward beyond that of the process after its start (libraries,
the connection, one call on 8,192 positions), its tensors included: query, key, value, output, and the gradient of each.
Times are medians over rounds, of the slowest process in each. A quiet machine is the caller's business.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lineara.measure.calls import all_time_maximum, reset_high_water_mark
from lineara.measure.machine import environment
from lineara.ops import efficient_attention

HEADS, HEAD_DIM = 8, 64
# Just beyond what is left to the reference: the first call of the operator loads some 100 MB of torch.
WARM_UP = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[65536, 262144], help="of all processes together")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="timed calls")
    parser.add_argument("--rank", type=int, nargs=3, help=argparse.SUPPRESS)  # this process is one that is measured
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(*options.positions, *options.processes, options.rounds) < 1:
        parser.error("positions, processes and rounds must be at least 1")
    torch.set_num_threads(1)
    if options.rank:
        measure(*options.rank, options.rounds, options.folder)
        return
    print("# Positions sharded over processes on the CPU\n")
    print(f"{HEADS} heads of {HEAD_DIM} channels, float32, batch 1. {environment(Path(__file__).parent)}\n")
    print("MB and seconds are those of one process, of forward and backward pass together; in brackets the extremes of")
    print("all rounds. Efficiency is the time of one process over that of all, divided by their number.\n")
    print("| positions | processes | MB | MB / MB of one | seconds | efficiency | bytes forward | bytes backward |")
    print("|---|---|---|---|---|---|---|---|")
    for positions in options.positions:
        table(positions, options.processes, options.rounds)


def table(positions: int, processes: list[int], rounds: int) -> None:
    first: dict[str, Any] | None = None
    for number in processes:
        found = start(number, positions, rounds)
        first = first or found
        memory, seconds = found["memory"] / first["memory"], first["seconds"] / found["seconds"]
        times = f"{found['seconds']:.3g} ({found['minimum']:.3g}-{found['maximum']:.3g})"
        row = (positions, number, f"{found['memory'] / 1e6:.1f}", f"{memory:.3f}", times)
        efficiency = f"{seconds * processes[0] / number:.2f}"
        print("|", " | ".join(map(str, (*row, efficiency, *found["bytes"]))), "|", flush=True)


def start(number: int, positions: int, rounds: int) -> dict[str, Any]:
    """What the processes found: the most memory of any, and the times of the slowest in every round."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--rounds", str(rounds), "--folder", folder, "--rank"]
        # (glibc then gives freed blocks back, so that what is resident is what is used.)
        variables = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*words, str(rank), str(number), str(positions)], env=variables) for rank in range(number)
        ]
        if any(code != 0 for code in [rank.wait() for rank in ranks]):
            raise SystemExit("a measured process failed; see above")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(number)]
    times = [max(times) for times in zip(*(one["times"] for one in found))]
    return {
        "memory": max(one["memory"] for one in found),
        "seconds": statistics.median(times),
        "minimum": min(times),
        "maximum": max(times),
        "bytes": found[0]["bytes"],
    }


def measure(rank: int, number: int, positions: int, rounds: int, folder: Path) -> None:
    group = None
    if number > 1:
        store = dist.FileStore(str(folder / "store"), number)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=number)
        group = dist.group.WORLD
    sent = counted()
    attend(WARM_UP, group)
    length = len(range(rank, positions, number))
    reset_high_water_mark()
    before = all_time_maximum()
    sent.clear()
    tensors, gradient = inputs(length)
    output = efficient_attention(*tensors, impl="streaming", group=group)
    forward = sum(sent)
    output.backward(gradient)
    memory = all_time_maximum() - before
    exchanged = (forward, sum(sent) - forward)
    del output, tensors, gradient
    times = [attend(length, group) for _ in range(rounds)]
    found = {"memory": memory, "times": times, "bytes": exchanged}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    if group is not None:
        dist.barrier()
        dist.destroy_process_group()


def inputs(length: int) -> tuple[list[Tensor], Tensor]:
    *tensors, gradient = (torch.randn(1, HEADS, length, HEAD_DIM) for _ in range(4))
    return [tensor.requires_grad_() for tensor in tensors], gradient


def attend(length: int, group: dist.ProcessGroup | None) -> float:
    tensors, gradient = inputs(length)
    if group is not None:
        dist.barrier(group)
    start = time.perf_counter()
    efficient_attention(*tensors, impl="streaming", group=group).backward(gradient)
    return time.perf_counter() - start


def counted() -> list[int]:
    """The bytes that this process gives to every all-reduce from now on."""
    sent: list[int] = []
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *arguments: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *arguments)

    dist.all_reduce = counting
    return sent


if __name__ == "__main__":
    main()
