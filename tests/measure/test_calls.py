import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lineara.measure import calls, median_seconds, peak_memory

MIB = 2**20
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the high-water mark of memory")


class Clock:
    """Time that passes only while a call runs: so many seconds as the call's turn says."""

    def __init__(self, monkeypatch, *seconds):
        self.now = 0.0
        self.seconds = list(seconds)
        self.num_calls = 0
        monkeypatch.setattr(calls, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def call(self):
        self.now += self.seconds[min(self.num_calls, len(self.seconds) - 1)]
        self.num_calls += 1


# Time


def test_the_first_call_warms_up_and_is_not_counted(monkeypatch):
    clock = Clock(monkeypatch, 100, 3, 1, 7, 2, 5)
    timing = median_seconds(clock.call, min_repeats=5, max_seconds=0)
    assert timing == calls.Timing(median=3, minimum=1, maximum=7, repeats=5)
    assert clock.num_calls == 6


@pytest.mark.parametrize(("max_seconds", "repeats"), [(0, 4), (7, 4), (9, 5), (20, 10)])
def test_repeats_until_the_time_is_spent_but_never_less_than_asked(monkeypatch, max_seconds, repeats):
    clock = Clock(monkeypatch, 50, 2)
    assert median_seconds(clock.call, min_repeats=4, max_seconds=max_seconds).repeats == repeats


def test_a_call_that_takes_no_time_ends_too(monkeypatch):
    clock = Clock(monkeypatch, 0)
    assert median_seconds(clock.call, max_seconds=1).repeats == 10_000


def test_no_repeats_are_refused():
    with pytest.raises(ValueError, match="min_repeats must be at least 1, got 0"):
        median_seconds(lambda: None, min_repeats=0)


# Memory

WEIGHED = """
import os
import signal
import sys

import torch

from lineara.measure import calls

MIB = 2**20


def ones(mib):
    return torch.ones(mib * MIB // 4)


def nothing():
    ones(1)
    return lambda: None


def temporary(mib):
    ones(1)
    return lambda: ones(mib).sum().item()


def beside_inputs(mib):
    kept = ones(200)
    return lambda: (kept, ones(mib))


def one_after_the_other(mib):
    ones(1)

    def call():
        for _ in range(5):
            ones(mib)

    return call


def after_a_warm_up_of_the_same_size(mib):
    for _ in range(3):
        [ones(mib) for _ in range(2)]
    return lambda: ones(mib)


def without_the_mark(mib):
    calls.reset_high_water_mark = lambda: False
    return temporary(mib)


def threads():
    ones(1)
    print("number of threads, not of bytes: 12")
    num_threads = torch.get_num_threads()
    return lambda: ones(10 * num_threads)


def failing():
    print("some line", file=sys.stderr)
    raise LookupError("no such weight")


def killed():
    return lambda: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def weighed(tmp_path, monkeypatch):
    """An importable module of functions that make calls."""
    (tmp_path / "weighed_by_tests.py").write_text(WEIGHED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "weighed_by_tests", raising=False)
    import weighed_by_tests

    return weighed_by_tests


def assert_mib(peak, mib, tolerance=8):
    assert abs(peak / MIB - mib) < tolerance, (peak / MIB, mib)


@ON_LINUX
def test_a_call_that_takes_nothing_weighs_nothing(weighed):
    assert_mib(peak_memory(weighed.nothing), 0)


@ON_LINUX
@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("temporary", 64),
        ("beside_inputs", 8),
        ("one_after_the_other", 24),
        ("after_a_warm_up_of_the_same_size", 16),
    ],
)
def test_a_call_weighs_what_it_holds_at_its_peak(weighed, name, mib):
    assert_mib(peak_memory(partial(getattr(weighed, name), mib)), mib)


def test_without_a_mark_to_reset_the_growth_of_the_all_time_maximum_counts(weighed):
    assert_mib(peak_memory(partial(weighed.without_the_mark, 256)), 256, tolerance=32)


@ON_LINUX
def test_without_the_mark_at_all_the_resource_usage_counts(monkeypatch):
    calls.reset_high_water_mark()  # as the call below does, where the system lets it
    mark = calls._status_bytes("VmHWM")

    def no_status(field):
        raise KeyError(field)

    monkeypatch.setattr(calls, "_status_bytes", no_status)
    assert not calls.reset_high_water_mark()
    assert 0.9 * mark < calls.all_time_maximum() < 100 * mark


@ON_LINUX
def test_the_fresh_process_has_as_many_threads_of_torch_and_may_print(weighed, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert_mib(peak_memory(weighed.threads), 30)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("failing", "LookupError: no such weight$"),
        ("killed", f"it ended with status -{int(signal.SIGKILL)} and wrote nothing"),
    ],
)
def test_a_failing_process_is_an_error_with_its_last_line(weighed, name, reason):
    with pytest.raises(RuntimeError, match=f"^the process that measures memory failed: {reason}"):
        peak_memory(getattr(weighed, name))


def test_what_another_process_cannot_import_is_refused():
    with pytest.raises(TypeError, match=r"make_call must be a function at the top level of a module.* got .*lambda"):
        peak_memory(lambda: lambda: None)


def test_a_module_that_is_not_there_is_named(tmp_path, weighed):
    (tmp_path / "weighed_by_tests.py").unlink()
    with pytest.raises(RuntimeError, match="No module named 'weighed_by_tests'"):
        peak_memory(weighed.nothing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_torchs_own_peak_counts():
    kept = torch.ones(8 * MIB, device="cuda")

    def make_call():
        return lambda: (torch.ones(16 * MIB, device="cuda").sum().item(), torch.ones(4 * MIB, device="cuda"), kept)[1]

    assert_mib(peak_memory(make_call, device="cuda"), 64)
    assert median_seconds(make_call(), max_seconds=0, device="cuda").repeats == 5
