"""The operations on the CPU against those of an earlier commit and against the reference, in one process.

    python benchmarks/against_commit.py COMMIT > benchmarks/results/against-COMMIT-cpu-<hardware>-<yyyy-mm>.md

The earlier package is taken from git under another name. In every round each contender is called once, in random
order; times are medians over the rounds, and a ratio over 1 means that this checkout is faster. The last column is
the spread of this checkout's times, from the lower to the upper quartile. A quiet machine is the caller's business.
"""

import argparse
import importlib
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineara import ops
from lineara.measure import peak_memory
from lineara.measure.machine import environment

REPOSITORY = Path(__file__).parents[1]
LONG = [(1, 8, n, 64) for n in (256, 4096, 16384, 65536)]
MANY = [(4096, 4, 16, 16), (1024, 3, 49, 32), (64, 6, 196, 64)]
OPERATIONS: dict[str, dict[str, Any]] = {
    "efficient_attention": {},
    "kernel_attention": {},
    "multiresolution_attention": {"resolutions": (8, 8, 4, 4, 2, 2, 1, 1)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the commit to compare with")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for the rounds of one row")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        before = earlier(options.commit, Path(folder))
        print(f"# The operations on the CPU, and those of commit {options.commit}\n")
        print(f'float32, `impl="auto"`. {environment(REPOSITORY)}\n')
        print("| operation | shape | layout | passes | rounds | ms | before / now | reference / now | spread |")
        print("|---" * 9 + "|")
        for name in options.operations:
            for shape, layout in [(s, "heads first") for s in LONG] + [(s, "of layers") for s in MANY]:
                if "multiresolution" in name and layout == "of layers":
                    continue
                for gradients in (False, True):
                    row(name, shape, layout, gradients, before, options.seconds)
        print("\n## The first call in a fresh process that has imported torch and the package\n")
        print("(Of 2.4 Mi elements, without gradients; the second call is the same one again.)\n")
        for package in ("lineara_before", "lineara"):
            print(f"- {package}: {first_call(package, folder)}")
    print("\n## Peak memory of a forward and backward pass of efficient attention, MB beyond its inputs\n")
    print("(8 heads of 64 channels; the output and three gradients are all that must exist.)\n")
    import against_commit  # under its own name, by which the fresh process finds it

    for positions in (4096, 65536):
        needed = 4 * 8 * 64 * 4 * positions / 1e6
        peak = peak_memory(partial(against_commit.one_pass, positions)) / 1e6
        print(f"- {positions:,} positions: {peak:.1f}, of which {needed:.1f} must exist: {peak - needed:+.1f}")


def earlier(commit: str, folder: Path) -> Any:
    """The operations of a commit, of a package named lineara_before."""
    archive = subprocess.run(["git", "archive", commit, "src/lineara"], cwd=REPOSITORY, capture_output=True, check=True)
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    (folder / "src" / "lineara").rename(folder / "lineara_before")
    for path in (folder / "lineara_before").rglob("*.py"):
        path.write_text(path.read_text().replace("lineara", "lineara_before"))
    sys.path.insert(0, str(folder))
    return importlib.import_module("lineara_before.ops")


FIRST_CALL = """
import importlib, sys, time, torch
from pathlib import Path
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
ops = importlib.import_module(sys.argv[1] + ".ops")
torch.set_num_threads(1)
x = torch.randn(1, 1, 150_000, 16)
x.softmax(2).mT @ x
before, modules = resident(), len(sys.modules)
times = []
for _ in range(2):
    begin = time.perf_counter()
    ops.efficient_attention(x, x, x)
    times.append(time.perf_counter() - begin)
grown = (resident() - before) / 2**20
loaded = "with" if "torch._dynamo" in sys.modules else "without"
print(f"{times[0]:.2f} s and {grown:.0f} MiB, then {times[1]:.2f} s;", end=" ")
print(f"{len(sys.modules) - modules} modules, {loaded} torch._dynamo")
"""


def first_call(package: str, folder: str) -> str:
    paths = [folder, str(REPOSITORY / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-c", FIRST_CALL, package]
    return subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.strip()


def row(name: str, shape: tuple[int, ...], layout: str, gradients: bool, before: Any, seconds: float) -> None:
    batch, heads, positions, channels = shape
    if layout == "heads first":
        tensors = [torch.randn(shape, requires_grad=gradients) for _ in range(3)]
    else:
        tensors = [
            torch.randn(batch, positions, heads, channels).transpose(1, 2).requires_grad_(gradients) for _ in range(3)
        ]
    grad_output = torch.randn_like(tensors[0]) if gradients else None
    options = OPERATIONS[name]
    calls: dict[str, Callable[[], object]] = {
        label: partial(called, getattr(package, name), tensors, grad_output, {**options, "impl": impl})
        for label, package, impl in (("now", ops, "auto"), ("before", before, "auto"), ("reference", ops, "reference"))
    }
    seconds_of: dict[str, list[float]] = {label: [] for label in calls}
    for call in calls.values():
        call()
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(seconds_of["now"]) < 5:
        for label in random.sample(list(calls), len(calls)):
            begin = time.perf_counter()
            calls[label]()
            seconds_of[label].append(time.perf_counter() - begin)
    median = {label: statistics.median(times) for label, times in seconds_of.items()}
    low, _, high = statistics.quantiles(seconds_of["now"], n=4)
    print(
        f"| {name} | {shape} | {layout} | {'forward + backward' if gradients else 'forward'} | "
        f"{len(seconds_of['now'])} | {median['now'] * 1e3:.2f} | {median['before'] / median['now']:.2f} | "
        f"{median['reference'] / median['now']:.2f} | {low / median['now']:.2f} to {high / median['now']:.2f} |",
        flush=True,
    )


def called(call: Callable[..., Tensor], tensors: list[Tensor], grad_output: Tensor | None, options: Any) -> None:
    output = call(*tensors, **options)
    if grad_output is not None:
        torch.autograd.grad(output, tensors, grad_output)


def one_pass(positions: int) -> Callable[[], object]:
    tensors = [torch.randn(1, 8, positions, 64, requires_grad=True) for _ in range(3)]
    grad_output = torch.ones(1, 8, positions, 64)

    def call() -> object:
        output = ops.efficient_attention(*tensors)
        return output, torch.autograd.grad(output, tensors, grad_output)

    some = [torch.randn(1, 1, 70_000, 64, requires_grad=True) for _ in range(3)]
    # (With the gradient of an output torch imports its symbolic shapes: 35 MB.)
    torch.autograd.grad(ops.efficient_attention(*some), some, torch.ones_like(some[0]))
    return call


if __name__ == "__main__":
    main()
