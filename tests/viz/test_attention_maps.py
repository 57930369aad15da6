import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from lineara.nn import (
    EfficientAttention,
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    EncoderBlock,
    SoftmaxAttention,
)
from lineara.viz import global_maps, map_grid, token_maps

BATCH, LEN = 3, 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_hot_maps(peaks, positions):
    """A map per channel with a peak of the given weight at position `channel`, and the rest spread evenly."""
    maps = torch.empty(len(peaks), positions)
    for channel, peak in enumerate(peaks):
        maps[channel] = (1 - peak) / (positions - 1)
        maps[channel, channel] = peak
    return maps


# The maps of a layer


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_maps_of_a_sequence_layer_equal_a_computation_by_hand(scale):
    layer = EfficientAttention(10, num_heads=2, key_dim=14, scale=scale)
    x = torch.randn(BATCH, LEN, 10)
    maps = global_maps(layer, lambda: layer(x))
    assert maps.shape == (BATCH, 2, 7, LEN)
    keys = torch.einsum("bmc,kc->bkm", x, layer.key.weight) + layer.key.bias[:, None]
    for head in range(2):
        weights = torch.exp(scale * keys[:, 7 * head : 7 * head + 7])
        torch.testing.assert_close(maps[:, head], weights / weights.sum(dim=2, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "positions"),
    [(EfficientAttention1d, (13,)), (EfficientAttention2d, (5, 7)), (EfficientAttention3d, (2, 3, 5))],
)
def test_maps_of_a_map_layer_equal_a_computation_by_hand_and_keep_the_shape_of_the_map(kind, positions):
    layer = kind(6, num_heads=3, key_dim=33, scale=1.9)
    x = torch.randn(2, 6, *positions)
    maps = global_maps(layer, lambda: layer(x))
    assert maps.shape == (2, 3, 11, *positions)
    weight, bias = layer.keys.weight.flatten(1), layer.keys.bias
    keys = torch.einsum("bcm,kc->bkm", x.flatten(2), weight) + bias[:, None]
    expected = torch.exp(1.9 * keys) / torch.exp(1.9 * keys).sum(dim=2, keepdim=True)
    torch.testing.assert_close(maps.flatten(1, 2).flatten(2), expected)


def test_the_context_is_what_the_maps_gather():
    layer = EfficientAttention(4, key_dim=5)
    x = torch.randn(BATCH, LEN, 4)
    context = global_maps(layer, lambda: layer(x))[:, 0] @ layer.value(x)
    output = layer.output(layer.query(x).softmax(dim=2) @ context)
    torch.testing.assert_close(layer(x), output)


def test_maps_of_cross_attention_lie_over_the_context():
    layer = EfficientAttention(4, context_dim=6)
    maps = global_maps(layer, lambda: layer(torch.randn(BATCH, LEN, 4), torch.randn(BATCH, 17, 6)))
    assert maps.shape == (BATCH, 1, 4, 17)
    torch.testing.assert_close(maps.sum(dim=3), torch.ones(BATCH, 1, 4))


def test_masked_positions_have_no_weight_and_what_they_hold_never_leaks():
    layer = EfficientAttention(4, num_heads=2)
    mask = torch.rand(BATCH, LEN) < 0.6
    mask[0] = True
    mask[2] = False
    x = torch.randn(BATCH, LEN, 4)
    dirty = x.masked_fill(~mask[:, :, None], torch.nan)
    maps = global_maps(layer, lambda: layer(dirty, key_mask=mask), key_mask=mask)
    hidden = ~mask[:, None, None].expand_as(maps)
    assert (maps[hidden] == 0).all()
    assert (maps[~hidden] > 0).all()
    torch.testing.assert_close(maps.sum(dim=3), torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(-1, 2, 2))
    torch.testing.assert_close(maps[:1], global_maps(layer, lambda: layer(x[:1])))
    kept = x[1:2, mask[1]]
    torch.testing.assert_close(maps[1:2, :, :, mask[1]], global_maps(layer, lambda: layer(kept)))


