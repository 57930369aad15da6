"""Dot-product attention as a layer: what it has beyond what `test_sequence_layers.py` says of every one."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lineara.nn import EfficientAttention, SoftmaxAttention

SIZES = {"key_dim": 15, "value_dim": 33, "dtype": torch.float64}  # 3 heads of 5 key and 11 value channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_one_number_by_hand():
    # Four channels that all hold 0 or s: the logits of the second query are 0 at the first key and
    # 4 s^2 / sqrt(4) = ln 3 at the second, its weights (1/4, 3/4). Those of the first query are (1/2, 1/2). Values are
    # 0 and 1.
    layer = SoftmaxAttention(4)
    s = (torch.tensor(3.0).log() / 2).sqrt()
    with torch.no_grad():
        for linear, factor in ((layer.query, 1), (layer.key, 1), (layer.value, 1 / s), (layer.output, 1)):
            linear.weight.copy_(factor * torch.eye(4))
            linear.bias.zero_()
    output = layer(torch.stack([torch.zeros(4), s * torch.ones(4)])[None])
    torch.testing.assert_close(output, torch.tensor([0.5, 0.75]).view(1, 2, 1).expand(1, 2, 4))


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_its_scale_is_the_root_of_torchs(impl):
    layer, x = SoftmaxAttention(7, 3, scale=0.7, impl=impl, **SIZES), torch.randn(2, 17, 7, dtype=torch.float64)
    q, k, v = (linear(x).unflatten(2, (3, -1)).transpose(1, 2) for linear in (layer.query, layer.key, layer.value))
    attended = scaled_dot_product_attention(q, k, v, scale=0.7 * 0.7)
    torch.testing.assert_close(layer(x), layer.output(attended.transpose(1, 2).flatten(2)))


def test_scaling_has_no_other_scale_by_default_and_is_then_efficient_attention():
    layer = SoftmaxAttention(7, 3, normalization="scaling", **SIZES)
    efficient = EfficientAttention(7, 3, normalization="scaling", scale=1.0, **SIZES)
    efficient.load_state_dict(layer.state_dict())
    x, mask = torch.randn(2, 17, 7, dtype=torch.float64), torch.rand(2, 17) < 0.6
    torch.testing.assert_close(layer(x, key_mask=mask), efficient(x, key_mask=mask))


def test_it_shows_its_settings():
    text = " ".join(repr(SoftmaxAttention(7, 3, **SIZES)).split())
    settings = "dim=7, num_heads=3, key_dim=15, value_dim=33, normalization='softmax', scale=None, impl='auto'"
    assert text.startswith(f"SoftmaxAttention( {settings} ")


def test_choices_that_it_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"^normalization must be one of 'softmax', 'scaling', got 'cosine'"):
        SoftmaxAttention(7, normalization="cosine")
    layer = SoftmaxAttention(7, impl="streaming")
    with pytest.raises(
        ValueError, match=r"^impl must be an implementation that softmax_attention has .* got 'streaming'"
    ):
        layer(torch.randn(2, 17, 7))
