import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lineara.measure import ATTENTIONS, Case, Cost, cost, cost_table, measure_case, measure_costs

SMALL = Case("efficient", 37, True, batch=2, heads=3, head_dim=5)


def made_up_cost(case, seconds=0.5, peak_bytes=3_000_000):
    return Cost(case, seconds, seconds / 2, seconds * 2, 5, peak_bytes, 0)


# Cases


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attention": "sparse"}, "attention must be one of efficient, .* got 'sparse'"),
        ({"dtype": "int8"}, "dtype must be one of float64, float32, bfloat16, float16, got 'int8'"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:<n>', got 'tpu'"),
        ({"positions": 0}, "positions must be at least 1, got 0"),
        ({"heads": -1}, "heads must be at least 1, got -1"),
    ],
)
def test_wrong_cases_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(SMALL, **change)


@pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("bfloat16", 2)])
def test_outputs_are_one_tensor_and_with_gradients_four(dtype, size):
    case = replace(SMALL, dtype=dtype)
    assert case.outputs_bytes == 4 * 2 * 3 * 37 * 5 * size
    assert replace(case, backward=False).outputs_bytes == 2 * 3 * 37 * 5 * size


# Measuring


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("backward", [False, True])
def test_a_call_computes_what_the_case_says(attention, backward):
    case = replace(SMALL, attention=attention, backward=backward, dtype="float64")
    query, key, value, grad_output = cost._inputs(case)
    if attention == "softmax":
        weights = (query @ key.mT / 5**0.5).softmax(-1)
    else:
        weights = query.softmax(-1) @ key.softmax(-2).mT
    output, *gradients = cost._make_call(case)()
    torch.testing.assert_close(output, weights @ value)
    assert len(gradients) == (3 if backward else 0)
    if backward:
        torch.testing.assert_close(gradients[2], weights.mT @ grad_output)


def test_every_call_builds_its_own_graph():
    call = cost._make_call(SMALL)
    for first, second in zip(call(), call()):
        torch.testing.assert_close(first, second)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the high-water mark of memory")
def test_plain_attention_weighs_what_its_formula_keeps():
    tensor = 8 * 4096 * 64 * 4
    forward = measure_case(Case("plain", 4096, False), max_seconds=0)
    # One softmaxed query or key at a time, beside the output.
    assert forward.peak_bytes == pytest.approx(2 * tensor, abs=2**20)
    assert forward.extra_bytes == forward.peak_bytes - tensor
    backward = measure_case(Case("plain", 4096, True), max_seconds=0)
    # Both are kept for the backward pass, which makes the gradients of both.
    assert backward.extra_bytes == pytest.approx(4 * tensor, abs=2**20)
    assert 0 < forward.seconds_min <= forward.seconds <= forward.seconds_max
    assert forward.repeats == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_are_measured_on_a_gpu():
    tensor = 8 * 16384 * 64 * 2
    [forward] = measure_costs([Case("plain", 16384, False, dtype="bfloat16", device="cuda")], max_seconds=0)
    assert forward.peak_bytes == pytest.approx(2 * tensor, rel=0.05)


def test_a_quadratic_case_is_warmed_up_at_a_shorter_length(monkeypatch):
    lengths = []
    monkeypatch.setattr(
        cost, "_make_call", lambda case: lambda: lengths.append((case.attention, case.positions, case.backward))
    )
    for attention in ("softmax", "plain"):
        cost._make_warm_call(Case(attention, 5000, True))()
    cost._make_warm_call(Case("softmax", 50, False))()
    assert lengths == [
        ("softmax", 1024, True),
        ("softmax", 5000, True),
        ("plain", 5000, True),
        ("plain", 5000, True),
        ("softmax", 50, False),
        ("softmax", 50, False),
    ]


# Correctness before cost


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_right_results_pass(monkeypatch, dtype):
    monkeypatch.setattr(cost, "measure_case", lambda case, max_seconds: made_up_cost(case))
    cases = [replace(SMALL, attention=attention, dtype=dtype) for attention in ATTENTIONS]
    assert [measured.case for measured in measure_costs(cases)] == cases


def a_little_more(query, key, value):
    return 1.01 * cost.plain(query, key, value)


def without_a_gradient_of_the_value(query, key, value):
    return cost.plain(query, key, value.detach() + 0 * value)


def not_a_number(query, key, value):
    return cost.plain(query, key, value) * torch.nan


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        (a_little_more, "0.01 in the output"),
        (without_a_gradient_of_the_value, "1 in the gradient of value"),
        (not_a_number, "nan in the output"),
    ],
)
def test_wrong_results_are_never_timed(monkeypatch, wrong, where):
    monkeypatch.setitem(cost._FUNCTIONS, "efficient", wrong)
    monkeypatch.setattr(cost, "measure_case", lambda case, max_seconds: pytest.fail("measured"))
    sentence = f"efficient attention in float32 must agree with its textbook formula, got a relative error of {where}"
    with pytest.raises(RuntimeError, match=sentence):
        measure_costs([replace(SMALL, attention="plain"), SMALL])


# Leaving out


