"""Efficient attention as a layer for sequences."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lineara.nn import EfficientAttention

SIZES = {"key_dim": 15, "value_dim": 33, "context_dim": 13}  # 3 heads of 5 key and 11 value channels
DIM, HEADS = 7, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile, with nothing compiled before or left behind."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def cross_layer(**options):
    return EfficientAttention(DIM, HEADS, **{"dtype": torch.float64, **SIZES, **options})


def self_layer(**options):
    return EfficientAttention(DIM, HEADS, **{"dtype": torch.float64, "key_dim": 15, "value_dim": 33, **options})


def inputs(dtype=torch.float64):
    return torch.randn(2, 17, DIM, dtype=dtype), torch.randn(2, 19, SIZES["context_dim"], dtype=dtype)


def some_mask(positions):
    mask = torch.rand(2, positions) < 0.6
    mask[:, 0] = True
    return mask


def written_out(layer, x, context, mask=None, *, normalization="softmax", scale=1.0):
    """The paper's formula from the layer's weights, item by item and head by head, over the valid positions alone."""

    def project(linear, tensor, channels=slice(None)):
        bias = 0.0 if linear.bias is None else linear.bias[channels]
        return torch.einsum("nc,dc->nd", tensor, linear.weight[channels]) + bias

    items = []
    for index in range(len(x)):
        source = context[index] if mask is None else context[index][mask[index]]
        heads = []
        for head in range(HEADS):
            query = scale * project(layer.query, x[index], slice(5 * head, 5 * head + 5))
            key = scale * project(layer.key, source, slice(5 * head, 5 * head + 5))
            value = project(layer.value, source, slice(11 * head, 11 * head + 11))
            if normalization == "softmax":
                query = query.exp() / query.exp().sum(dim=1, keepdim=True)
                key = key.exp() / key.exp().sum(dim=0, keepdim=True)
            else:
                key = key / len(source)
            heads.append(torch.einsum("nk,mk,mv->nv", query, key, value))
        items.append(project(layer.output, torch.cat(heads, dim=1)))
    return torch.stack(items)


def result_and_gradients(function, layer, *tensors, **options):
    layer.zero_grad()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, **options)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(parameter.grad for parameter in layer.parameters())]


# What it computes.


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


@pytest.mark.parametrize("impl", ["auto", "reference", "streaming"])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_the_formula_written_out_with_its_weights(impl, normalization, masked):
    layer = cross_layer(impl=impl, normalization=normalization, scale=0.7)
    x, context = inputs()
    mask = some_mask(19) if masked else None
    expected = written_out(layer, x, context, mask, normalization=normalization, scale=0.7)
    torch.testing.assert_close(layer(x, context, key_mask=mask), expected)


def test_self_attention_equals_the_formula_without_any_option():
    layer = self_layer(qkv_bias=False)
    x, _ = inputs()
    torch.testing.assert_close(layer(x), written_out(layer, x, x))


# What a mask does.


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 1e300])
def test_what_masked_positions_of_the_context_hold_never_leaks(hidden):
    layer = cross_layer()
    x, context = inputs()
    mask = some_mask(19)
    poisoned = context.masked_fill(~mask[:, :, None], hidden)
    torch.testing.assert_close(layer(x, poisoned, key_mask=mask), written_out(layer, x, context, mask))


def test_nan_at_a_masked_position_of_the_input_stays_at_that_position():
    layer = self_layer()
    x, _ = inputs()
    mask = some_mask(17)
    output = layer(x.masked_fill(~mask[:, :, None], torch.nan), key_mask=mask)
    assert output[~mask].isnan().all()
    torch.testing.assert_close(output[mask], written_out(layer, x, x, mask)[mask])


def test_an_item_without_valid_positions_gives_the_bias_of_the_output():
    layer = cross_layer()
    mask = some_mask(19)
    mask[1] = False
    results = result_and_gradients(layer, layer, *inputs(), key_mask=mask)
    torch.testing.assert_close(results[0][1], layer.output.bias.expand(17, 7))
    assert all(result.isfinite().all() for result in results)


# What does not matter.


def test_permuted_positions_permute_the_output():
    layer = self_layer()
    x, _ = inputs()
    order = torch.randperm(17)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_the_order_of_the_context_does_not_matter():
    layer = cross_layer()
    x, context = inputs()
    order, mask = torch.randperm(19), some_mask(19)
    expected = layer(x, context, key_mask=mask)
    torch.testing.assert_close(layer(x, context[:, order], key_mask=mask[:, order]), expected)


def test_items_of_a_batch_do_not_see_each_other():
    layer = cross_layer()
    x, context = inputs()
    mask = some_mask(19)
    together = layer(x, context, key_mask=mask)
    for index in range(2):
        alone = layer(x[index, None], context[index, None], key_mask=mask[index, None])
        torch.testing.assert_close(together[index, None], alone)


# Gradients.


def test_gradients_reach_every_weight_but_the_bias_that_cancels():
    layer = cross_layer()
    result_and_gradients(layer, layer, *inputs())
    largest = {name: parameter.grad.abs().max().item() for name, parameter in layer.named_parameters()}
    # A number added to a key channel at every position changes no softmax over positions.
    assert largest.pop("key.bias") < 1e-12
    assert len(largest) == 7
    assert min(largest.values()) > 1e-3, largest


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_gradients_are_those_of_the_formula(normalization):
    layer = cross_layer(normalization=normalization)
    mask = some_mask(19)
    x, context = inputs()
    given = result_and_gradients(layer, layer, x, context, key_mask=mask)

    def formula(x, context):
        return written_out(layer, x, context, mask, normalization=normalization)

    for actual, expected in zip(given, result_and_gradients(formula, layer, x, context), strict=True):
        torch.testing.assert_close(actual, expected)


# Other number formats.


def test_bfloat16_weights_lose_no_more_than_their_rounding():
    layer = cross_layer(dtype=torch.bfloat16)
    tensors = inputs(torch.bfloat16)
    output = layer(*tensors)
    assert output.dtype == torch.bfloat16
    exact = written_out(layer.double(), *(tensor.double() for tensor in tensors))
    assert (output.double() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_autocast_computes_in_bfloat16():
    layer = cross_layer(dtype=torch.float32)
    x, context = inputs(torch.float32)
    mask = some_mask(19)
    exact = layer(x, context, key_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x, context, key_mask=mask)
    assert output.dtype == torch.bfloat16
    assert (output.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    output.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    assert layer.query.weight.grad.abs().max() > 0


# torch.compile.


def test_one_graph_serves_every_length_and_computes_the_same(compiled):
    layer = cross_layer()
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for queries, keys in ((17, 19), (29, 11)):
        x = torch.randn(2, queries, DIM, dtype=torch.float64)
        context, mask = torch.randn(2, keys, 13, dtype=torch.float64), some_mask(keys)
        expected = result_and_gradients(layer, layer, x, context, key_mask=mask)
        actual = result_and_gradients(function, layer, x, context, key_mask=mask)
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]


def test_a_sequence_of_many_blocks_compiles_into_one_graph(compiled):
    layer = EfficientAttention(61, key_dim=67, value_dim=71, impl="streaming")
    function = compiled(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 35_023, 61)  # more than 2 Mi numbers: beyond what streaming takes as one block
    expected = result_and_gradients(layer, layer, x)
    for one, other in zip(result_and_gradients(function, layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++, which is not installed")
def test_inductor_computes_the_same(compiled):
    layer = self_layer(dtype=torch.float32)
    x, _ = inputs(torch.float32)
    function = compiled(layer, fullgraph=True)
    expected = result_and_gradients(layer, layer, x)
    for one, other in zip(result_and_gradients(function, layer, x), expected, strict=True):
        torch.testing.assert_close(one, other)


# What it says.


def test_it_shows_its_settings():
    text = " ".join(repr(cross_layer(normalization="scaling", scale=0.5, impl="streaming")).split())
    assert text.startswith(
        "EfficientAttention( dim=7, num_heads=3, key_dim=15, value_dim=33, context_dim=13, "
        "normalization='scaling', scale=0.5, impl='streaming' "
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"normalization": "cosine"}, r"normalization must be one of 'softmax', 'scaling', got 'cosine'"),
        ({"impl": "fast"}, "impl must be one of .*'streaming'.*, got 'fast'"),
    ],
)
def test_unknown_choices_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        cross_layer(**options)(*inputs())


def test_a_wrong_mask_is_refused():
    layer = cross_layer()
    with pytest.raises(ValueError, match=r"^key_mask must have the shape .* = \(2, 19\), got \(2, 17\)"):
        layer(*inputs(), key_mask=torch.ones(2, 17, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^key_mask must be boolean .* got torch\.float32"):
        layer(*inputs(), key_mask=torch.ones(2, 19))
