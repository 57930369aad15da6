"""Non-local attention over maps and volumes, against efficient attention and against a loop."""

import pytest
import torch

from lineara.nn import EfficientAttention2d, EfficientAttention3d
from lineara.nn.non_local_attention import NonLocalAttention2d, NonLocalAttention3d

SHAPES = {2: (5, 7), 3: (3, 5, 7)}
LAYERS = {2: (NonLocalAttention2d, EfficientAttention2d), 3: (NonLocalAttention3d, EfficientAttention3d)}


@pytest.mark.parametrize("axes", [2, 3])
def test_with_scaling_it_computes_what_efficient_attention_computes(axes):
    non_local, efficient = LAYERS[axes]
    layer = non_local(6, 2, key_dim=4, dtype=torch.float64)
    other = efficient(6, 2, key_dim=4, normalization="scaling", dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 6, *SHAPES[axes], dtype=torch.float64)
    torch.testing.assert_close(layer(x), other(x))
    context = torch.randn(2, 6, *(size + 1 for size in SHAPES[axes]), dtype=torch.float64)
    torch.testing.assert_close(layer(x, context), other(x, context))


def test_with_softmax_every_pixel_averages_all_pixels_by_its_products():
    layer = NonLocalAttention2d(3, key_dim=4, value_dim=2, normalization="softmax", dtype=torch.float64)
    x = torch.randn(1, 3, 2, 5, dtype=torch.float64)
    query, key, value = (part(x)[0].flatten(1).T for part in (layer.queries, layer.keys, layer.values))
    rows = []
    for pixel in range(10):
        products = torch.stack([query[pixel].dot(key[other]) for other in range(10)]) / 2  # the square root of 4
        weights = products.exp() / products.exp().sum()
        rows.append(sum(weight * value[other] for other, weight in enumerate(weights)))
    attended = torch.stack(rows).T.reshape(1, 2, 2, 5)
    torch.testing.assert_close(layer(x), x + layer.reprojection(attended))


def test_an_unknown_normalization_is_refused_and_the_settings_are_shown():
    with pytest.raises(ValueError, match="normalization must be"):
        NonLocalAttention2d(6, normalization="sum")
    assert "normalization='scaling', scale=None" in repr(NonLocalAttention3d(6))
