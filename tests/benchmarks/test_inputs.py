from dataclasses import replace

import pytest
import torch
from attention.contenders import ANOTHER, chosen
from attention.inputs import TOLERANCES, check, expected_results, prepare, random_inputs, weighed_call
from attention.shapes import Shape
from torch import nn

from lineara.measure.cost import plain

SHAPE = Shape(2, 3, 37, 5, 7)
BOTH = "forward + backward"
[EAGER] = chosen(["eager"])


def prepared(call, dtype=torch.float32, pass_name=BOTH, seeds=1, **changes):
    inputs = [random_inputs(SHAPE, dtype, "cpu", seed) for seed in range(seeds)]
    return prepare(replace(EAGER, **changes), call, SHAPE, inputs, backward=pass_name != "forward"), inputs


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_right_results_pass_in_every_dtype(dtype):
    found, [inputs] = prepared(plain, dtype)
    assert check(found, expected_results(inputs, BOTH), BOTH) < TOLERANCES[dtype] / 2


def a_little_more(query, key, value):
    return 1.05 * plain(query, key, value)


def without_a_gradient_of_the_value(query, key, value):
    return plain(query, key, value.detach() + 0 * value)


def not_a_number(query, key, value):
    return plain(query, key, value) * torch.nan


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (a_little_more, "its output must be within 1e-02 of the reference's, got 0.05"),
        (without_a_gradient_of_the_value, "its gradient of value must be within 1e-02 of the reference's, got 1$"),
        (not_a_number, "its output must be within 1e-02 of the reference's, got nan"),
    ],
)
def test_wrong_results_are_refused(wrong, what):
    found, [inputs] = prepared(wrong, torch.bfloat16)
    with pytest.raises(ArithmeticError, match=what):
        check(found, expected_results(inputs, BOTH), BOTH)


def test_a_factor_belongs_to_the_formula():
    found, [inputs] = prepared(lambda *tensors: 0.25 * plain(*tensors), factor=lambda shape: 0.25)
    assert check(found, expected_results(inputs, BOTH), BOTH) < 1e-6


def test_another_formula_must_be_finite():
    found, [inputs] = prepared(a_little_more, formula=ANOTHER)
    assert check(found, expected_results(inputs, BOTH), BOTH) is None
    found, _ = prepared(not_a_number, formula=ANOTHER)
    with pytest.raises(ArithmeticError, match="finite"):
        check(found, [], BOTH)


def test_turns_go_through_the_sets_of_inputs():
    found, inputs = prepared(plain, seeds=3, pass_name="forward")
    step = found.step("forward")
    assert step.copies == 3
    for turn in range(7):
        assert torch.equal(step.prepare(turn)(), plain(*inputs[turn % 3][:3]))


def test_passes_compute_what_they_say():
    found, [inputs] = prepared(plain)
    output, *gradients = expected_results(inputs, BOTH)
    both = found.step(BOTH).prepare(0)()
    backward = found.step("backward").prepare(0)()
    for given, right in zip(both, (output, *gradients), strict=True):
        torch.testing.assert_close(given.double(), right, rtol=1e-4, atol=1e-6)
    for given, right in zip(backward, gradients, strict=True):
        torch.testing.assert_close(given.double(), right, rtol=1e-4, atol=1e-6)


def test_the_forward_pass_runs_without_gradients():
    seen = []

    def call(query, key, value):
        seen.append((torch.is_grad_enabled(), query.requires_grad))
        return plain(query, key, value)

    prepared(call, pass_name="forward")[0].results("forward")
    prepared(call)[0].results(BOTH)
    assert seen == [(False, False), (True, True)]


def test_the_weights_of_a_layer_are_trained_too():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(3.0))

        def forward(self, query, key, value):
            return self.weight * plain(query, key, value)

    found, [inputs] = prepared(Layer(), formula=ANOTHER)
    *_, gradient = found.step("backward").prepare(0)()
    expected = (plain(*inputs[:3]) * inputs[3]).sum()
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_a_quadratic_call_is_warmed_up_at_a_shorter_length(monkeypatch):
    lengths = []

    def make(shape, dtype, device):
        return lambda *tensors: lengths.append(tensors[0].shape[2]) or plain(*tensors)

    for quadratic in (True, False):
        contender = replace(EAGER, make=make, quadratic=quadratic)
        monkeypatch.setattr("attention.inputs.chosen", lambda names, contender=contender: [contender])
        weighed_call("eager", Shape(1, 1, 2003, 2, 3), "float32", "forward")()
    assert lengths == [1024, 2003, 2003, 2003]
