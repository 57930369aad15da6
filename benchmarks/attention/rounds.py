"""Time several calls against each other: in rounds, in random order, so that what else happens meets all of them.

On a CUDA device every call stands between two events of its stream, and nothing waits for the device before a whole
batch of calls is queued: this is what a caller meets, launches included. `time_on_device` leaves the launches out.
"""

import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

_MOST_REPEATS = 200
_CALLS_OF_A_BATCH = 10
_BATCH_SECONDS = 0.05
# Bytes of the tensor that is copied: many times any cache.
_COPIED_BYTES = {"cpu": 2**28, "cuda": 2**30}
# How many times the size of the L2 cache the inputs have that calls rotate over.
_TIMES_THE_CACHE = 4
# More would take long to lay out; calls on inputs so small are bound by their launches.
_MOST_COPIES = 256


@dataclass(frozen=True)
class Spread:
    """Seconds of one call: the median, and the tenth and ninetieth percentile, over `repeats` calls."""

    median: float
    low: float
    high: float
    repeats: int


@dataclass(frozen=True)
class Step:
    """What is timed.

    Args:
        prepare: from the number of the turn to the call that is timed; its own work is not.
        around: a context that stands around every batch of turns, and is not timed.
        copies: sets of inputs that the turns go through; as many results are kept, so that they move on too.
    """

    prepare: Callable[[int], Callable[[], object]]
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    copies: int = 1


@dataclass
class _Times:
    seconds: list[float] = field(default_factory=list)
    spent: float = 0.0
    turns: int = 0
    calls_of_a_batch: int = 1


def time_in_rounds(
    steps: Mapping[str, Step], *, device: str, max_seconds: float = 0.2, min_repeats: int = 5
) -> tuple[dict[str, Spread], dict[str, Exception]]:
    """Time every step until `max_seconds` of its own are spent, at least `min_repeats` and at most 200 times.

    Each is called once to warm up. In every round each has one batch: a single call on the CPU, on a CUDA device up to
    10 that are queued without waiting.

    Returns:
        The times of the steps that ran, and the exceptions of those that failed.
    """
    times = {name: _Times() for name in steps}
    failures: dict[str, Exception] = {}
    remaining = list(steps)
    warm = False
    while remaining:
        # In random order: nobody always finds the same neighbour's leavings in the cache.
        for name in random.sample(remaining, len(remaining)):
            try:
                _add_batch(times[name], steps[name], device, counts=warm)
            except Exception as error:
                failures[name] = error
                remaining.remove(name)
                continue
            found = times[name]
            spent = found.spent >= max_seconds and len(found.seconds) >= min_repeats
            if spent or len(found.seconds) >= _MOST_REPEATS:
                remaining.remove(name)
        warm = True
    return {name: _spread(found.seconds) for name, found in times.items() if name not in failures}, failures


def time_on_device(step: Step, busy: Callable[[], object], busy_seconds: float, *, batches: int = 2) -> Spread:
    """Time a step on a CUDA device without its launches: they are queued while the device is busy with something else.

    Args:
        step: what is timed.
        busy: queues work that keeps the device busy for `busy_seconds`; called often enough to cover the queueing.
        busy_seconds: how long the device takes for it.
    """
    start = time.perf_counter()
    _batch_on_cuda(step, 0, _CALLS_OF_A_BATCH)
    host_seconds = time.perf_counter() - start
    seconds: list[float] = []
    for batch in range(1, batches + 1):
        for _ in range(int(1.5 * host_seconds / busy_seconds) + 1):
            busy()
        seconds += _batch_on_cuda(step, batch * _CALLS_OF_A_BATCH, _CALLS_OF_A_BATCH)
    return _spread(seconds)


class Copy:
    """A large copy within the device's memory: the measure of everything that is bound by it."""

    def __init__(self, device: str) -> None:
        size = _COPIED_BYTES[device] // 4
        self._source = torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32, device=device)
        self._target = torch.empty_like(self._source)
        steps = {"copy": Step(lambda turn: self.run)}
        spreads, failures = time_in_rounds(steps, device=device, max_seconds=0.3, min_repeats=10)
        for failure in failures.values():
            raise failure
        self.seconds = spreads["copy"].median

    def run(self) -> object:
        return self._target.copy_(self._source)

    @property
    def bytes_per_second(self) -> float:
        """Bytes read and bytes written, in a second."""
        return 2 * self._source.nbytes / self.seconds


def num_copies(inputs_bytes: int, device: str) -> int:
    """Sets of inputs of so many bytes that together are several times the device's L2 cache; 1 on the CPU."""
    if device == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-_TIMES_THE_CACHE * cache // inputs_bytes), 1), _MOST_COPIES)


def _add_batch(times: _Times, step: Step, device: str, *, counts: bool) -> None:
    start = time.perf_counter()
    measure = _batch_on_cpu if device == "cpu" else _batch_on_cuda
    seconds = measure(step, times.turns, times.calls_of_a_batch)
    elapsed = time.perf_counter() - start
    times.turns += len(seconds)
    if counts:
        times.seconds += seconds
        times.spent += elapsed
    if device != "cpu":
        # After a first call that compiles, the size of a batch is a guess that the next batch corrects.
        calls = int(_BATCH_SECONDS * len(seconds) / max(elapsed, 1e-9))
        times.calls_of_a_batch = min(max(calls, 1), _CALLS_OF_A_BATCH)


def _batch_on_cpu(step: Step, first: int, num_calls: int) -> list[float]:
    seconds: list[float] = []
    with step.around():
        for turn in range(first, first + num_calls):
            call = step.prepare(turn)
            start = time.perf_counter()
            result = call()
            seconds.append(time.perf_counter() - start)
            del result, call
    return seconds


def _batch_on_cuda(step: Step, first: int, num_calls: int) -> list[float]:
    """Queue the calls between pairs of events; wait for the device once, at the end."""
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(num_calls)]
    kept: deque[object] = deque(maxlen=step.copies)
    with step.around():
        for turn, (start, end) in enumerate(events, first):
            call = step.prepare(turn)
            start.record()
            result = call()
            end.record()
            kept.append(result)
            del result, call
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e-3 for start, end in events]


def _spread(seconds: Sequence[float]) -> Spread:
    ordered = sorted(seconds)
    at = partial(_percentile, ordered)
    return Spread(statistics.median(ordered), at(0.1), at(0.9), len(ordered))


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[round(share * (len(ordered) - 1))]
