"""The time and memory of one call: seconds in this process, memory in a fresh one."""

import gc
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_MOST_REPEATS = 10_000
# What the fresh process runs: first the parent's search path, so that it finds what the parent found.
_FRESH_PROCESS = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); "
    "from lineara.measure.calls import _answer; _answer()"
)
# glibc then gives every freed block from this size (bytes) on back to the kernel. Otherwise the freed blocks of the
# warm-up stay resident and hide what the call takes.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of one call, over `repeats` calls."""

    median: float
    minimum: float
    maximum: float
    repeats: int


def median_seconds(
    call: Callable[[], object],
    *,
    min_repeats: int = 5,
    max_seconds: float = 2.0,
    device: torch.device | str = "cpu",
) -> Timing:
    """Time a call: once to warm up, then `min_repeats` times, then until `max_seconds` are spent.

    Args:
        call: what is timed; dropping its result is timed with it.
        min_repeats: calls that are timed however long they take, at least 1.
        max_seconds: no further call starts after so many seconds; nor does one after 10,000 calls.
        device: where the work runs; on a CUDA device every call is waited for.

    Returns:
        Median, minimum and maximum in seconds, and the number of timed calls.

    Raises:
        ValueError: for min_repeats below 1.
    """
    if min_repeats < 1:
        raise ValueError(f"min_repeats must be at least 1, got {min_repeats}")
    _seconds(call, device)
    seconds: list[float] = []
    end = time.perf_counter() + max_seconds
    while len(seconds) < min_repeats or (time.perf_counter() < end and len(seconds) < _MOST_REPEATS):
        seconds.append(_seconds(call, device))
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds))


def peak_memory(make_call: Callable[[], Callable[[], object]], *, device: torch.device | str = "cpu") -> int:
    """The most memory that a call holds at any moment beyond what was there before it, its result included.

    On the CPU this is resident memory as the kernel counts it, in a fresh process: `make_call()` builds the inputs
    there (written to, so that they are resident) and warms up what should not count, such as libraries and threads;
    then the kernel's high-water mark is reset, the call runs once, and the mark is read. On Linux with glibc that is
    what the call allocates and touches, to about half a megabyte. Where the mark cannot be reset (macOS, some
    containers), the growth of the process's all-time maximum is reported, which misses what fits into the memory that
    the warm-up has given back. On a CUDA device it is the growth of torch.cuda.max_memory_allocated, in this process.

    Args:
        make_call: called without arguments; returns the call. For the CPU it must be picklable: a
            function at the top level of an importable module, or a functools.partial of one.
        device: where the work runs.

    Returns:
        Bytes.

    Raises:
        TypeError: for a make_call that cannot be sent to another process.
        RuntimeError: if the fresh process fails; with the last line of what it wrote to standard error.
    """
    if torch.device(device).type == "cuda":
        return _peak_on_cuda(make_call(), device)
    try:
        message = pickle.dumps(sys.path) + pickle.dumps((make_call, torch.get_num_threads()))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            "make_call must be a function at the top level of a module, or a functools.partial of one, got "
            f"{make_call!r}; move it there"
        ) from error
    process = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS],
        input=message,
        capture_output=True,
        env=os.environ | _ENVIRONMENT,
    )
    if process.returncode != 0:
        said = process.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"it ended with status {process.returncode} and wrote nothing"
        raise RuntimeError(f"the process that measures memory failed: {reason}")
    return int(process.stdout.split()[-1])


def _seconds(call: Callable[[], object], device: torch.device | str) -> float:
    _wait_for(device)
    start = time.perf_counter()
    call()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _peak_on_cuda(call: Callable[[], object], device: torch.device | str) -> int:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def _answer() -> None:
    """The fresh process: from the message on standard input to a number on standard output."""
    make_call, num_threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(num_threads)
    print(_peak_on_cpu(make_call()))


def _peak_on_cpu(call: Callable[[], object]) -> int:
    gc.collect()
    resets = reset_high_water_mark()
    before = _status_bytes("VmRSS") if resets else all_time_maximum()
    result = call()
    peak = (_status_bytes("VmHWM") if resets else all_time_maximum()) - before
    del result
    return max(peak, 0)


def reset_high_water_mark() -> bool:
    """Let the kernel's mark of the most resident memory begin anew; whether it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmHWM") > 0
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields[field].split()[0]) * 1024


def all_time_maximum() -> int:
    """The most resident memory of this process since its start, or since the mark was reset, in bytes."""
    try:
        return _status_bytes("VmHWM")
    except (OSError, KeyError):
        # Second choice: on Linux this starts at the size of the process that started this one.
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
