"""How calls are timed. A CUDA device is stood in for by a queue that takes time only when it is waited for."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from attention import rounds
from attention.rounds import Copy, Step, num_copies, time_in_rounds, time_on_device


class Clock:
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def step(self, *seconds, **options):
        """A step whose calls take so long, one after the other; the last one stays. Its preparation takes 100 s."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        def prepare(turn):
            self.now += 100.0
            return call

        return Step(prepare, **options)


def test_the_first_call_warms_up_and_preparation_is_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    spreads, failures = time_in_rounds({"a": clock.step(50, 3, 1, 7, 2, 5)}, device="cpu", max_seconds=0)
    assert failures == {}
    assert (spreads["a"].median, spreads["a"].low, spreads["a"].high, spreads["a"].repeats) == (3, 1, 7, 5)


def test_every_contender_has_its_own_time_and_nobody_more_than_200_calls(monkeypatch):
    clock = Clock(monkeypatch)
    steps = {"slow": clock.step(500.0), "quick": clock.step(0.5)}
    spreads, _ = time_in_rounds(steps, device="cpu", max_seconds=4000)
    assert spreads["slow"].repeats == 7  # with 100 s of preparation each
    assert spreads["quick"].repeats == 40
    spreads, _ = time_in_rounds({"none": clock.step(0.0)}, device="cpu", max_seconds=1e9)
    assert spreads["none"].repeats == 200


def test_contenders_alternate_and_turns_go_on():
    order = []
    steps = {name: Step(lambda turn, name=name: lambda: order.append((name, turn))) for name in "ab"}
    time_in_rounds(steps, device="cpu", max_seconds=0)
    for place in range(0, len(order), 2):
        assert {order[place], order[place + 1]} == {("a", place // 2), ("b", place // 2)}
    assert len(order) == 12


def test_a_contender_that_fails_is_named_and_the_others_go_on():
    def prepare(turn):
        if turn == 3:
            raise RuntimeError("out of something")
        return lambda: None

    spreads, failures = time_in_rounds({"bad": Step(prepare), "good": Step(lambda turn: lambda: None)}, device="cpu")
    assert list(spreads) == ["good"]
    assert str(failures["bad"]) == "out of something"


def test_a_context_stands_around_the_calls():
    inside = []

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    spreads, failures = time_in_rounds({"a": Step(lambda turn: lambda: inside[0], around)}, device="cpu", max_seconds=0)
    assert not failures
    assert not inside
    assert spreads["a"].repeats == 5


class Queue:
    """A CUDA stream: work and events are queued; time passes on it only where the host waits."""

    def __init__(self, monkeypatch):
        self.trace, self.pending, self.now, self.host = [], [], 0.0, 0.0
        queue = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                self.at = None

            def record(self):
                queue.trace.append("event")
                queue.pending.append(lambda: setattr(self, "at", queue.now))

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(rounds, "time", SimpleNamespace(perf_counter=lambda: queue.host))

    def work(self, seconds, name="call"):
        self.trace.append(name)
        self.host += 1e-4

        def run():
            self.now += seconds

        self.pending.append(run)
        return object()

    def wait(self):
        self.trace.append("wait")
        for run in self.pending:
            run()
        self.host = max(self.host, self.now)
        self.pending.clear()


def test_on_cuda_events_time_each_call_and_nothing_waits_within_a_batch(monkeypatch):
    queue = Queue(monkeypatch)

    def prepare(turn):
        queue.work(1.0, "prepare")
        return lambda: queue.work(0.25)

    spreads, failures = time_in_rounds({"a": Step(prepare)}, device="cuda", max_seconds=0, min_repeats=3)
    assert not failures
    assert spreads["a"].median == pytest.approx(0.25)
    batches = " ".join(queue.trace).split("wait")
    assert all(batch.strip().count("event call event") == batch.count("call") for batch in batches)


def test_a_batch_on_cuda_grows_to_ten_quick_calls(monkeypatch):
    queue = Queue(monkeypatch)
    steps = {"a": Step(lambda turn: lambda: queue.work(1e-5))}
    spreads, _ = time_in_rounds(steps, device="cuda", max_seconds=0.01)
    assert spreads["a"].repeats >= 10
    assert "wait " + "event call event " * 10 + "wait" in " ".join(queue.trace)


def test_launches_are_left_out_behind_enough_work_to_cover_them(monkeypatch):
    queue = Queue(monkeypatch)
    step = Step(lambda turn: lambda: queue.work(1e-5))
    spread = time_on_device(step, lambda: queue.work(5e-4, "busy"), 5e-4)
    assert spread.median == pytest.approx(1e-5)
    assert spread.repeats == 20
    # Ten launches of 0.1 ms each are queued behind 1.5 times as much work.
    assert "wait busy busy busy busy event" in " ".join(queue.trace)


def test_as_many_results_are_kept_as_there_are_sets_of_inputs(monkeypatch):
    Queue(monkeypatch)
    results, alive = weakref.WeakSet(), []

    class Result:
        def __init__(self):
            alive.append(len(results))
            results.add(self)

    rounds._batch_on_cuda(Step(lambda turn: Result, copies=3), 0, 8)
    assert alive == [0, 1, 2, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(("inputs_bytes", "copies"), [(10**9, 1), (50 * 2**20, 4), (3 * 2**20, 67), (1, 256)])
def test_inputs_rotate_over_several_times_the_cache(monkeypatch, inputs_bytes, copies):
    properties = SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert num_copies(inputs_bytes, "cuda") == copies
    assert num_copies(inputs_bytes, "cpu") == 1


def test_a_copy_is_counted_as_read_and_written(monkeypatch):
    monkeypatch.setitem(rounds._COPIED_BYTES, "cpu", 2**22)
    copy = Copy("cpu")
    assert copy.bytes_per_second == pytest.approx(2 * 2**22 / copy.seconds)
    copy._target.zero_()
    copy.run()
    assert torch.equal(copy._target, copy._source)
    assert copy._source.unique().numel() > 1000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_on_a_gpu_is_as_fast_as_its_own_step_says():
    copy = Copy("cuda")
    spread = time_on_device(Step(lambda turn: copy.run), copy.run, copy.seconds)
    assert spread.median == pytest.approx(copy.seconds, rel=0.3)
