"""Efficient attention for feature maps and volumes, and the authors' module that it stands in for."""

import pytest
import torch

from lineara.nn import EfficientAttention1d, EfficientAttention2d, EfficientAttention3d

LAYERS = {1: EfficientAttention1d, 2: EfficientAttention2d, 3: EfficientAttention3d}
POSITIONS = {1: (17,), 2: (5, 11), 3: (2, 3, 5)}
OTHER_POSITIONS = {1: (13,), 2: (3, 7), 3: (5, 2, 7)}
DIM, HEADS = 7, 3
SIZES = {"key_dim": 15, "value_dim": 33}  # 3 heads of 5 key and 11 value channels
EVERY_KIND = pytest.mark.parametrize("axes", [1, 2, 3])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile, with nothing compiled before or left behind."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def make(axes, **options):
    return LAYERS[axes](DIM, HEADS, **{"dtype": torch.float64, **SIZES, **options})


def maps(axes, positions=POSITIONS, dtype=torch.float64):
    return torch.randn(2, DIM, *positions[axes], dtype=dtype)


def written_out(layer, x, context, *, normalization="softmax", scale=1.0):
    """The formula from the layer's weights, over maps whose positions are flattened, head by head; plus the input."""

    def project(convolution, flat, channels=slice(None)):
        weight = convolution.weight[channels].flatten(1)  # a convolution over single positions is a matrix
        return torch.einsum("bcn,dc->bdn", flat, weight) + convolution.bias[channels, None]

    flat, source = x.flatten(2), context.flatten(2)
    heads = []
    for head in range(HEADS):
        query = scale * project(layer.queries, flat, slice(5 * head, 5 * head + 5))
        key = scale * project(layer.keys, source, slice(5 * head, 5 * head + 5))
        value = project(layer.values, source, slice(11 * head, 11 * head + 11))
        if normalization == "softmax":
            query = query.exp() / query.exp().sum(dim=1, keepdim=True)
            key = key.exp() / key.exp().sum(dim=2, keepdim=True)
        else:
            key = key / source.shape[2]
        heads.append(torch.einsum("bkn,bkm,bvm->bvn", query, key, value))
    return x + project(layer.reprojection, torch.cat(heads, dim=1)).view(x.shape)


def authors_module(state, x, head_count):
    """The published module (cmsflash/efficient-attention), as a function of its state dict."""

    def convolve(name, tensor):
        return torch.nn.functional.conv2d(tensor, state[f"{name}.weight"], state[f"{name}.bias"])

    batch, _, height, width = x.shape
    queries, keys, values = (
        convolve(name, x).reshape(batch, -1, height * width) for name in ("queries", "keys", "values")
    )
    key_channels, value_channels = keys.shape[1] // head_count, values.shape[1] // head_count
    attended = []
    for i in range(head_count):
        key = torch.softmax(keys[:, i * key_channels : (i + 1) * key_channels], dim=2)
        query = torch.softmax(queries[:, i * key_channels : (i + 1) * key_channels], dim=1)
        value = values[:, i * value_channels : (i + 1) * value_channels]
        context = key @ value.transpose(1, 2)
        attended.append((context.transpose(1, 2) @ query).reshape(batch, value_channels, height, width))
    return convolve("reprojection", torch.cat(attended, dim=1)) + x


def authors_state(in_channels, key_channels, value_channels):
    """A state dict as the authors' module saves it."""
    shapes = {
        "keys": (key_channels, in_channels),
        "queries": (key_channels, in_channels),
        "values": (value_channels, in_channels),
        "reprojection": (in_channels, value_channels),
    }
    state = {}
    for name, (rows, columns) in shapes.items():
        state[f"{name}.weight"] = torch.randn(rows, columns, 1, 1, dtype=torch.float64)
        state[f"{name}.bias"] = torch.randn(rows, dtype=torch.float64)
    return state


def result_and_gradients(function, layer, *tensors):
    layer.zero_grad()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(parameter.grad for parameter in layer.parameters())]


# What it computes.


@EVERY_KIND
def test_one_number_by_hand(axes):
    # As in test_efficient_attention.py: (0, ln 3) and (ln 3, 0) attend to (6, 10) / 16 and (10, 6) / 16 of each other.
    layer = LAYERS[axes](2, key_dim=2)
    ln3 = torch.tensor(3.0).log()
    with torch.no_grad():
        for convolution, factor in (
            (layer.queries, 1),
            (layer.keys, 1),
            (layer.values, 1 / ln3),
            (layer.reprojection, 16),
        ):
            convolution.weight.copy_(factor * torch.eye(2).view(convolution.weight.shape))
            convolution.bias.zero_()
    x = torch.stack([torch.zeros(()), ln3, ln3, torch.zeros(())]).view(1, 2, *(1,) * (axes - 1), 2)
    torch.testing.assert_close(layer(x) - x, torch.tensor([6.0, 10.0, 10.0, 6.0]).view(x.shape))


