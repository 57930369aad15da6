"""Checks of arguments that layers and networks share."""

import numpy as np
import pytest
import torch
from torch import nn

from lineara.nn import EfficientAttention, EfficientAttention2d, MultiresolutionAttention2d, SoftmaxAttention
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

    class Public(_Base):
        pass

    with_own_name(Public, "__init__")
    assert Public(a=3).a == 3
    with pytest.raises(TypeError, match=r"Public\.__init__\(\) got an unexpected keyword argument 'b'"):
        Public(b=1)
    with pytest.raises(TypeError, match=r"_Base\.__init__\(\) got"):
        _Base(b=1)