def test_a_layer_is_found_inside_a_network_that_runs_without_gradients():
    network = nn.Sequential(EncoderBlock(4, EfficientAttention(4)), EncoderBlock(4, EfficientAttention(4)))
    x = torch.randn(BATCH, LEN, 4)
    outputs = []
    maps = global_maps(network[1].attention, lambda: outputs.append(network(x)))
    assert not outputs[0].requires_grad
    assert not maps.requires_grad
    block = network[1]
    by_itself = global_maps(block.attention, lambda: block.attention(block.attention_norm(network[0](x))))
    torch.testing.assert_close(maps, by_itself)


def test_low_precision_keys_give_single_precision_maps():
    layer = EfficientAttention(4, dtype=torch.bfloat16)
    maps = global_maps(layer, lambda: layer(torch.randn(BATCH, LEN, 4, dtype=torch.bfloat16)))
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(dim=3), torch.ones(BATCH, 1, 4))
    assert global_maps(layer.double(), lambda: layer(torch.randn(1, 2, 4).double())).dtype == torch.float64


def test_the_layer_is_left_as_it_was():
    layer = EfficientAttention(4)
    x = torch.randn(BATCH, LEN, 4)

    def fail():
        layer(x)
        raise KeyError("later")

    with pytest.raises(KeyError):
        global_maps(layer, fail)
    assert not layer.key._forward_hooks
    global_maps(layer, lambda: layer(x))
    assert not layer.key._forward_hooks
    assert layer(x).requires_grad