@pytest.fixture
def made_up(monkeypatch):
    """Costs without measuring: 1 second at 256 positions, four times that per doubling where quadratic."""

    def measure(case, max_seconds):
        power = 2 if case.attention == "softmax" else 1
        return made_up_cost(case, seconds=(2 if case.backward else 1) * (case.positions / 256) ** power)

    monkeypatch.setattr(cost, "measure_case", measure)


def test_quadratic_cases_above_the_limit_are_left_out(made_up):
    lengths = (256, 512, 1024, 2048, 4096)
    cases = [
        Case(attention, positions, backward)
        for attention in ("efficient", "softmax")
        for backward in (False, True)
        for positions in lengths
    ]
    lines = []
    costs = measure_costs(cases, limit_seconds=20, progress=lines.append)
    left_out = set(cases) - {measured.case for measured in costs}
    assert left_out == {
        Case("softmax", 2048, False),  # would take 64 s
        Case("softmax", 4096, False),
        Case("softmax", 1024, True),  # would take 32 s
        Case("softmax", 2048, True),
        Case("softmax", 4096, True),
    }
    assert [measured.case for measured in costs] == [case for case in cases if case not in left_out]
    assert lines[:1] == ["efficient, 256 positions, forward: 1000 ms, 3.00 MB"]
    assert lines[13:15] == [
        "softmax, 2048 positions, forward: left out, a call is predicted to take 64.0 s",
        "softmax, 4096 positions, forward: left out, a call is predicted to take 256 s",
    ]
    assert len(lines) == len(cases)


def test_the_longest_of_the_shorter_cases_predicts(monkeypatch):
    monkeypatch.setattr(cost, "measure_case", lambda case, max_seconds: made_up_cost(case, seconds=1.0))
    cases = [Case("softmax", positions, False) for positions in (256, 1024, 512, 2048)]
    assert len(measure_costs(cases[:1] + cases[3:], limit_seconds=16)) == 1  # 64 s
    assert len(measure_costs([cases[0], *cases[2:]], limit_seconds=16)) == 3  # 16 s
    assert len(measure_costs(cases, limit_seconds=16)) == 4  # 4 s


def test_nothing_is_left_out_without_a_limit_or_without_a_shorter_case_of_the_same_settings(made_up):
    cases = [Case("softmax", 256, False), Case("softmax", 2048, True), Case("softmax", 2048, False, heads=3)]
    assert len(measure_costs([Case("softmax", 4096, False), *cases])) == 4
    assert len(measure_costs(cases, limit_seconds=1)) == 3
    assert len(measure_costs([*cases, Case("softmax", 2048, False)], limit_seconds=63)) == 3


# The table


def test_table_has_a_row_per_length_pass_and_quantity():
    forward, backward = Case("softmax", 1024, False), Case("efficient", 1024, True)
    costs = [
        made_up_cost(forward, 0.01234, 1_234_000),
        made_up_cost(replace(forward, attention="efficient"), 0.004, 500_000),
        made_up_cost(backward, 12.3456, 999_600_000),
        made_up_cost(replace(forward, positions=256), 1e-5, 12),
    ]
    assert cost_table(costs).splitlines() == [
        "| positions |                        |    efficient |      softmax | softmax / efficient |",
        "|----------:|-----------------------:|-------------:|-------------:|--------------------:|",
        "|       256 |            forward, ms | not measured |       0.0100 |        not measured |",
        "|       256 | forward + backward, ms | not measured | not measured |        not measured |",
        "|       256 |            forward, MB | not measured |    0.0000120 |        not measured |",
        "|       256 | forward + backward, MB | not measured | not measured |        not measured |",
        "|      1024 |            forward, ms |         4.00 |         12.3 |              3.08 x |",
        "|      1024 | forward + backward, ms |        12300 | not measured |        not measured |",
        "|      1024 |            forward, MB |        0.500 |         1.23 |              2.47 x |",
        "|      1024 | forward + backward, MB |         1000 | not measured |        not measured |",
    ]


def test_table_has_a_ratio_only_where_there_is_something_to_compare():
    table = cost_table([made_up_cost(Case("plain", 7, False)), made_up_cost(Case("einsum", 7, False), 0.0)])
    assert table.splitlines()[0] == "| positions |             | plain | einsum |"
    assert table.splitlines()[2] == "|         7 | forward, ms |   500 |   0.00 |"
    assert len(table.splitlines()) == 4


def test_table_refuses_different_settings():
    with pytest.raises(ValueError, match="costs of one table must share batch, heads, head_dim, dtype and device"):
        cost_table([made_up_cost(SMALL), made_up_cost(replace(SMALL, heads=1))])


def test_a_row_is_flat_and_fits_into_json():
    row = made_up_cost(SMALL).as_row()
    assert json.loads(json.dumps(row)) == row
    assert row == {
        "attention": "efficient",
        "positions": 37,
        "backward": True,
        "batch": 2,
        "heads": 3,
        "head_dim": 5,
        "dtype": "float32",
        "device": "cpu",
        "seconds": 0.5,
        "seconds_min": 0.25,
        "seconds_max": 1.0,
        "repeats": 5,
        "peak_bytes": 3_000_000,
        "extra_bytes": 0,
    }


def test_a_script_without_a_main_guard_can_measure(tmp_path):
    script = "from lineara.measure import Case, measure_costs\nprint(measure_costs([Case('plain', 64, False)]))"
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("Cost(") == 1, done.stderr
