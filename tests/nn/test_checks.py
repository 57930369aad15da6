"""Checks of arguments that layers and networks share."""

import numpy as np
import pytest
import torch
from torch import nn

from lineara.nn import (
    EfficientAttention,
    EfficientAttention2d,
    EncoderBlock,
    MultiresolutionAttention,
    MultiresolutionAttention2d,
    SoftmaxAttention,
)
from lineara.nn.checks import check_input, made_by, probability, with_own_name
from lineara.ops.checks import check_integer, check_number, check_scale


@pytest.mark.parametrize("given", [5, np.int8(5), np.array(5), torch.tensor(5)], ids=repr)
def test_integers_are_those_of_any_library(given):
    assert check_integer("width", given) == 5
    assert type(check_integer("width", given)) is int


@pytest.mark.parametrize("given", [5.0, "5", True, None, np.float32(5), np.True_], ids=repr)
def test_what_is_no_integer_is_refused(given):
    with pytest.raises(TypeError, match=r"^width must be an integer, got "):
        check_integer("width", given)


def test_numbers_are_those_of_any_library_and_finite():
    assert [check_number("scale", given) for given in (2, 0.5, np.float16(0.5), np.array(2.0))] == [2.0, 0.5, 0.5, 2.0]
    with pytest.raises(TypeError, match=r"^scale must be a number, got Tensor; to learn it, multiply query and key by"):
        check_scale(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"^scale must be finite, got -inf$"):
        check_number("scale", -np.inf)
    with pytest.raises(ValueError, match=r"^dropout must be a probability, from 0 to 1, got 1\.5$"):
        probability("dropout", 1.5)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: MultiresolutionAttention2d(4),
            r"key_dim, by default dim // 2, must be divisible by num_heads, got dim=4 and num_heads=4; give a "
            "key_dim such as 4, or another num_heads",
        ),
        (
            lambda: EfficientAttention2d(8, 3),
            r"key_dim, by default dim // 2, must be divisible by num_heads, got dim=8 and num_heads=3; give a "
            "key_dim such as 3, or another num_heads",
        ),
        (
            lambda: SoftmaxAttention(7, 3, key_dim=6),
            "value_dim, by default dim, must be divisible by num_heads, got dim=7 and num_heads=3; give a "
            "value_dim such as 6, or another num_heads",
        ),
        (
            lambda: MultiresolutionAttention(6),
            "key_dim and value_dim, by default dim, must be divisible by num_heads, got dim=6 and num_heads=4; give a "
            "key_dim and value_dim such as 4, or another num_heads",
        ),
        (
            lambda: MultiresolutionAttention(64, 64, compression="conv"),
            "resolutions must leave room for the weights of windows under compression='conv', got windows of "
            f"{2**63} positions; give smaller resolutions, or another compression",
        ),
        (
            lambda: EncoderBlock(8, EfficientAttention(16)),
            "attention must be a layer of dim=8 channels, got one of 16; give both one dim",
        ),
        (
            lambda: EfficientAttention(6, 3, key_dim=16),
            "key_dim must be divisible by num_heads, got 16 and 3; give 15, or another num_heads",
        ),
        (
            lambda: EfficientAttention(6, 6, num_key_heads=4),
            "num_heads must be divisible by num_key_heads, got 6 and 4",
        ),
        (lambda: EfficientAttention2d(12, 2, num_key_heads=0), "num_key_heads must be at least 1, got 0"),
    ],
)
def test_widths_that_do_not_fit_blame_what_was_given(make, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make()


def test_a_shape_is_named_by_its_axes():
    check_input("x", torch.ones(2, 3, 5), ("batch", 3, "length"), instead_of_nesting="")
    with pytest.raises(ValueError, match=r"^x must have the shape \(batch, 3, length\), got \(2, 5, 3\)$"):
        check_input("x", torch.ones(2, 5, 3), ("batch", 3, "length"), instead_of_nesting="")


def test_what_makes_layers_must_make_layers():
    assert isinstance(made_by(nn.Identity, 3), nn.Identity)
    with pytest.raises(TypeError, match=r"^attention must make a torch\.nn\.Module, got int from attention\(3\)$"):
        made_by(lambda dim: dim, 3)


def test_a_class_answers_under_its_own_name():
    class _Base:
        def __init__(self, *, a=1):
            self.a = a

    @with_own_name("__init__")
    class Public(_Base):
        pass

    assert Public(a=3).a == 3
    with pytest.raises(TypeError, match=r"Public\.__init__\(\) got an unexpected keyword argument 'b'"):
        Public(b=1)
    with pytest.raises(TypeError, match=r"_Base\.__init__\(\) got"):
        _Base(b=1)


@pytest.mark.parametrize("kind", [EfficientAttention, SoftmaxAttention, EfficientAttention2d])
def test_what_others_derive_from_a_layer_inherits_as_python_does(kind):
    class Overriding(kind):
        def forward(self, *inputs, **options):
            return super().forward(*inputs, **options) + 100.0

    class Plain(kind):
        pass

    class Both(Plain, Overriding):
        pass

    assert "forward" not in Plain.__dict__
    layer = Both(4)
    shape = (1, 4, 3, 5) if kind is EfficientAttention2d else (1, 3, 4)
    assert layer(torch.zeros(shape)).min() > 50.0
    with pytest.raises(TypeError, match=rf"{kind.__name__}\.__init__\(\) got an unexpected keyword argument 'b'"):
        kind(4, b=1)


@pytest.mark.parametrize("kind", [EfficientAttention, MultiresolutionAttention, EfficientAttention2d])
def test_weights_are_of_floating_point_and_flags_are_booleans(kind):
    for dtype in (torch.int32, torch.complex64, "float32"):
        with pytest.raises(TypeError, match=r"^dtype must be None, torch\.float64, float32, .*, got "):
            kind(8, dtype=dtype)
    flag = "zero_init" if kind is EfficientAttention2d else "qkv_bias"
    with pytest.raises(TypeError, match=f"^{flag} must be True or False, got 'False'$"):
        kind(8, **{flag: "False"})
    kind(8, **{flag: np.False_})


@pytest.mark.parametrize("kind", [EfficientAttention, MultiresolutionAttention, EfficientAttention2d])
def test_inputs_that_do_not_fit_the_weights_or_each_other_are_refused(kind):
    layer, x = kind(8), torch.randn(2, 8, 8, 8) if kind is EfficientAttention2d else torch.randn(2, 5, 8)
    for wrong in (x.double(), x.half()):
        sentence = rf"must have the dtype of the layer's weights, torch\.float32, got {wrong.dtype}; convert it with "
        with pytest.raises(TypeError, match=f"^x {sentence}"):
            layer(wrong)
        with pytest.raises(TypeError, match=f"^context {sentence}"):
            layer(x, wrong)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x.half())
    with pytest.raises(
        TypeError, match=r"^x must be a dense tensor, got torch\.sparse_coo; convert it with x\.to_dense"
    ):
        layer(x.to_sparse())
    with pytest.raises(ValueError, match=r"^x and context must have the same batch size, got 2 and 1; give every item"):
        layer(x, x[:1])


