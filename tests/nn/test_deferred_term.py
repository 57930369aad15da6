"""Load balancing where the forward pass is computed a second time, and that no module keeps a graph."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lineara.nn import MultiresolutionAttention

DIM = 6
MODES = {
    "plain": lambda function, *tensors: function(*tensors),
    "not reentrant": lambda function, *tensors: checkpoint(function, *tensors, use_reentrant=False),
    "reentrant": lambda function, *tensors: checkpoint(function, *tensors, use_reentrant=True),
}
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
TOGETHER = (
    r"^load_balancing of a layer under checkpoint\(use_reentrant=True\) must be differentiated once, in the backward "
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(**options):
    return MultiresolutionAttention(DIM, 3, dtype=torch.float64, **options)


def inputs():
    return torch.randn(2, 17, DIM, dtype=torch.float64, requires_grad=True)


def gradients(network, loss, *others):
    network.zero_grad()
    for tensor in others:
        tensor.grad = None
    loss().backward()
    return [tensor.grad for tensor in (*network.parameters(), *others)]


def assert_all_close(actual, expected):
    assert any((one != 0).any() for one in expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@EVERY_MODE
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_the_term_is_that_without_a_checkpoint(mode, masked):
    layer, x = made(), inputs()
    mask = torch.rand(2, 17) > 0.4 if masked else None

    def loss(mode, weight=3.0):
        output = MODES[mode](lambda x: layer(x, key_mask=mask), x)
        return output.square().sum() + weight * layer.last_routing.load_balancing

    expected = gradients(layer, lambda: loss("plain"), x)
    assert_all_close(gradients(layer, lambda: loss(mode), x), expected)
    without = gradients(layer, lambda: loss(mode, 0.0), x)
    assert not torch.allclose(without[-2], expected[-2])


@EVERY_MODE
def test_a_layer_may_be_called_several_times_before_the_backward_pass(mode):
    layer, x = made(), inputs()

    def loss(mode):
        total, y = 0.0, x
        for weight in (1.0, 5.0, 25.0):  # one checkpoint after the other
            y = MODES[mode](layer, y)
            total = total + weight * layer.last_routing.load_balancing
        y = MODES[mode](lambda y: layer(layer(y)), y)  # two calls in one, of which the last is read
        return y.sum() + total + 125.0 * layer.last_routing.load_balancing

    assert_all_close(gradients(layer, lambda: loss(mode), x), gradients(layer, lambda: loss("plain"), x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the inner checkpoint
@EVERY_MODE
def test_several_layers_in_one_checkpoint_and_a_checkpoint_in_another(mode):
    network, x = nn.ModuleList([made(), made(top_k=2)]), inputs()

    def loss(mode):
        outer = MODES[mode]
        y = outer(lambda x: MODES[mode](network[1], network[0](x)), x)
        terms = [layer.last_routing.load_balancing for layer in network]
        return y.square().sum() + terms[0] + 7.0 * terms[1]

    assert_all_close(gradients(network, lambda: loss(mode), x), gradients(network, lambda: loss("plain"), x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's, of the inner checkpoint
@EVERY_MODE
def test_the_backward_pass_may_run_in_a_thread_of_its_own(mode):
    """As on a GPU, where nodes made there are counted anew."""
    layer, x = made(), inputs()

    def loss(mode):
        total, y = 0.0, x
        for weight in (1.0, 5.0):
            y = MODES[mode](lambda y: MODES[mode](layer, y.sin()), y)
            total = total + weight * layer.last_routing.load_balancing
        return y.sum() + total

    expected = gradients(layer, lambda: loss("plain"), x)
    layer.zero_grad()
    x.grad = None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss(mode).backward).result()
    assert_all_close([tensor.grad for tensor in (*layer.parameters(), x)], expected)


@EVERY_MODE
def test_a_term_that_a_checkpoint_hands_out_has_its_gradient_once(mode):
    layer, x = made(), inputs()

    def both(x):
        return layer(x), 3.0 * layer.last_routing.load_balancing

    def loss(mode):
        output, term = MODES[mode](both, x)
        return output.sum() + term

    assert_all_close(gradients(layer, lambda: loss(mode), x), gradients(layer, lambda: loss("plain"), x))


@EVERY_MODE
def test_steps_follow_each_other_and_calls_between_them_do_not_matter(mode):
    layer, x = made(), inputs()

    def loss(mode):
        with torch.no_grad():
            for _ in range(300):  # more than are remembered
                layer(x[:1, :2])
        output = MODES[mode](layer, x)
        term = layer.last_routing.load_balancing
        with torch.no_grad():
            layer(-x)
        layer(-x)
        return output.sum() + term

    expected = gradients(layer, lambda: loss("plain"), x)
    for _ in range(2):
        assert_all_close(gradients(layer, lambda: loss(mode), x), expected)


def test_a_reentrant_term_apart_from_its_output_is_an_error():
    layer, x = made(), inputs()
    output = MODES["reentrant"](layer, x)
    term = layer.last_routing.load_balancing
    output.sum().backward()
    with pytest.raises(RuntimeError, match=TOGETHER):
        term.backward()
    output = MODES["reentrant"](layer, x)
    with pytest.raises(
        RuntimeError, match=TOGETHER + r".*, got a backward pass without the output; add it to the loss"
    ):
        layer.last_routing.load_balancing.backward()
    output = MODES["reentrant"](layer, x)
    term = layer.last_routing.load_balancing
    with torch.no_grad():
        for _ in range(300):
            layer(x[:1, :2])
    with pytest.raises(RuntimeError, match=TOGETHER + ".*, got more calls after it than are remembered"):
        (output.sum() + term).backward()


@EVERY_MODE
def test_the_input_is_freed_with_the_output(mode):
    layer = made()
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    weight = nn.Parameter(torch.ones(DIM, dtype=torch.float64))
    scaled = x * weight
    held = [weakref.ref(scaled), weakref.ref(x)]
    output = MODES[mode](layer, scaled)
    del scaled, x
    gc.collect()
    assert held[0]() is not None or mode == "plain" or held[1]() is None
    del output
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    assert layer.last_routing.load.sum() == pytest.approx(1.0)
    assert layer.last_routing.load_balancing > 0


def test_a_term_whose_output_is_gone_has_its_value_and_is_no_silent_zero():
    layer, x = made(), inputs()
    output = layer(x)
    expected = layer.last_routing.load_balancing.detach().clone()
    del output
    term = layer.last_routing.load_balancing
    assert term == expected
    with pytest.raises(RuntimeError, match=r"^load_balancing must be read while the output of its call is kept"):
        term.backward()
    with torch.no_grad():
        assert not layer.last_routing.load_balancing.requires_grad


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_gradients_of_gradients_forward_mode_and_functional_calls():
    layer, x = made(), inputs()
    output = layer(x)
    term = layer.last_routing.load_balancing
    (first,) = torch.autograd.grad(term, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().max() > 0
    assert output.shape == x.shape

    def value(x):
        layer(x)
        return layer.last_routing.load_balancing

    torch.testing.assert_close(torch.func.grad(value)(x.detach()), first.detach())
    with torch.autograd.forward_ad.dual_level():
        tangent = torch.ones_like(x)
        given = value(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        derivative = torch.autograd.forward_ad.unpack_dual(given).tangent
    torch.testing.assert_close(derivative, (first * tangent).sum().detach())


def test_compiled_it_is_differentiated_too():
    torch._dynamo.reset()
    layer, x = made(), inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def loss(function):
        return function(x).sum() + 3.0 * layer.last_routing.load_balancing

    assert_all_close(gradients(layer, lambda: loss(compiled), x), gradients(layer, lambda: loss(layer), x))
    torch._dynamo.reset()


@EVERY_MODE
def test_copies_and_pickles_know_nothing_of_calls(mode):
    layer, x = made(), inputs()
    output = MODES[mode](layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.last_routing is None
        assert_all_close([other(x)], [output])
    (output.sum() + layer.last_routing.load_balancing).backward()


def test_in_inference_mode_nothing_waits():
    layer, x = made(), inputs()
    with torch.inference_mode():
        layer(x.detach())
        assert not layer.last_routing.load_balancing.requires_grad


@EVERY_MODE
@pytest.mark.parametrize("frozen", ["router", "layer", "evaluated"])
def test_a_router_that_does_not_learn_passes_the_gradient_of_the_term_on(mode, frozen):
    layer, x = made(), inputs()
    layer.train(frozen != "evaluated")
    if frozen != "evaluated":
        (layer if frozen == "layer" else layer.heads.router).requires_grad_(False)

    def loss(mode):
        return MODES[mode](layer, x).sum() + 3.0 * layer.last_routing.load_balancing

    learning = [tensor for tensor in (*layer.parameters(), x) if tensor.requires_grad]
    expected = torch.autograd.grad(loss("plain"), learning)
    loss(mode).backward()
    assert_all_close([tensor.grad for tensor in learning], expected)


@EVERY_MODE
def test_a_term_without_anything_that_learns_leaves_the_backward_pass_alone(mode):
    layer, scale = made().requires_grad_(False), torch.ones((), dtype=torch.float64, requires_grad=True)
    x = inputs().detach()
    output = MODES[mode](lambda x, scale: layer(x) * scale, x, scale)
    (output.sum() + layer.last_routing.load_balancing).backward()
    assert scale.grad != 0


@EVERY_MODE
def test_a_call_without_gradients_inside_a_checkpoint_does_not_matter(mode):
    layer, x = made(), inputs()

    def twice(x):
        with torch.no_grad():
            first = layer(x)
        return layer(x + first)

    def loss(mode):
        total, y = 0.0, x
        for weight in (1.0, 5.0):
            y = MODES[mode](twice, y)
            total = total + weight * layer.last_routing.load_balancing
        return y.sum() + total

    expected = gradients(layer, lambda: loss("plain"), x)
    for _ in range(2):
        assert_all_close(gradients(layer, lambda: loss(mode), x), expected)


def test_a_second_backward_pass_of_a_reentrant_term_says_that_it_is_one():
    layer, x = made(), inputs()
    loss = MODES["reentrant"](layer, x).sum() + layer.last_routing.load_balancing
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=TOGETHER + ".*, got a backward pass of the output before it; .*=False$"):
        loss.backward()
