"""The operators, and every way in which torch looks at a call: compiled, exported, transformed, in a cold process."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lineara.ops import (
    attend_context,
    efficient_attention,
    kernel_attention,
    merge_contexts,
    multiresolution_attention,
    softmax_attention,
    summarize_context,
)
from lineara.ops.linear import operators

OPERATIONS = {
    "softmax": efficient_attention,
    "scaling": partial(efficient_attention, normalization="scaling"),
    "relu": partial(kernel_attention, feature_map="relu"),
    "elu": kernel_attention,
    "windows": partial(multiresolution_attention, resolutions=(8, 4, 2, 1)),
    "largest of windows": partial(
        multiresolution_attention, resolutions=(8, 4, 2, 1), compression="max", feature_map="elu"
    ),
}
operations = pytest.mark.parametrize("name", OPERATIONS)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tensors(keys=13, dtype=torch.float64):
    return tuple(torch.randn(2, 3, n, d, dtype=dtype, requires_grad=True) for n, d in ((7, 5), (keys, 5), (keys, 11)))


# What torch.library asks of an operator.


# torch's own checker looks at .grad where there is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("feature_map", "impl", "masked", "dtype"),
    [
        ("softmax", "streaming", True, torch.float64),
        ("softmax", "auto", False, torch.float16),
        ("identity", "streaming", False, torch.float16),
        ("identity", "auto", True, torch.float64),
        ("relu", "streaming", False, torch.float64),
        ("elu", "streaming", True, torch.float16),
        ("elu", "auto", False, torch.float64),
    ],
)
def test_operators_keep_the_contract_of_torch_library(feature_map, impl, masked, dtype):
    query, key, value = tensors(dtype=dtype)
    mask = torch.rand(2, 13) > 0.4 if masked else None
    options = (feature_map, 0.7)
    plain = ([], [], "mean", impl)
    torch.library.opcheck(operators.SUMMARIZE, (key, value, mask, None, None, None, *options, *plain))
    total, weighted_sum = (
        torch.rand(2, 3, *shape, dtype=torch.float32 if dtype == torch.float16 else dtype).requires_grad_()
        for shape in ((5,), (5, 11))
    )
    gate = torch.rand(2, 3, 7, dtype=dtype).requires_grad_() if masked else None
    torch.library.opcheck(operators.ATTEND, (query, total, weighted_sum, gate, None, *options, impl))
    torch.library.opcheck(operators.ATTEND, (query.mT.contiguous().mT, total, weighted_sum, gate, None, *options, impl))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compression", ["mean", "conv"])
def test_windows_keep_the_contract_too(compression):
    _, key, value = tensors()
    weights = [torch.randn(3, d, 4, dtype=key.dtype).requires_grad_() for d in (5, 11)]
    if compression == "mean":
        weights = [None, None]
    mask = torch.rand(2, 13) > 0.4
    options = ("softmax", 0.7, [4, 2, 1], [13], compression, "streaming")
    torch.library.opcheck(operators.SUMMARIZE, (key, value, mask, None, *weights, *options))


def test_there_are_four_operators_of_attention():
    assert {name for name in dir(torch.ops.lineara) if name.startswith(("summarize", "attend"))} == {
        "summarize",
        "summarize_backward",
        "attend",
        "attend_backward",
        "summarize_shard",
        "summarize_shard_backward",
    }


# torch.compile.


@pytest.mark.parametrize(
    ("name", "impl"),
    [
        *((name, "auto") for name in OPERATIONS),
        ("relu", "streaming"),
        ("softmax", "reference"),
    ],
)
def test_one_graph_serves_every_length(name, impl, with_gradients, monkeypatch):
    """With and without a mask, with and without gradients: four graphs in all, equal to the eager call."""
    monkeypatch.setattr("lineara.ops.dispatch._ONE_BLOCK_ELEMENTS", 4 * 500 * 8)  # both sides of the size rule
    monkeypatch.setattr("lineara.ops.dispatch._LONG", 1)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    call = partial(OPERATIONS[name], impl=impl)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for masked in (False, True):
        for positions in (17, 101, 1009):
            inputs = [torch.randn(1, 4, positions, 8, dtype=torch.float64) for _ in range(3)]
            mask = torch.rand(1, positions) > 0.3 if masked else None
            torch.testing.assert_close(compiled(*inputs, key_mask=mask), call(*inputs, key_mask=mask), **EXACT)
            given, expected = (
                with_gradients(partial(f, key_mask=mask), inputs, torch.randn_like(inputs[0]).fill_(0.7))
                for f in (compiled, call)
            )
            for one, other in zip(given, expected):
                torch.testing.assert_close(one, other, **EXACT)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_a_compiled_graph_holds_the_operators_whatever_the_length():
    seen = []

    def backend(graph, example_inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes if "lineara" in str(node.target))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(efficient_attention, fullgraph=True, backend=backend)
    compiled(*(tensor.detach() for tensor in tensors()))
    assert seen == ["lineara.summarize.default", "lineara.attend.default"]


# What torch 2.11 calls of its own when inductor is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_gate_of_any_layout_compiles_with_its_gradient():
    query, key, value = tensors(keys=11)
    gate = torch.rand(3, 2, 7, dtype=torch.float64).transpose(0, 1).requires_grad_()
    call = partial(multiresolution_attention, resolutions=(2, 1, 1))
    right = torch.autograd.grad(call(query, key, value, gate=gate).square().sum(), gate)
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(query, key, value, gate=gate).square().sum(), gate), right, **EXACT
    )


def test_softmax_attention_compiles_for_any_number_of_heads():
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    for heads in (2, 1, 4):
        query, key, value = (torch.randn(2, heads, 9, 4) for _ in range(3))
        torch.testing.assert_close(compiled(query, key, value), softmax_attention(query, key, value))


def test_context_functions_compile_to_one_graph():
    def call(query, key, value):
        parts = [summarize_context(key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 5), (5, 13))]
        return attend_context(query, merge_contexts(*parts))

    torch.compiler.reset()
    inputs = tensors()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs), **EXACT)


# torch.export and ONNX.


class Call(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *inputs):
        return self.call(*inputs)


EXPORTED = {
    **OPERATIONS,
    "dot products": softmax_attention,
    "scaled dot products": partial(softmax_attention, normalization="scaling"),
}
N = Dim("n", min=2, max=1 << 20)


@pytest.mark.parametrize("name", EXPORTED)
def test_export_holds_standard_operators_alone_for_any_length(name):
    def inputs(positions):
        return tuple(torch.randn(1, 4, positions, 8) for _ in range(3))

    module = Call(EXPORTED[name])
    program = torch.export.export(module, inputs(64), dynamic_shapes=(({2: N}, {2: N}, {2: N}),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("lineara" in target for target in called), called
    exported = program.module()
    for positions in (2, 5, 1001):
        given = inputs(positions)
        torch.testing.assert_close(exported(*given), module(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["softmax", "elu", "windows", "dot products"])
def test_onnxruntime_computes_the_same(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    shapes = (({2: N}, {2: N}, {2: N}),)
    example = tuple(torch.randn(1, 4, 64, 8) for _ in range(3))
    program = torch.onnx.export(Call(EXPORTED[name]), example, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
    program.save(tmp_path / "attention.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx")
    for positions in (5, 64, 2_000 if name == "dot products" else 40_000):
        given = [torch.randn(1, 4, positions, 8) for _ in range(3)]
        names = [argument.name for argument in session.get_inputs()]
        (output,) = session.run(None, {key: tensor.numpy() for key, tensor in zip(names, given)})
        torch.testing.assert_close(torch.from_numpy(output), EXPORTED[name](*given), rtol=1e-5, atol=1e-5)


# torch.func, and forward mode.

# torch's own forward mode calls what torch has deprecated.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def large(positions):
    """Values beyond what is one block, for so many positions; only the numbers of channels differ."""
    return [torch.randn(1, 4, positions, 3, dtype=torch.float64) for _ in range(3)]


@forward_mode
@pytest.mark.parametrize(
    ("name", "positions", "compiled"),
    [
        *((name, positions, False) for name in OPERATIONS for positions in (100, 2_000)),
        *((name, 2_000, True) for name in ("softmax", "elu", "windows")),
    ],
)
def test_transforms_are_right_at_any_length(name, positions, compiled, monkeypatch):
    monkeypatch.setattr("lineara.ops.dispatch._LONG", 1)
    monkeypatch.setattr("lineara.ops.dispatch._ONE_BLOCK_ELEMENTS", 4_000)
    torch.compiler.reset()
    query, key, value = large(positions)
    tangent = torch.randn_like(key)

    def of_key(key):
        return OPERATIONS[name](query, key, value)

    def loss(key):
        return of_key(key).sin().sum()

    def run(call, *inputs):
        return (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(*inputs)

    leaf = key.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(run(torch.func.grad(loss), key), expected, **EXACT)
    mapped = run(torch.func.vmap(torch.func.grad(loss)), key[None])[0]
    torch.testing.assert_close(mapped, expected, **EXACT)
    step = 1e-6
    difference = (of_key(key + step * tangent) - of_key(key - step * tangent)) / (2 * step)
    derivative = run(lambda key: torch.func.jvp(of_key, (key,), (tangent,))[1], key)
    torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-7)

    def under_dual_level(key, tangent):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(of_key(forward_ad.make_dual(key, tangent))).tangent

    torch.testing.assert_close(run(under_dual_level, key, tangent), derivative, **EXACT)


@forward_mode
@operations
def test_higher_derivatives_by_transforms(name):
    query, key, value = large(11)

    def of_factors(factors):
        return OPERATIONS[name](factors[0] * query, factors[1] * key, factors[2] * value).square().sum()

    at = torch.ones(3, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(of_factors, at)
    torch.testing.assert_close(torch.func.hessian(of_factors)(at), hessian, rtol=1e-9, atol=1e-9)
    leaf = at.clone().requires_grad_()
    gradient = torch.autograd.grad(of_factors(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.jacfwd(of_factors)(at), gradient, rtol=1e-9, atol=1e-9)


def test_functional_call_under_grad_is_right():
    linear = nn.Linear(3, 3, dtype=torch.float64)
    query, key, value = large(23)

    def loss(parameters):
        return efficient_attention(query, torch.func.functional_call(linear, parameters, (key,)), value).sin().sum()

    given = torch.func.grad(loss)(dict(linear.named_parameters()))
    efficient_attention(query, linear(key), value).sin().sum().backward()
    torch.testing.assert_close(given["weight"], linear.weight.grad, **EXACT)


@forward_mode
@operations
def test_an_explicit_choice_that_cannot_be_transformed_is_refused(name):
    query, key, value = large(7)
    call = partial(OPERATIONS[name], impl="streaming")
    with pytest.raises(ValueError, match=r"^impl must be 'reference' or 'auto' under a torch.func transform, got 'str"):
        torch.func.grad(lambda key: call(query, key, value).sum())(key)
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match=r"^impl must be 'reference' or 'auto' under forward-mode differentiation, got"),
    ):
        call(query, key, forward_ad.make_dual(value, value))


@forward_mode
@pytest.mark.parametrize("made", ["one tensor", "one of another", "all of one"])
@pytest.mark.parametrize("impl", ["reference", "streaming"])
@operations
def test_gradients_of_inputs_that_depend_on_one_another(name, impl, made):
    """The first and second gradients, where the first is differentiated again."""
    first, second, _ = tensors(keys=7)
    first, second = (
        tensor[..., :5].repeat(1, 4, 1, 1)[:, :4].detach().requires_grad_() for tensor in (first, first + 1)
    )

    def loss(impl):
        given = {
            "one tensor": (first, first, first),
            "one of another": (second, first, second * first),
            "all of one": (first.tanh(), first, first * 2),
        }[made]
        return OPERATIONS[name](*given, impl=impl).square().sum()

    right = torch.autograd.grad(loss("reference"), first)
    (given,) = torch.autograd.grad(loss(impl), first, create_graph=True)
    torch.testing.assert_close(given, right[0], rtol=1e-9, atol=1e-9)
    (again,) = torch.autograd.grad(loss("reference"), first, create_graph=True)
    torch.testing.assert_close(
        torch.autograd.grad(given.square().sum(), first),
        torch.autograd.grad(again.square().sum(), first),
        rtol=1e-9,
        atol=1e-9,
    )


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("name", [*OPERATIONS, "context"])
def test_selective_checkpointing_may_keep_every_result(name, impl):
    def operation(query, key, value):
        key_mask = torch.arange(key.shape[2]) < torch.tensor([[3], [key.shape[2]]])
        if name == "context":
            context = summarize_context(key, value, key_mask=key_mask, impl=impl)
            return attend_context(query, merge_contexts(context, context), impl=impl)
        return OPERATIONS[name](query, key, value, key_mask=key_mask, impl=impl)

    def policy(context, function, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE

    inputs = tensors(keys=16 if "windows" in name else 13)
    inputs = tuple(x[:, :1].expand(2, 4, -1, -1).detach().requires_grad_() for x in inputs)
    plain = torch.autograd.grad(operation(*inputs).square().sum(), inputs)
    kept = checkpoint(
        operation,
        *inputs,
        use_reentrant=False,
        context_fn=partial(create_selective_checkpoint_contexts, policy),
    )
    torch.testing.assert_close(torch.autograd.grad(kept.square().sum(), inputs), plain, **EXACT)


def test_a_tangent_of_any_part_of_a_context_arrives():
    query, key, value = large(7)
    summary = summarize_context(key, value)
    with forward_ad.dual_level():
        dual = summary._replace(total=forward_ad.make_dual(summary.total, summary.total))
        tangent = forward_ad.unpack_dual(attend_context(query, dual)).tangent
        torch.testing.assert_close(tangent, -attend_context(query, summary), **EXACT)
        with pytest.raises(ValueError, match="under forward-mode differentiation, got 'streaming'"):
            attend_context(query, dual, impl="streaming")


# A cold process.


def test_the_first_call_loads_no_compiler():
    program = (
        "import resource, sys, time, torch, lineara\n"
        "from lineara import ops\n"
        "small = torch.randn(1, 1, 100, 16, requires_grad=True)\n"
        "large = torch.randn(1, 1, 150_000, 16, requires_grad=True)\n"
        "for x in (small, large):\n"
        "    for call in (ops.efficient_attention, ops.kernel_attention):\n"
        "        call(x, x, x).sum().backward()\n"
        "    ops.multiresolution_attention(x, x, x, resolutions=[2]).sum().backward()\n"
        "    ops.attend_context(x, ops.summarize_context(x, x)).sum().backward()\n"
        "print('torch._dynamo' in sys.modules, 'triton' in sys.modules)\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]
