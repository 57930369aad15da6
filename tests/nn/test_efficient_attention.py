"""Efficient attention as a layer for sequences: what it has beyond what `test_sequence_layers.py` says of every one."""

import shutil

import pytest
import torch

from lineara.nn import EfficientAttention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile, with nothing compiled before or left behind."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def result_and_gradients(function, layer, x):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    output = function(x)
    (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
    return [output.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


def test_one_number_by_hand():
    # Both projections of (0, ln 3) and (ln 3, 0) are the identity: queries weigh their channels by (1/4, 3/4) and
    # (3/4, 1/4), keys their positions likewise. With values (0, 1) and (1, 0) the context is ((3/4, 1/4), (1/4, 3/4)).
    layer = EfficientAttention(2)
    ln3 = torch.tensor(3.0).log()
    with torch.no_grad():
        for linear, factor in ((layer.query, 1), (layer.key, 1), (layer.value, 1 / ln3), (layer.output, 16)):
            linear.weight.copy_(factor * torch.eye(2))
            linear.bias.zero_()
    output = layer(torch.stack([torch.zeros(()), ln3, ln3, torch.zeros(())]).view(1, 2, 2))
    torch.testing.assert_close(output, torch.tensor([[[6.0, 10.0], [10.0, 6.0]]]))


def test_the_order_of_the_context_does_not_matter():
    layer = EfficientAttention(7, 7, context_dim=13, dtype=torch.float64)
    x, context = torch.randn(2, 17, 7, dtype=torch.float64), torch.randn(2, 19, 13, dtype=torch.float64)
    order, mask = torch.randperm(19), torch.rand(2, 19) < 0.6
    expected = layer(x, context, key_mask=mask)
    torch.testing.assert_close(layer(x, context[:, order], key_mask=mask[:, order]), expected)


def test_a_sequence_of_many_blocks_compiles_into_one_graph(compiled):
    layer = EfficientAttention(61, key_dim=67, value_dim=71, impl="streaming")
    function = compiled(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 35_023, 61)
    expected = result_and_gradients(layer, layer, x)
    for one, other in zip(result_and_gradients(function, layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++, which is not installed")
def test_inductor_computes_the_same(compiled):
    layer = EfficientAttention(7, 7, key_dim=21, value_dim=35)
    x = torch.randn(2, 17, 7)
    function = compiled(layer, fullgraph=True)
    expected = result_and_gradients(layer, layer, x)
    for one, other in zip(result_and_gradients(function, layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_it_shows_its_settings():
    layer = EfficientAttention(7, 3, key_dim=15, value_dim=33, normalization="scaling", scale=0.5, impl="streaming")
    text = " ".join(repr(layer).split())
    assert text.startswith(
        "EfficientAttention( dim=7, num_heads=3, key_dim=15, value_dim=33, "
        "normalization='scaling', scale=0.5, impl='streaming' "
    )


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"^normalization must be one of 'softmax', 'scaling', got 'cosine'"):
        EfficientAttention(7, normalization="cosine")
