"""What the layers for sequences share, seen through a layer whose operation is a stand-in."""

import pytest
import torch
from torch import nn

from lineara.nn.sequence_attention import SequenceAttention

SIZES = {"key_dim": 15, "value_dim": 33, "context_dim": 13}  # 3 heads of 5 key and 11 value channels
DIM, HEADS = 7, 3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Recorder(SequenceAttention):
    """Keeps what it is given, and answers with something of the right shape that no other tensor equals."""

    def attend(self, query, key, value, *, key_mask, query_mask, cu_seqlens_query, cu_seqlens_key):
        self.given = query, key, value, key_mask
        self.query_mask, self.packing = query_mask, (cu_seqlens_query, cu_seqlens_key)
        self.answer = query.sum(dim=3, keepdim=True) * value.mean(dim=2, keepdim=True)
        return self.answer


def project(linear, tensor):
    bias = 0.0 if linear.bias is None else linear.bias
    return torch.einsum("bnc,dc->bnd", tensor, linear.weight) + bias


def inputs(**options):
    return torch.randn(2, 17, DIM, **options), torch.randn(2, 19, SIZES["context_dim"], **options)


# What it computes.


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_operation_is_given_contiguous_heads_of_the_projections(qkv_bias):
    layer = Recorder(DIM, HEADS, qkv_bias=qkv_bias, dtype=torch.float64, **SIZES)
    x, context = inputs(dtype=torch.float64)
    layer(x, context)
    query, key, value, key_mask = layer.given
    assert [tuple(tensor.shape) for tensor in (query, key, value)] == [(2, 3, 17, 5), (2, 3, 19, 5), (2, 3, 19, 11)]
    for given, linear, source, width in (
        (query, layer.query, x, 5),
        (key, layer.key, context, 5),
        (value, layer.value, context, 11),
    ):
        for head in range(HEADS):
            expected = project(linear, source)[:, :, head * width : (head + 1) * width]
            torch.testing.assert_close(given[:, head], expected)
    assert key_mask is None


def test_heads_are_joined_in_order_and_projected_back():
    layer = Recorder(DIM, HEADS, dtype=torch.float64, **SIZES)
    output = layer(*inputs(dtype=torch.float64))
    joined = torch.cat([layer.answer[:, head] for head in range(HEADS)], dim=2)
    torch.testing.assert_close(output, project(layer.output, joined))


def test_without_context_it_attends_to_its_input():
    layer = Recorder(DIM, HEADS, key_dim=15, value_dim=33)
    x, _ = inputs()
    output = layer(x)
    torch.testing.assert_close(output, layer(x, x), rtol=0, atol=0)
    assert layer.given[1].shape[2] == 17


def test_the_mask_reaches_the_operation_as_it_is():
    layer = Recorder(DIM, HEADS, **SIZES)
    mask = torch.rand(2, 19) < 0.5
    layer(*inputs(), key_mask=mask)
    assert layer.given[3] is mask
    assert layer.query_mask is None
    layer = Recorder(DIM, HEADS, key_dim=15, value_dim=33)
    layer(inputs()[0], key_mask=mask[:, :17])
    assert layer.query_mask is layer.given[3]


def test_self_attention_is_packed_as_its_input_and_a_context_by_itself():
    ends, others = torch.tensor([0, 5, 17]), torch.tensor([0, 11, 19])
    x, context = (tensor[:1] for tensor in inputs())
    layer = Recorder(DIM, HEADS, key_dim=15, value_dim=33)
    layer(x, cu_seqlens=ends)
    assert layer.packing[0] is layer.packing[1] is ends
    layer = Recorder(DIM, HEADS, **SIZES)
    layer(x, context, cu_seqlens=ends, context_cu_seqlens=others)
    assert layer.packing[0] is ends
    assert layer.packing[1] is others


# Its weights.


def test_widths_default_to_dim():
    shapes = {name: tuple(tensor.shape) for name, tensor in Recorder(6, 2).state_dict().items()}
    assert shapes == {
        **{f"{name}.weight": (6, 6) for name in ("query", "key", "value", "output")},
        **{f"{name}.bias": (6,) for name in ("query", "key", "value", "output")},
    }


def test_without_qkv_bias_the_output_alone_has_one():
    state = Recorder(DIM, HEADS, qkv_bias=False, **SIZES).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "query.weight": (15, 7),
        "key.weight": (15, 13),
        "value.weight": (33, 13),
        "output.weight": (7, 33),
        "output.bias": (7,),
    }


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.bfloat16)]
)
def test_weights_are_made_where_and_as_asked(device, dtype):
    layer = Recorder(DIM, HEADS, device=device, dtype=dtype, **SIZES)
    assert {(parameter.device.type, parameter.dtype) for parameter in layer.parameters()} == {(device, dtype)}
    output = layer(*inputs(device=device, dtype=dtype))
    assert (output.device.type, output.dtype, tuple(output.shape)) == (device, dtype, (2, 17, 7))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "Recorder( dim=7, num_heads=3, key_dim=15, value_dim=33, context_dim=13 "),
        ({"key_dim": 7, "value_dim": None, "context_dim": 7, "num_heads": 7}, "Recorder( dim=7, num_heads=7 "),
    ],
)
def test_it_names_what_differs_from_dim(options, text):
    layer = Recorder(DIM, **{"num_heads": HEADS, **SIZES, **options})
    assert " ".join(repr(layer).split()).startswith(text)


# Wrong calls.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"num_heads": -3}, "num_heads must be at least 1, got -3"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"key_dim": 0}, "key_dim must be at least 1, got 0"),
        ({"value_dim": -1}, "value_dim must be at least 1, got -1"),
        ({"context_dim": 0}, "context_dim must be at least 1, got 0"),
    ],
)
def test_impossible_widths_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Recorder(**{"dim": DIM, "num_heads": HEADS, **SIZES, **options})


@pytest.mark.parametrize("options", [{"num_heads": 3.0}, {"dim": 7.0}, {"key_dim": "15"}, {"num_heads": True}], ids=str)
def test_widths_that_are_no_integers_are_refused(options):
    [(name, given)] = options.items()
    with pytest.raises(TypeError, match=f"^{name} must be an integer, got {given!r}$"):
        Recorder(**{"dim": DIM, "num_heads": HEADS, **SIZES, **options})


@pytest.mark.parametrize("shape", [(17, 7), (2, 17, 5), (2, 3, 17, 7)])
def test_inputs_of_another_shape_are_refused(shape):
    layer = Recorder(DIM, HEADS, key_dim=15, value_dim=33)
    got = rf"got \({', '.join(map(str, shape))}\)$"
    with pytest.raises(ValueError, match=rf"^x must have the shape \(batch, positions, 7\), {got}"):
        layer(torch.ones(shape))
    with pytest.raises(ValueError, match=rf"^context must have the shape \(batch, positions, 7\), {got}"):
        layer(torch.ones(2, 17, 7), torch.ones(shape))


def test_a_context_of_its_own_width_must_be_given():
    layer = Recorder(DIM, HEADS, **SIZES)
    sentence = "^context must be given when context_dim differs from dim, got context_dim=13, dim=7 and no context$"
    with pytest.raises(ValueError, match=sentence):
        layer(torch.ones(2, 17, 7))


def test_a_layer_must_say_how_to_attend():
    assert issubclass(SequenceAttention, nn.Module)
    with pytest.raises(NotImplementedError):
        SequenceAttention(6, 2)(torch.ones(2, 17, 6))
