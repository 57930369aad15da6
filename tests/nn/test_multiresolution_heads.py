"""What the layers of multiresolution attention share."""

import numpy as np
import pytest
import torch

from lineara.nn import MultiresolutionAttention
from lineara.nn.multiresolution_heads import MultiresolutionHeads
from lineara.ops import multiresolution_attention


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(**options):
    defaults = {
        "num_axes": 1,
        "resolutions": None,
        "compression": "mean",
        "feature_map": "softmax",
        "routing": "query",
        "top_k": 1,
        "scale": 1.0,
        "impl": "auto",
        "device": None,
        "dtype": torch.float64,
    }
    return MultiresolutionHeads(3, 15, 33, **defaults | options)


def tensors():
    return [torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((7, 5), (13, 5), (13, 11))]


def test_the_default_resolutions_are_powers_of_two_down_to_one():
    assert made().resolutions == (4, 2, 1)
    assert made(resolutions=[1, 5, 5]).resolutions == (1, 5, 5)
    assert made(resolutions=np.array([1, 5, 5])).resolutions == (1, 5, 5)
    assert made(num_key_heads=1).resolutions == (1,)


@pytest.mark.parametrize("compression", ["mean", "max", "conv"])
@pytest.mark.parametrize("feature_map", ["softmax", "relu", "elu"])
def test_it_calls_the_operation_with_its_weights_and_the_routers_gate(compression, feature_map):
    heads = made(compression=compression, feature_map=feature_map, scale=0.7, top_k=2)
    query, key, value = tensors()
    mask = torch.rand(2, 13) > 0.4
    given = heads(query, key, value, key_mask=mask)
    gate = heads.router(query.transpose(1, 2).reshape(2, 7, 15), None)
    expected = multiresolution_attention(
        query,
        key,
        value,
        resolutions=(4, 2, 1),
        compression=compression,
        feature_map=feature_map,
        gate=gate,
        key_weight=heads.key_weight,
        value_weight=heads.value_weight,
        scale=0.7,
        key_mask=mask,
    )
    assert torch.equal(given, expected)


@pytest.mark.parametrize("num_axes", [1, 2])
def test_weights_of_windows_start_as_the_mean(num_axes):
    shape = None if num_axes == 1 else (13, 1)
    conv, mean = made(compression="conv", num_axes=num_axes, routing=None), made(routing=None)
    assert conv.key_weight.shape == (3, 5, 4**num_axes)
    assert conv.value_weight.shape == (3, 11, 4**num_axes)
    inputs = tensors()
    torch.testing.assert_close(conv(*inputs, key_shape=shape), mean(*inputs, key_shape=shape))


def test_one_head_or_no_routing_has_no_router():
    assert made(routing=None).router is None
    assert made(routing=None).last_routing is None
    alone = MultiresolutionHeads(
        1,
        5,
        11,
        num_axes=1,
        resolutions=None,
        compression="mean",
        feature_map="softmax",
        routing="query",
        top_k=1,
        scale=1.0,
        impl="auto",
        device=None,
        dtype=None,
    )
    assert alone.router is None
    assert alone.resolutions == (1,)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        (
            {"resolutions": [1, 2]},
            ValueError,
            "resolutions must have one entry for each key head, got 2 of them and 3 heads",
        ),
        ({"resolutions": [1, 2, -1]}, ValueError, "each of resolutions must be at least 1, got -1"),
        ({"resolutions": [1, 2, 0.5]}, TypeError, "each of resolutions must be an integer, got 0.5"),
        ({"resolutions": 8}, TypeError, "resolutions must be a sequence of integers or None, got 8"),
        ({"routing": None, "top_k": 4}, ValueError, "top_k must be at least 1 and at most num_heads=3, got 4"),
        ({"compression": "sum"}, ValueError, "compression must be one of 'mean', 'max', 'conv', got 'sum'"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of 'softmax', 'relu', 'elu', got 'gelu'"),
        ({"routing": "key"}, ValueError, "routing must be 'query' or None, got 'key'"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'reference', 'streaming', 'triton', got 'fast'"),
        ({"top_k": 4}, ValueError, "top_k must be at least 1 and at most num_heads=3, got 4"),
    ],
)
def test_impossible_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=sentence):
        made(**options)


def test_windows_in_float64_start_as_the_mean_of_float64():
    layer = MultiresolutionAttention(3, 3, resolutions=(3, 7, 1), compression="conv", dtype=torch.float64)
    assert [weight[0, 0].item() for weight in layer.heads.key_weight] == [1 / 3, 1 / 7, 1.0]
