import pytest
import torch
from attention import contenders
from attention.contenders import ANOTHER, EAGER_AND_COMPILED, NAMES, SAME, SDPA, chosen
from attention.inputs import check, expected_results, prepare, random_inputs
from attention.shapes import PASSES, Shape

SHAPE = Shape(2, 3, 37, 5, 7)


def prepared(name, shape=SHAPE, dtype=torch.float64, pass_name="forward + backward", seeds=1):
    [contender] = chosen([name])
    inputs = [random_inputs(shape, dtype, "cpu", seed) for seed in range(seeds)]
    call = contender.make(shape, dtype, "cpu")
    return prepare(contender, call, shape, inputs, backward=pass_name != "forward"), inputs


@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize(
    "name", ["lineara", "lineara-map", "lineara-streaming", "lineara-reference", "eager", "eager-map", "eager-einsum"]
)
def test_contenders_of_the_same_formula_agree_with_the_reference(name, pass_name):
    found, [inputs] = prepared(name, pass_name=pass_name)
    assert check(found, expected_results(inputs, pass_name), pass_name) < 1e-13
    found.step(pass_name).prepare(0)()


@pytest.mark.parametrize("pass_name", PASSES)
def test_dot_product_attention_is_another_formula_and_needs_finite_numbers_only(pass_name):
    found, [inputs] = prepared("sdpa-math", pass_name=pass_name)
    assert found.contender.formula == ANOTHER
    assert check(found, expected_results(inputs, pass_name), pass_name) is None


def test_maps_are_contiguous_with_channels_before_positions():
    found, [inputs] = prepared("eager-map")
    assert [tuple(tensor.shape) for tensor in found.sets[0]] == [(2, 3, 5, 37), (2, 3, 5, 37), (2, 3, 7, 37)]
    assert all(tensor.is_contiguous() for tensor in found.sets[0])
    assert torch.equal(found.sets[0][2].mT, inputs[2])
    assert torch.equal(found.grad_outputs[0].mT, inputs[3])


def test_a_backend_runs_within_its_own_context(monkeypatch):
    inside = []

    def watched(*tensors):
        inside.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()))
        return tensors[2]

    for name in ("sdpa-flash", "sdpa-math"):
        found, _ = prepared(name, pass_name="forward")
        object.__setattr__(found, "call", watched)
        found.results("forward")
    assert inside == [(True, False), (False, True)]


def test_compiled_ones_are_known_as_such():
    assert [one.name for one in chosen(None) if one.compiles] == ["compile", "compile-map"]
    assert set(EAGER_AND_COMPILED) <= set(NAMES)
    assert {one.name for one in chosen(None) if one.quadratic} == set(SDPA)
    assert all(chosen([name])[0].formula == SAME for name in EAGER_AND_COMPILED)


def test_contenders_come_in_the_order_of_the_table_and_unknown_ones_are_refused():
    assert [one.name for one in chosen(["eager", "lineara"])] == ["lineara", "eager"]
    assert [one.name for one in chosen(None)] == list(NAMES)
    assert len(set(NAMES)) == len(NAMES)
    with pytest.raises(ValueError, match=r"contenders must be among lineara, .*, got 'linear'"):
        chosen(["linear"])


def test_tokens_and_maps_hold_the_values_of_all_heads():
    inputs = random_inputs(Shape(2, 3, 35, 5, 7), torch.float32, "cpu")
    [tokens], [image] = contenders._tokens(*inputs[:3]), contenders._map(*inputs[:3])
    assert (tuple(tokens.shape), tuple(image.shape)) == ((2, 35, 21), (2, 21, 5, 7))
    assert torch.equal(image.flatten(2).mT, tokens)
    assert torch.equal(tokens[1, 4, 7:14], inputs[2][1, 1, 4])