@pytest.mark.parametrize(
    ("layer", "mask", "error", "sentence"),
    [
        (
            SoftmaxAttention(4),
            None,
            ValueError,
            "must be an efficient attention layer of lineara.nn, got SoftmaxAttent",
        ),
        (EfficientAttention(4, normalization="scaling"), None, ValueError, "normalization='softmax', got 'scaling'"),
        (
            EfficientAttention(4),
            torch.ones(BATCH, LEN),
            TypeError,
            "must be boolean (True = takes part), got torch.float",
        ),
        (EfficientAttention(4), torch.ones(BATCH, 2) > 0, ValueError, "(batch, positions) = (3, 11), got (3, 2)"),
        (EfficientAttention1d(LEN), torch.ones(BATCH, 4) > 0, ValueError, "must be None for EfficientAttention1d"),
    ],
)
def test_wrong_layers_and_masks_are_refused(layer, mask, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        global_maps(layer, lambda: layer(torch.randn(BATCH, LEN, 4)), key_mask=mask)


@pytest.mark.parametrize("times", [0, 2])
def test_a_layer_must_run_once(times):
    layer = EfficientAttention(4)
    with pytest.raises(ValueError, match=f"call must run the layer exactly once, got {times} times"):
        global_maps(layer, lambda: [layer(torch.randn(BATCH, LEN, 4)) for _ in range(times)])


# Over tokens


def test_rows_are_the_sharpest_channels_with_their_peaks(tmp_path):
    maps = one_hot_maps([0.3, 0.9, 0.2, 0.5, 0.25], 8)
    tokens = ["[MAX", "1", "[MIN", "4", "2", "]", "7", "]"]
    figure = token_maps(maps, tokens, max_channels=3, title="a title")
    axes, bar = figure.axes
    assert axes.get_title() == "a title"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3", "0"]
    assert [label.get_text() for label in axes.get_xticklabels()] == tokens
    assert [text.get_text() for text in axes.texts] == ["7.2 x at 1", "4 x at 3", "2.4 x at 0"]
    assert bar.get_ylabel() == "weight relative to uniform"
    [image] = axes.images
    # 0.995 of the weights lie below this one, which is the darkest red.
    most = np.quantile(maps[[1, 3, 0]].numpy() * 8, 0.995)
    np.testing.assert_allclose(image.get_array(), (maps[[1, 3, 0]].numpy() * 8).clip(1 / most, most), rtol=1e-6)
    assert (image.norm.vmin, image.norm.vmax) == pytest.approx((1 / most, most))
    figure.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size < 300_000


def test_almost_uniform_maps_look_uniform():
    [image] = (
        token_maps(torch.full((2, 5), 0.2) + torch.tensor([[0.001, -0.001, 0, 0, 0]]), list("abcde")).axes[0].images
    )
    assert (image.norm.vmin, image.norm.vmax) == (0.5, 2.0)


def test_masked_positions_are_drawn():
    maps = one_hot_maps([0.5, 0.4], 5)
    maps[:, 3:] = 0
    token_maps(maps, list("abc  ")).canvas.draw()


@pytest.mark.parametrize(("num_tokens", "written"), [(120, True), (121, False)])
def test_many_tokens_are_counted_instead_of_written(num_tokens, written):
    axes = token_maps(torch.rand(3, num_tokens).softmax(dim=1), ["x"] * num_tokens).axes[0]
    assert (len(axes.get_xticklabels()) == num_tokens) is written
    assert axes.get_xlabel() == ("" if written else "position")


def test_a_long_sequence_is_averaged_over_neighbours_and_keeps_its_peak(tmp_path):
    maps = torch.rand(16, 1999).softmax(dim=1)
    maps[4, 1998] = 1.0
    figure = token_maps(maps, ["x"] * 1999)
    axes = figure.axes[0]
    [image] = axes.images
    assert image.get_array().shape == (16, 500)
    assert image.get_extent() == [-0.5, 1998.5, 15.5, -0.5]
    row = [label.get_text() for label in axes.get_yticklabels()].index("4")
    assert row == 0
    assert axes.texts[row].get_text() == "2e+03 x at 1998"
    relative = maps.double().numpy()[5] * 1999
    row = [label.get_text() for label in axes.get_yticklabels()].index("5")
    np.testing.assert_allclose(image.get_array()[row, [0, 7]], [relative[:4].mean(), relative[28:32].mean()])
    np.testing.assert_allclose(image.get_array()[row, -1], relative[1996:].mean())
    figure.savefig(tmp_path / "maps.png")
    assert (tmp_path / "maps.png").stat().st_size < 300_000


def test_tokens_must_fit():
    with pytest.raises(ValueError, match="tokens must be as many as positions, got 2 and 3"):
        token_maps(torch.rand(4, 3), ["a", "b"])
    with pytest.raises(ValueError, match=r"maps must have the shape \(channels, positions\), got \(1, 4, 3\)"):
        token_maps(torch.rand(1, 4, 3), ["a", "b", "c"])


# Over an image


def test_grid_shows_the_image_and_the_sharpest_maps_in_grey(tmp_path):
    maps = one_hot_maps([0.1, 0.6, 0.3, 0.8], 35).reshape(4, 5, 7)
    picture = torch.rand(50, 70, 3)
    figure = map_grid(maps, max_maps=3, image=picture, title="a title")
    assert figure.get_suptitle() == "a title"
    assert [cell.get_title() for cell in figure.axes] == ["image", "channel 3", "channel 1", "channel 2"]
    assert [cell.get_xlabel() for cell in figure.axes[1:]] == [f"peak {x} x uniform" for x in ("28", "21", "10.5")]
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), picture)
    for cell, channel in zip(figure.axes[1:], [3, 1, 2]):
        [image] = cell.images
        np.testing.assert_allclose(image.get_array(), maps[channel])
        white = image.to_rgba(image.get_array())[0, channel]
        np.testing.assert_array_equal(white, 1)
        np.testing.assert_array_equal(image.to_rgba(image.get_array())[4, 6], (0, 0, 0, 1))
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size < 300_000


@pytest.mark.parametrize("num_maps", [1, 6, 7, 40])
def test_grid_has_a_cell_per_map(num_maps):
    assert len(map_grid(torch.rand(num_maps, 3, 4)).axes) == min(num_maps, 16)
    assert len(map_grid(torch.rand(num_maps, 3, 4), max_maps=2, image=np.zeros((9, 8, 3), np.uint8)).axes) == (
        min(num_maps, 2) + 1
    )


def test_shapes_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match=r"maps must have the shape \(channels, height, width\), got \(3, 4\)"):
        map_grid(torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"image must have the shape \(height, width, 3\), got \(3, 9, 8\)"):
        map_grid(torch.rand(2, 3, 4), image=torch.rand(3, 9, 8))


def test_drawing_does_not_need_the_global_state_of_pyplot():
    script = (
        "import sys, torch, lineara.viz as viz; viz.token_maps(torch.rand(2, 3), list('abc')).canvas.draw(); "
        "viz.map_grid(torch.rand(2, 3, 4)).canvas.draw(); assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
