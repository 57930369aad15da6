"""The operator: one node for torch.compile and torch.export, whatever the length."""

import pytest
import torch

from lineara.ops import multiresolution_attention
from lineara.ops.multiresolution import operators

RESOLUTIONS = [4, 2, 1]


@pytest.fixture(autouse=True)
def _blocks(only_blocks):
    """However small the inputs."""


def tensors(keys=13, dtype=torch.float64):
    return tuple(torch.randn(2, 3, n, d, dtype=dtype, requires_grad=True) for n, d in ((7, 5), (keys, 5), (keys, 11)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_operator_keeps_the_contract_of_torch_library(given, feature_map, dtype):
    inputs = tensors(dtype=dtype)
    gate = torch.rand(2, 3, 7, dtype=dtype).requires_grad_() if given else None
    key_weight = torch.randn(3, 5, 4, dtype=dtype).requires_grad_() if given else None
    value_weight = torch.randn(3, 11, 4, dtype=dtype).requires_grad_() if given else None
    mask = torch.rand(2, 13) > 0.4 if given else None
    options = (RESOLUTIONS, [13], "conv" if given else "mean", feature_map, 0.7, "", "streaming")
    torch.library.opcheck(
        operators.multiresolution_attention, (*inputs, gate, key_weight, value_weight, mask, *options)
    )


def test_compiled_calls_equal_eager_ones_for_any_length_without_compiling_again(with_gradients):
    torch.compiler.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def call(*inputs):
        return multiresolution_attention(*inputs, resolutions=RESOLUTIONS)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for first, keys in ((True, 13), (False, 17), (False, 1031)):
        inputs = tensors(keys)
        grad_output = torch.randn(2, 3, 7, 11, dtype=torch.float64)
        given = with_gradients(compiled, inputs, grad_output)
        expected = with_gradients(call, inputs, grad_output)
        for one, other in zip(given, expected):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert bool(compilations) == first
        compilations.clear()


def test_export_sees_one_operator():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return multiresolution_attention(query, key, value, resolutions=RESOLUTIONS)

    inputs = tuple(tensor.detach() for tensor in tensors())
    program = torch.export.export(Attention(), inputs)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.lineara.multiresolution_attention.default) == 1
    torch.testing.assert_close(program.module()(*inputs), Attention()(*inputs))