def test_a_block_names_an_input_of_another_dtype_too():
    with pytest.raises(TypeError, match=r"^x must have the dtype of the layer's weights, torch\.float32, got "):
        EncoderBlock(8, EfficientAttention(8))(torch.randn(2, 5, 8, dtype=torch.float64))


@pytest.mark.parametrize(("kind", "last"), [(EfficientAttention, "output"), (EfficientAttention2d, "reprojection")])
def test_weights_of_two_dtypes_are_not_blamed_on_the_input(kind, last):
    layer, x = kind(8), torch.randn(2, 8, 8, 8) if kind is EfficientAttention2d else torch.randn(2, 5, 8)
    layer.get_submodule(last).double()
    with pytest.raises(
        TypeError, match=r"^all weights of the layer must have one dtype, got torch\.float32 and torch\.f"
    ):
        layer(x)


def test_a_block_asks_only_layers_of_this_library_for_their_width():
    class Other(nn.Module):
        dim = 3  # an axis, say

        def forward(self, x, context, key_mask):
            return x

    assert EncoderBlock(8, Other())(torch.ones(1, 2, 8)).shape == (1, 2, 8)


def test_a_projection_of_another_width_is_named():
    layer = EfficientAttention(12, 4, num_key_heads=2)
    layer.output = nn.Linear(6, 12)
    with pytest.raises(
        ValueError, match=r"^output must take the channels of the heads .*, 12, got 6, from a projection"
    ):
        layer(torch.ones(1, 5, 12))
    layer.value = nn.Linear(12, 7)
    with pytest.raises(
        ValueError, match=r"^value must be split .*, got 7 .* of another width .* num_key_heads=2, or none"
    ):
        layer(torch.ones(1, 5, 12))


@pytest.mark.parametrize("kind", [EfficientAttention, EfficientAttention2d])
def test_numbers_in_padded_positions_must_be_finite_even_where_the_loss_leaves_them_out(kind):
    """As the documentation says."""
    layer = kind(4)
    x = torch.randn(1, 4, 3, 5) if kind is EfficientAttention2d else torch.randn(1, 5, 4)
    mask = torch.ones(1, 3, 5, dtype=torch.bool) if kind is EfficientAttention2d else torch.ones(1, 5, dtype=torch.bool)
    mask[..., -1] = False
    valid = mask[:, None] if kind is EfficientAttention2d else mask[..., None]

    def gradients(fill):
        layer.zero_grad()
        layer(x.masked_fill(~valid, fill), key_mask=mask).masked_fill(~valid, 0.0).square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])

    assert gradients(torch.nan).isnan().any()
    torch.testing.assert_close(gradients(3.0), gradients(0.0))