@EVERY_KIND
@pytest.mark.parametrize("impl", ["auto", "reference", "streaming"])
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_it_equals_the_formula_written_out_with_its_weights(axes, impl, normalization):
    layer = make(axes, impl=impl, normalization=normalization, scale=0.7)
    x, context = maps(axes), maps(axes, OTHER_POSITIONS)
    options = {"normalization": normalization, "scale": 0.7}
    torch.testing.assert_close(layer(x), written_out(layer, x, x, **options))
    torch.testing.assert_close(layer(x, context), written_out(layer, x, context, **options))


@pytest.mark.parametrize(("head_count", "key_channels", "value_channels"), [(1, 3, 7), (3, 15, 33), (5, 5, 10)])
def test_weights_of_the_authors_module_load_as_they_are_and_give_its_output(head_count, key_channels, value_channels):
    state = authors_state(DIM, key_channels, value_channels)
    layer = EfficientAttention2d(DIM, head_count, key_dim=key_channels, value_dim=value_channels, dtype=torch.float64)
    layer.load_state_dict(state, strict=True)
    x = maps(2)
    torch.testing.assert_close(layer(x), authors_module(state, x, head_count))


def test_the_default_widths_are_the_papers_usual_ones():
    layer = EfficientAttention2d(34)
    layer.load_state_dict(authors_state(34, 17, 34), strict=True)
    assert (layer.num_heads, layer.key_dim, layer.value_dim) == (1, 17, 34)
    assert EfficientAttention2d(1).key_dim == 1


# What does not matter.


@EVERY_KIND
def test_permuted_positions_permute_the_output(axes):
    layer, x = make(axes), maps(axes)
    order = torch.randperm(x[0, 0].numel())

    def permute(tensor):
        return tensor.flatten(2)[:, :, order].view(x.shape)

    torch.testing.assert_close(layer(permute(x)), permute(layer(x)))


@EVERY_KIND
def test_a_transposed_map_gives_the_transposed_output(axes):
    layer, x = make(axes), maps(axes)
    transposed = x.transpose(2, -1)  # not contiguous
    torch.testing.assert_close(layer(transposed), layer(x).transpose(2, -1))


def test_channels_last_gives_the_same():
    layer, x = make(2), maps(2)
    expected = layer(x)
    torch.testing.assert_close(
        layer.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last)), expected
    )


# Gradients.


@EVERY_KIND
def test_gradients_are_those_of_the_formula(axes):
    layer = make(axes)
    tensors = maps(axes), maps(axes, OTHER_POSITIONS)

    def formula(x, context):
        return written_out(layer, x, context)

    given = result_and_gradients(layer, layer, *tensors)
    for actual, expected in zip(given, result_and_gradients(formula, layer, *tensors), strict=True):
        torch.testing.assert_close(actual, expected)
    largest = {name: parameter.grad.abs().max().item() for name, parameter in layer.named_parameters()}
    # A number added to a key channel at every position changes no softmax over positions.
    assert largest.pop("keys.bias") < 1e-12
    assert len(largest) == 7
    assert min(largest.values()) > 1e-3, largest


# Other number formats and places.


@EVERY_KIND
@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
def test_weights_are_made_where_and_as_asked(axes, device, dtype):
    layer = make(axes, device=device, dtype=dtype)
    assert {(parameter.device.type, parameter.dtype) for parameter in layer.parameters()} == {(device, dtype)}
    output = layer(maps(axes, dtype=dtype).to(device))
    assert (output.device.type, output.dtype, tuple(output.shape)) == (device, dtype, (2, DIM, *POSITIONS[axes]))


def test_bfloat16_weights_lose_no_more_than_their_rounding():
    layer, x = make(2, dtype=torch.bfloat16), maps(2, dtype=torch.bfloat16)
    output = layer(x)
    exact = written_out(layer.double(), x.double(), x.double())
    assert (output.double() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_autocast_computes_in_bfloat16_and_keeps_the_residual():
    layer, x = make(2, dtype=torch.float32), maps(2, dtype=torch.float32)
    exact = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.float32
    assert not torch.equal(output, exact)
    assert (output - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}


# torch.compile.


@pytest.mark.parametrize(("axes", "sizes"), [(1, [(17,)]), (2, [(5, 11), (7, 13)]), (3, [(2, 3, 5)])])
def test_it_compiles_into_one_graph_and_computes_the_same(axes, sizes, compiled):
    layer = make(axes)
    function = compiled(layer, fullgraph=True, dynamic=len(sizes) > 1, backend="aot_eager")
    for positions in sizes:
        x = torch.randn(2, DIM, *positions, dtype=torch.float64)
        expected = result_and_gradients(layer, layer, x)
        for one, other in zip(result_and_gradients(function, layer, x), expected, strict=True):
            torch.testing.assert_close(one, other)


# What it says.


@EVERY_KIND
def test_it_shows_its_settings(axes):
    text = " ".join(repr(make(axes, normalization="scaling", scale=0.5, impl="reference")).split())
    assert text.startswith(
        f"EfficientAttention{axes}d( dim=7, num_heads=3, key_dim=15, value_dim=33, "
        "normalization='scaling', scale=0.5, impl='reference' "
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
    ],
)
def test_impossible_widths_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        EfficientAttention2d(**{"dim": DIM, "num_heads": HEADS, **SIZES, **options})


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match=r"^normalization must be one of 'softmax', 'scaling', got 'cosine'$"):
        make(2, normalization="cosine")
