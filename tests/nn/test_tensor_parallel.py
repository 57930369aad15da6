"""Layers whose projections torch splits over two processes give what one process gives, or say why they cannot."""

import sys
from pathlib import Path

import pytest
import torch

from lineara.nn import EfficientAttention2d, MultiresolutionAttention2d

sys.path.insert(0, str(Path(__file__).parent))
import parallel_layers
from parallel_layers import LAYERS, REFUSED

sys.path.pop(0)


@pytest.fixture(scope="module")
def given(started_ranks):
    """What each of the two ranks found."""
    return started_ranks(parallel_layers.__file__, 2)


@pytest.mark.parametrize("name", LAYERS)
def test_split_projections_give_what_one_process_gives(name, given):
    expected = parallel_layers.result(parallel_layers.layer_of(name), name)
    for rank in given:
        for key, tensor in expected.items():
            torch.testing.assert_close(rank[name][key], tensor, rtol=1e-6, atol=1e-6, msg=key)


ALIKE = "query, key and value must have num_heads, num_key_heads and num_key_heads heads, or the same share of them, "
SENTENCES = {
    "cut heads": "query must be split between heads of 4 channels each, got 6 channels here, .*;"
    " let it give 12 channels, .* over a number of processes that divides num_heads=3, or none of the three$",
    "cut key heads": "key must be split .*, got 3 channels here, .* divides num_key_heads=1, or none of the three$",
    "split queries alone": ALIKE + "got 2, 4 and 4 heads here, ",
    "one key head, whole": ALIKE + "got 2, 1 and 1 heads here, ",
    "split keys alone": ALIKE + "got 4, 2 and 2 heads here, ",
    "multiresolution": "MultiresolutionAttention cannot be split by heads over processes, .* got 2 of 4 heads here; ",
    "all but output": "output must take the channels of the heads that are here, 6, got 12, .* output by rows, or none",
    "output alone": "output must take the channels of the heads that are here, 12, got 6, .* output by rows, or none",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_compute_something_else_is_refused(name, given):
    for rank in given:
        with pytest.raises(ValueError, match=f"^{SENTENCES[name]}"):
            raise ValueError(rank[name])


@pytest.mark.parametrize("kind", [EfficientAttention2d, MultiresolutionAttention2d])
@pytest.mark.parametrize("name", ["queries", "keys", "values"])
def test_a_layer_for_maps_with_fewer_channels_says_that_it_cannot_be_split(kind, name):
    layer = kind(12, 2, key_dim=8)
    whole = getattr(layer, name)
    setattr(layer, name, torch.nn.Conv2d(12, whole.out_channels // 2, 1))
    with pytest.raises(
        ValueError, match=rf"^{name} must have {whole.out_channels} channels, .* leave its convolutions"
    ):
        layer(torch.ones(1, 12, 3, 5))


def test_sharded_weights_that_are_reset_are_as_they_begin(given):
    for rank in given:
        weights = rank["reset"]
        assert not any(weight.isnan().any() for weight in weights.values())
        assert (weights["embedding.weight"][0] == 0).all()
        assert (weights["embedding.weight"][1:] != 0).all()
        for name in ("key_weight", "value_weight"):
            windows = weights[f"blocks.0.attention.heads.{name}"]
            assert all((of_head == share).all() for of_head, share in zip(windows, (1 / 4, 1 / 2, 1.0)))
