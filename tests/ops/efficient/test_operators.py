"""The operators: one node for torch.compile and torch.export, whatever the length."""

import pytest
import torch

from lineara.ops import attend_context, efficient_attention, merge_contexts, summarize_context
from lineara.ops.efficient import operators
from lineara.ops.efficient.reference import accumulation_dtype


@pytest.fixture(autouse=True)
def _blocks(monkeypatch):
    monkeypatch.setattr("lineara.ops.blocks._ONE_BLOCK_ELEMENTS", 0)


def tensors(keys=13, dtype=torch.float64):
    return tuple(torch.randn(2, 3, n, d, dtype=dtype, requires_grad=True) for n, d in ((7, 5), (keys, 5), (keys, 11)))


# torch's own checker looks at .grad where there is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_operators_keep_the_contract_of_torch_library(masked, normalization, dtype):
    query, key, value = tensors(dtype=dtype)
    mask = torch.rand(2, 13) > 0.4 if masked else None
    torch.library.opcheck(
        operators.efficient_attention, (query, key, value, mask, None, None, normalization, 0.7, "", "streaming")
    )
    torch.library.opcheck(operators.summarize_context, (key, value, mask, None, normalization, 0.7, "streaming"))
    context = torch.randn(2, 3, 5, 11, dtype=accumulation_dtype(dtype), requires_grad=True)
    torch.library.opcheck(operators.attend_context, (query, context, None, normalization, 0.7, "streaming"))


def test_compiled_calls_equal_eager_ones_for_any_length_without_compiling_again(with_gradients):
    torch.compiler.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled = torch.compile(
        lambda *inputs: efficient_attention(*inputs, impl="streaming"), fullgraph=True, dynamic=True, backend=backend
    )
    for first, keys in ((True, 13), (False, 17), (False, 1031)):
        inputs = tensors(keys)
        grad_output = torch.randn(2, 3, 7, 11, dtype=torch.float64)
        given = with_gradients(compiled, inputs, grad_output)
        expected = with_gradients(lambda *inputs: efficient_attention(*inputs), inputs, grad_output)
        for one, other in zip(given, expected):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert bool(compilations) == first
        compilations.clear()


def test_context_functions_compile_to_one_graph():
    def call(query, key, value):
        parts = [summarize_context(key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 5), (5, 13))]
        return attend_context(query, merge_contexts(*parts))

    torch.compiler.reset()
    inputs = tensors()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), call(*inputs), rtol=1e-12, atol=1e-12)


def test_export_sees_one_operator():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return efficient_attention(query, key, value)

    inputs = tuple(tensor.detach() for tensor in tensors())
    program = torch.export.export(Attention(), inputs)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert torch.ops.lineara.efficient_attention.default in called
    torch.testing.assert_close(program.module()(*inputs), efficient_attention(*inputs))


def test_the_reference_works_under_torch_func():
    query, key, value = (tensor.detach() for tensor in tensors())

    def one_item(query, key, value):
        return efficient_attention(query[None], key[None], value[None], impl="reference")[0]

    mapped = torch.func.vmap(one_item)(query, key, value)
    torch.testing.assert_close(mapped, efficient_attention(query, key, value), rtol=1e-12, atol=1e-12)
