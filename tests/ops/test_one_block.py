"""What is differentiated and fits into one block: formulas that keep their weights, to any order."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from lineara.ops import (
    attend_context,
    efficient_attention,
    explain_implementation,
    kernel_attention,
    multiresolution_attention,
    summarize_context,
)
from lineara.ops.linear import one_block, reference

LARGE = (1, 2, 2048, 64)  # 2^18 elements
EXACT = {"rtol": 1e-10, "atol": 1e-10}
OPERATIONS = {
    "softmax": efficient_attention,
    "scaling": partial(efficient_attention, normalization="scaling"),
    "relu": partial(kernel_attention, feature_map="relu"),
    "elu": kernel_attention,
    "windows": partial(multiresolution_attention, resolutions=(3, 1)),
    "largest of windows": partial(multiresolution_attention, resolutions=(4, 2), compression="max", feature_map="elu"),
}
operations = pytest.mark.parametrize("name", OPERATIONS)


def tensors(shape=LARGE, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))


@pytest.fixture
def ran(monkeypatch):
    """The functions of the module that have run."""
    names = []
    for name in ("summarize", "attend"):
        function = getattr(one_block, name)

        def spy(*arguments, name=name, function=function):
            names.append(name)
            return function(*arguments)

        monkeypatch.setattr(one_block, name, spy)
    return names


@pytest.mark.parametrize("layout", ["heads first", "channels first"])
@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("more", ["", "gate", "mask", "packed"])
@pytest.mark.parametrize("name", ["softmax", "identity", "relu", "elu"])
def test_values_and_gradients_of_three_orders_are_those_of_the_reference(name, more, scale, layout):
    batch = 1 if more == "packed" else 2
    inputs = [torch.randn(batch, 3, n, d, dtype=torch.float64) for n, d in ((5, 4), (6, 4), (6, 7))]
    if layout == "channels first":
        inputs = [tensor.mT.contiguous().mT for tensor in inputs]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    gate = torch.rand(batch, 3, 5, dtype=torch.float64, requires_grad=True) if more == "gate" else None
    mask = torch.arange(6) < torch.tensor([[4], [0]]) if more == "mask" else None
    starts = (torch.tensor([0, 2, 5]), torch.tensor([0, 5, 6])) if more == "packed" else (None, None)

    def derivatives(means):
        query, key, value = inputs
        _, *sums = means.summarize(key, value, mask, starts[1], name, scale)
        results = [means.attend(query, *sums, gate, starts[0], name, scale)]
        wanted = [*inputs, *([] if gate is None else [gate])]
        for _ in range(3):
            total = sum((result.sin() * (1 + result)).sum() for result in results)
            results = torch.autograd.grad(total, wanted, create_graph=True)
            yield results

    for given, right in zip(derivatives(one_block), derivatives(reference)):
        for grad, true in zip(given, right):
            assert (grad - true).norm() <= 1e-9 * true.norm()


@operations
def test_it_runs_where_explain_says_streaming(name, ran):
    inputs = tensors()
    assert explain_implementation(*inputs).startswith("streaming: ")
    right = torch.autograd.grad(OPERATIONS[name](*inputs, impl="reference").square().sum(), inputs)
    assert not ran
    output = OPERATIONS[name](*inputs)
    assert set(ran) == {"summarize", "attend"}
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), inputs), right, **EXACT)
    ran.clear()
    OPERATIONS[name](*inputs, impl="streaming")
    assert set(ran) == {"summarize", "attend"}


def test_context_functions_are_differentiated_by_it_too(ran):
    query, key, value = tensors()
    output = attend_context(query, summarize_context(key, value))
    assert ran == ["summarize", "attend"]
    right = efficient_attention(query, key, value, impl="reference")
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), (query, key, value)),
        torch.autograd.grad(right.square().sum(), (query, key, value)),
        **EXACT,
    )


def test_without_gradients_or_below_its_size_or_above_it_does_not_run(ran):
    inputs = tensors()
    with torch.no_grad():
        efficient_attention(*inputs)
    efficient_attention(*(tensor.detach() for tensor in inputs))
    efficient_attention(*tensors((1, 2, 2047, 64)))
    efficient_attention(*tensors((1, 8, 4097, 64), torch.float32))
    assert not ran


def test_selective_checkpointing_may_keep_every_result_of_it(ran):
    inputs = tensors()

    def policy(context, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    contexts = partial(create_selective_checkpoint_contexts, policy)
    output = checkpoint(kernel_attention, *inputs, use_reentrant=False, context_fn=contexts)
    given = torch.autograd.grad(output.square().sum(), inputs)
    assert set(ran) == {"summarize", "attend"}
    right = torch.autograd.grad(kernel_attention(*inputs, impl="reference").square().sum(), inputs)
    torch.testing.assert_close(given, right, **EXACT)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, torch.finfo(torch.float64).max])
@operations
def test_what_a_masked_position_holds_reaches_nothing(name, garbage, ran):
    clean = tensors((2, 2, 1024, 64))
    key_mask = torch.ones(2, 1024, dtype=torch.bool)
    key_mask[0, 900:] = False
    key_mask[0, 3] = False
    key_mask[1] = False
    hidden = ~key_mask[:, None, :, None]
    dirty = [clean[0], *(tensor.masked_fill(hidden, garbage).detach().requires_grad_() for tensor in clean[1:])]
    outputs, gradients = [], []
    for inputs in (clean, dirty):
        outputs.append(OPERATIONS[name](*inputs, key_mask=key_mask))
        gradients.append(torch.autograd.grad((100.0 * outputs[-1]).square().sum(), inputs))
    assert len(ran) >= 4
    torch.testing.assert_close(*outputs, **EXACT)
    torch.testing.assert_close(*gradients, **EXACT)
    assert not gradients[1][1].masked_select(hidden).any()
    assert not gradients[1][2].masked_select(hidden).any()


@operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32_and_gradients_have_the_inputs_dtype(name, dtype):
    exact = tensors((1, 2, 2048, 64), torch.float32)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in exact]
    wide = [tensor.detach().float().requires_grad_() for tensor in narrow]
    given = torch.autograd.grad(OPERATIONS[name](*narrow).float().square().sum(), narrow)
    right = torch.autograd.grad(OPERATIONS[name](*wide).square().sum(), wide)
    for grad, true in zip(given, right):
        assert grad.dtype == dtype
        assert (grad.float() - true).norm() < 0.02 * true.norm()


def test_a_backward_pass_under_autocast_keeps_its_precision():
    inputs = tensors(dtype=torch.float32)
    output = kernel_attention(*inputs)
    right = torch.autograd.grad(output.square().sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        given = torch.autograd.grad(output.square().sum(), inputs)
    torch.testing.assert_close(given, right)


@operations
def test_only_what_is_asked_for_gets_a_gradient(name):
    inputs = tensors()
    all_of_them = torch.autograd.grad(OPERATIONS[name](*inputs).square().sum(), inputs)
    for i, right in enumerate(all_of_them):
        some = [tensor.detach().requires_grad_(i == j) for j, tensor in enumerate(inputs)]
        (given,) = torch.autograd.grad(OPERATIONS[name](*some).square().sum(), some[i])
        torch.testing.assert_close(given, right, **EXACT)


def test_it_keeps_no_more_than_two_softmaxes_do():
    def kept(call):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = call(*inputs)
        return output, sum(sizes.values())

    inputs = tensors(dtype=torch.float32)
    _, plain = kept(lambda query, key, value: query.softmax(-1) @ (key.softmax(-2).mT @ value))
    _, ours = kept(efficient_attention)
    assert ours <= 1.05 * plain


def test_a_map_is_answered_as_a_map_and_so_are_its_gradients():
    for shape in ((1, 2, 64, 2048), (1, 8, 64, 5000)):
        maps = [torch.randn(shape, requires_grad=True) for _ in range(3)]
        output = efficient_attention(*(tensor.mT for tensor in maps)).mT
        assert output.is_contiguous()
        seen = torch.autograd.grad(output, maps, torch.randn_like(output))
        assert all(grad.is_contiguous() for grad in seen)


@operations
def test_no_keys_and_empty_sequences_give_zeros(name):
    query, key, value = tensors()
    nothing = (tensor[:, :, :0].detach().requires_grad_() for tensor in (key, value))
    output = OPERATIONS[name](query, *nothing)
    assert not output.any()
    assert not torch.autograd.grad(output.sum(), query)[0].any()
    if "windows" in name:
        query, key, value = (tensor[:, :, :2000].repeat(1, 1, 2, 1) for tensor in (query, key, value))
    starts = torch.tensor([0, 0, 1000, 1000, query.shape[2], query.shape[2]])
    packed = {"cu_seqlens_query": starts, "cu_seqlens_key": starts}
    given, right = (OPERATIONS[name](query, key, value, **packed, impl=impl) for impl in ("auto", "reference"))
    torch.testing.assert_close(given, right, **EXACT)


@operations
def test_gradients_of_many_outputs_at_once_are_those_of_each(name):
    inputs = tensors()
    output = OPERATIONS[name](*inputs)
    directions = torch.randn(2, *output.shape, dtype=output.dtype)
    given = torch.autograd.grad(output, inputs, directions, is_grads_batched=True, retain_graph=True)
    right = [torch.autograd.grad(output, inputs, direction, retain_graph=True) for direction in directions]
    torch.testing.assert_close(given, tuple(torch.stack(grads) for grads in zip(*right)), **EXACT)


@pytest.mark.parametrize("positions", [100, 2048])
@pytest.mark.parametrize("counted", ["forward", "backward"])
@operations
def test_a_mode_in_one_pass_alone_does_not_disturb_checkpointing(name, counted, positions):
    inputs = tensors((1, 2, positions, 64))
    modes = {
        way: FlopCounterMode(display=False) if way == counted else nullcontext() for way in ("forward", "backward")
    }
    with modes["forward"]:
        output = checkpoint(OPERATIONS[name], *inputs, use_reentrant=False)
    with modes["backward"]:
        given = torch.autograd.grad(output.square().sum(), inputs)
    right = torch.autograd.grad(OPERATIONS[name](*inputs).square().sum(), inputs)
    torch.testing.assert_close(given, right, **EXACT)
