"""The suite on small shapes, with contenders that do as a test needs."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention import measurement, rounds
from attention.contenders import ANOTHER, chosen
from attention.limits import Limits
from attention.measurement import Suite
from attention.rows import RowsFile, read_rows
from attention.shapes import PASSES, Shape

from lineara.measure.cost import plain

SHAPE = Shape(2, 3, 37, 5, 7)
[EAGER] = chosen(["eager"])


@pytest.fixture(autouse=True)
def _small_copy(monkeypatch):
    monkeypatch.setitem(rounds._COPIED_BYTES, "cpu", 2**20)


@pytest.fixture
def suite(tmp_path):
    """Make a suite on the CPU; what it says is in its `lines`."""

    def make(device="cpu", **limits):
        file = RowsFile(tmp_path / "attention.json")
        options = {"case_seconds": 0.0, "weigh": False} | limits
        lines = []
        made = Suite(file, device=device, dtype="float32", limits=Limits(**options), progress=lines.append)
        made.lines, made.path = lines, file.path
        return made

    return make


def contender(name, call=plain, **changes):
    return replace(EAGER, name=name, make=lambda shape, dtype, device: call, **changes)


def found(suite, *fields):
    return [tuple(getattr(row, field) for field in fields) for row in read_rows(suite.path)]


def test_every_contender_is_measured_in_every_pass_at_every_shape(suite):
    made = suite()
    shapes = [SHAPE, replace(SHAPE, positions=11)]
    made.measure(shapes, [contender("a"), contender("b")])
    assert found(made, "positions", "pass_name", "contender") == [
        (positions, name, one) for positions in (37, 11) for name in PASSES for one in "ab"
    ]
    for row in read_rows(made.path):
        assert row.measured
        assert 0 < row.seconds_low <= row.seconds <= row.seconds_high
        assert row.error < 1e-5
        traffic = SHAPE.least_traffic(row.pass_name, 4) * row.positions / 37
        assert row.fraction_of_copy == pytest.approx(traffic / row.seconds / row.copy_bytes_per_second)
        assert (row.repeats, row.copies, row.device_seconds, row.peak_bytes) == (5, 1, None, None)
        assert row.dtype == "float32"
        assert row.code
    assert f"{SHAPE}, forward, a: " in "\n".join(made.lines)


def test_a_contender_that_cannot_run_is_a_row_with_the_reason(suite):
    def failing(*tensors):
        warnings.warn("no kernel for you (Triggered internally)", stacklevel=1)
        warnings.warn("channels must be even (Triggered internally)", stacklevel=1)
        raise RuntimeError("No available kernel.\nAborting.\nMore.")

    def missing(shape, dtype, device):
        raise ModuleNotFoundError("it is not installed")

    late = {"calls": 0}

    def failing_later(*tensors):
        late["calls"] += 1
        if late["calls"] > 2:
            raise ValueError("enough")
        return plain(*tensors)

    made = suite()
    wrong = contender("wrong", lambda *tensors: plain(*tensors) * 1.1)
    bad = [contender("failing", failing), replace(EAGER, name="missing", make=missing), wrong]
    made.measure([SHAPE], [*bad, contender("later", failing_later), contender("good")], ["forward"])
    assert dict(found(made, "contender", "status")) == {
        "failing": "not run: RuntimeError: No available kernel. Aborting.; channels must be even",
        "missing": "not run: it is not installed",
        "wrong": "not run: ArithmeticError: its output must be within 1e-04 of the reference's, got 0.1",
        "later": "not run: ValueError: enough",
        "good": "measured",
    }


def test_what_auto_picked_is_told(suite):
    made = suite()
    made.measure([SHAPE], chosen(["lineara", "lineara-reference"]), ["forward"])
    assert found(made, "contender", "status", "picked") == [
        ("lineara", "measured", "reference"),
        ("lineara-reference", "measured", None),
    ]


def test_rows_are_kept_after_each_pass_and_a_second_run_measures_what_is_missing(suite):
    calls = []

    def counted(*tensors):
        calls.append(tensors[0].shape[2])
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(*tensors)

    first = suite()
    with pytest.raises(KeyboardInterrupt):
        first.measure([SHAPE, replace(SHAPE, positions=11)], [contender("a", counted)], ["forward"])
    assert found(first, "positions", "status") == [(37, "measured")]
    second = suite()
    second.measure([SHAPE, replace(SHAPE, positions=11)], [contender("a", counted)], ["forward"])
    assert calls.count(37) == 7
    assert found(second, "positions", "status") == [(37, "measured"), (11, "measured")]


def test_a_reason_does_not_take_the_place_of_a_measurement(suite):
    suite().measure([SHAPE], [contender("a")], ["forward"])
    late = suite(minutes=0.0)
    late.measure([SHAPE], [contender("a"), contender("b")], ["forward"])
    assert found(late, "contender", "status") == [
        ("a", "measured"),
        ("b", "not run: the time limit was reached"),
    ]


def test_nothing_begins_after_the_time_limit_and_compiling_ends_earlier(suite, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measurement, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(*tensors):
        now[0] += 10.0
        return plain(*tensors)

    made = suite(minutes=2.0)
    made.measure([SHAPE], [contender("a", slow), contender("c", compiles=True)], ["forward"])  # 7 calls
    made.measure([replace(SHAPE, positions=11)], [contender("a", slow), contender("c", compiles=True)], ["forward"])
    made.measure([replace(SHAPE, positions=13)], [contender("a", slow)], ["forward"])
    assert found(made, "positions", "contender", "status") == [
        (37, "a", "measured"),
        (37, "c", "measured"),
        (11, "a", "measured"),
        (11, "c", "not run: nothing is compiled after 60% of the time limit"),
        (13, "a", "not run: the time limit was reached"),
    ]


def test_quadratic_contenders_are_left_out_where_they_are_predicted_to_take_too_long(suite):
    made = suite(call_seconds=1e-9)
    shapes = [Shape(1, 1, positions, 2, 3) for positions in (64, 128, 5003)]
    quadratic = contender("q", quadratic=True, formula=ANOTHER)
    made.measure(shapes, [quadratic, contender("a")], ["forward"])
    statuses = [status for name, status in found(made, "contender", "status") if name == "q"]
    assert statuses[0] == "measured"
    assert all(status.startswith("not run: a call is predicted to take ") for status in statuses[1:])
    assert {status for name, status in found(made, "contender", "status") if name == "a"} == {"measured"}


def test_a_long_quadratic_case_needs_a_shorter_one_to_predict_from(suite):
    made = suite()
    made.measure([Shape(1, 1, 5003, 2, 3)], [contender("q", quadratic=True)], ["forward"])
    reason = "not run: no shorter length was measured that its time could be predicted from"
    assert found(made, "status") == [(reason,)]


def test_what_does_not_fit_is_not_begun(suite, monkeypatch):
    made = suite()
    monkeypatch.setattr(measurement, "free_bytes", lambda device: 16 * 2 * 3 * 37 * 7 * 8 - 1)
    contenders = [contender("a"), contender("m", map_bytes=1000)]
    made.measure([SHAPE, replace(SHAPE, positions=31)], contenders, ["forward"])
    assert found(made, "positions", "contender", "status") == [
        (37, "a", "not run: it needs about 0.0 GB with its check, and 0.0 GB are free"),
        (37, "m", "not run: it needs about 0.0 GB with its check, and 0.0 GB are free"),
        (31, "a", "measured"),
        (31, "m", "not run: its attention matrices need about 0.0 GB"),
    ]


def test_running_out_of_memory_for_the_inputs_is_a_reason_too(suite, monkeypatch):
    def out_of_memory(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(measurement, "expected_results", out_of_memory)
    made = suite()
    made.measure([SHAPE], [contender("a")], ["forward"])
    assert found(made, "status") == [("not run: OutOfMemoryError: CUDA out of memory.",)]


def test_memory_is_weighed_where_it_is_asked_for(suite, monkeypatch):
    weighed = []
    monkeypatch.setattr(measurement, "peak_memory", lambda make_call: weighed.append(make_call) or 12345)
    made = suite(weigh=True)
    made.measure([SHAPE], [contender("a"), contender("c", compiles=True)])
    assert found(made, "contender", "pass_name", "peak_bytes") == [
        ("a", "forward", 12345),
        ("c", "forward", None),
        ("a", "backward", None),
        ("c", "backward", None),
        ("a", "forward + backward", 12345),
        ("c", "forward + backward", None),
    ]
    assert [one.args for one in weighed] == [("a", SHAPE, "float32", name) for name in (PASSES[0], PASSES[2])]


def test_a_weighing_that_fails_leaves_the_time(suite, monkeypatch):
    def failing(make_call):
        raise RuntimeError("killed")

    monkeypatch.setattr(measurement, "peak_memory", failing)
    made = suite(weigh=True)
    made.measure([SHAPE], [contender("a")], ["forward"])
    assert found(made, "status", "peak_bytes") == [("measured", None)]
    assert any(line.endswith("not weighed: RuntimeError: killed") for line in made.lines)


def test_a_device_that_no_longer_answers_ends_the_run(suite, monkeypatch):
    made = suite()
    made._device = "cuda"

    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="the device must answer after a failed call, got an illegal memory access"):
        made._reason(ValueError("first"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_device_is_refused(suite):
    with pytest.raises(ValueError, match="device='cuda' needs a CUDA device that torch can use, got none"):
        suite(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_suite_runs_on_a_gpu(tmp_path):
    file = RowsFile(tmp_path / "attention.json")
    made = Suite(file, device="cuda", dtype="bfloat16", limits=Limits(case_seconds=0.01), progress=print)
    made.measure([Shape(2, 3, 1024, 64, 64)], chosen(["lineara", "eager", "eager-map", "sdpa-math"]))
    assert all(row.measured for row in file.rows)
    assert all(row.device_seconds for row in file.rows)
    assert all(row.peak_bytes for row in file.rows if row.pass_name != "backward")
