"""Pictures of routing: which colour stands where, what the legends say, and that all of it lies inside the figure."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lineara.viz import router_load, routing_over_image, routing_over_tokens

RESOLUTIONS = (2, 5, 1)  # from coarse to fine: heads 1, 0, 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def routed(layers, positions, heads, top_k=1):
    """Choice and probability of random routers."""
    probability = (3 * torch.randn(layers, positions, heads)).softmax(dim=2)
    return probability.topk(top_k, dim=2)[1], probability


def legend(axes):
    """The entries of a panel's legend, and their colours."""
    found = axes.get_legend()
    return {text.get_text(): tuple(patch.get_facecolor()[:3]) for text, patch in zip(found.texts, found.legend_handles)}


def lightness(color):
    return float(np.dot(to_rgb(color), (0.299, 0.587, 0.114)))


def head_of(entry):
    return int(entry.split("head ")[1].split(")")[0])


def assert_nothing_is_cut_off(figure):
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        for artist in [axes.title, *axes.texts, *([axes.get_legend()] if axes.get_legend() else [])]:
            box = artist.get_window_extent()
            for low, high in (figure.bbox.intervalx - box.intervalx, figure.bbox.intervaly - box.intervaly):
                assert low < 1, artist  # up to a pixel of rounding
                assert high > -1, artist


# Over tokens


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_token_lies_on_the_colour_of_its_likeliest_head_in_every_layer(top_k):
    tokens = ["[MAX", "4", "[MIN", "7", "2", "]", "0", "]", "3", "1", "9"]
    choice, probability = routed(2, 11, 3, top_k)
    figure = routing_over_tokens(choice, probability, tokens, resolutions=RESOLUTIONS, title="a title")
    assert isinstance(figure, Figure)
    assert [text.get_text() for text in figure.texts] == ["a title"]
    assert len(figure.axes) == 2
    for layer, axes in enumerate(figure.axes):
        colors = {head_of(entry): color for entry, color in legend(axes).items()}
        cells, bars = axes.collections
        assert [text.get_text() for text in axes.texts[:11]] == tokens
        most = probability[layer].amax(dim=1)
        for token, head in enumerate(probability[layer].argmax(dim=1).tolist()):
            [cell], [bar] = cells.get_paths()[token : token + 1], bars.get_paths()[token : token + 1]
            assert tuple(cells.get_facecolor()[token][:3]) == colors[head]
            assert cell.contains_point(axes.texts[token].get_position())
            share = bar.get_extents().width / cell.get_extents().width
            assert share == pytest.approx(float(most[token]))
        heading = axes.texts[11].get_text()
        assert heading.startswith(f"layer {layer}; ")
        assert heading.endswith(f"on average {most.mean():.2f}")
        assert ("the likeliest of its 2 choices" in heading) == (top_k == 2)


def test_the_legend_runs_from_coarse_and_dark_to_fine_and_light_with_the_shares_of_the_choices():
    choice = torch.tensor([[1], [1], [2], [0], [1]])[None]
    _, probability = routed(1, 5, 3)
    [axes] = routing_over_tokens(choice, probability, list("abcde"), resolutions=RESOLUTIONS).axes
    entries = legend(axes)
    assert list(entries) == ["resolution 5 (head 1): 60%", "resolution 2 (head 0): 20%", "resolution 1 (head 2): 20%"]
    levels = [lightness(color) for color in entries.values()]
    assert all(later - earlier > 0.15 for earlier, later in pairwise(levels))  # told apart in grey


def test_what_is_written_can_be_read_on_every_colour():
    choice, probability = routed(1, 50, 5)
    [axes] = routing_over_tokens(choice, probability, ["5"] * 50, resolutions=(16, 8, 4, 2, 1)).axes
    for text, color in zip(axes.texts, axes.collections[0].get_facecolor()):
        assert abs(lightness(text.get_color()) - lightness(color[:3])) > 0.4


@pytest.mark.parametrize(("num_tokens", "heads"), [(1, 2), (11, 4), (501, 4), (60, 9)])
def test_long_expressions_are_wrapped_into_lines_inside_the_figure(num_tokens, heads):
    tokens = ["[MAX", "4", "7", "]"] * 126
    choice, probability = routed(2, num_tokens, heads)
    resolutions = [2 ** (heads - 1 - head) for head in range(heads)]
    figure = routing_over_tokens(choice, probability, tokens[:num_tokens], resolutions=resolutions, title="long")
    assert_nothing_is_cut_off(figure)
    for axes in figure.axes:
        boxes = [path.get_extents() for path in axes.collections[0].get_paths()]
        assert all(axes.dataLim.x0 <= box.x0 and box.x1 <= axes.get_xlim()[1] for box in boxes)
        # One reads on from the end of a line at the beginning of the next.
        assert all(b.x0 > a.x1 or (b.x0 == 0 and b.y0 > a.y1) for a, b in pairwise(boxes))
        words: Any = axes.texts[: min(num_tokens, 20)]
        assert all(a.get_window_extent().x1 < b.get_window_extent().x0 for a, b in pairwise(words))
        top = axes.get_window_extent().y1
        assert axes.get_legend().get_window_extent().y0 >= top - 1
        assert axes.texts[num_tokens].get_window_extent().y0 >= axes.get_legend().get_window_extent().y1


CHOICE, PROBABILITY = torch.zeros(2, 7, 1, dtype=torch.long), torch.full((2, 7, 3), 1 / 3)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"choice": CHOICE[0]}, r"choice must have the shape \(layers, positions, top_k\), got \(7, 1\)"),
        ({"choice": CHOICE[:0]}, r"choice must have the shape .* got \(0, 7, 1\)"),
        (
            {"choice": CHOICE + 3},
            "choice must name heads below 3, as resolutions has them, or be -1, got heads from 3 to",
        ),
        ({"choice": CHOICE - 2}, "choice must name heads below 3, .* got heads from -2 to -2"),
        ({"probability": PROBABILITY[:, :, :2]}, r"probability must .* = \(2, 7, 3\), got \(2, 7, 2\)"),
        ({"tokens": ["a"] * 5}, "tokens must be as many as positions, got 5 and 7"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(wrong, sentence):
    given = {"choice": CHOICE, "probability": PROBABILITY, "tokens": ["a"] * 7} | wrong
    with pytest.raises(ValueError, match=f"^{sentence}"):
        routing_over_tokens(given["choice"], given["probability"], given["tokens"], resolutions=RESOLUTIONS)


# Over an image


@pytest.mark.parametrize("top_k", [1, 2])
def test_every_pixel_has_the_colour_of_its_likeliest_head_and_hidden_ones_are_white(top_k):
    image = np.random.default_rng(0).integers(256, size=(5, 7))
    choice, probability = routed(2, 35, 3, top_k)
    choice[:, 11] = -1
    first, *layers = routing_over_image(image, choice, resolutions=RESOLUTIONS).axes
    [shown] = first.images
    np.testing.assert_array_equal(shown.get_array(), image)
    assert (shown.norm.vmin, shown.norm.vmax) == (0, 255)
    for layer, axes in enumerate(layers):
        colors = {head_of(entry): color for entry, color in legend(axes).items() if "head" in entry}
        [shown] = axes.images
        assert shown.get_interpolation() == "nearest"
        for pixel, head in enumerate(probability[layer].argmax(dim=1).tolist()):
            expected = (1, 1, 1) if pixel == 11 else colors[head]
            np.testing.assert_allclose(np.asarray(shown.get_array())[pixel // 7, pixel % 7, :3], expected)
        assert axes.get_title() == f"layer {layer}" + ", likeliest of 2 choices" * (top_k == 2)


def test_hidden_pixels_do_not_count_and_are_named_only_where_there_are_some():
    choice = torch.tensor([[0, 2, 2, -1, -1, 2], [0, 1, 0, 0, 1, 0]])[:, :, None]
    _, some, none = routing_over_image(np.zeros((2, 3)), choice, resolutions=RESOLUTIONS).axes
    assert list(legend(some)) == [
        "resolution 5 (head 1): 0%",
        "resolution 2 (head 0): 25%",
        "resolution 1 (head 2): 75%",
        "hidden",
    ]
    assert list(legend(none)) == [
        "resolution 5 (head 1): 33%",
        "resolution 2 (head 0): 67%",
        "resolution 1 (head 2): 0%",
    ]


def test_an_image_of_which_all_is_hidden_can_be_drawn():
    _, axes = routing_over_image(np.zeros((2, 3)), torch.full((1, 6, 1), -1), resolutions=RESOLUTIONS).axes
    assert [entry.split(": ")[-1] for entry in legend(axes)] == ["0%", "0%", "0%", "hidden"]


@pytest.mark.parametrize(("shape", "heads", "layers"), [((32, 32), 8, 2), ((3, 11), 2, 1), ((13, 5), 4, 5)])
def test_the_legends_of_an_image_lie_inside_the_figure(shape, heads, layers):
    choice, _ = routed(layers, shape[0] * shape[1], heads)
    choice[:, 0] = -1
    resolutions = [2 ** (heads - 1 - head) for head in range(heads)]
    figure = routing_over_image(np.full(shape, 0.5), choice, resolutions=resolutions, title="an image")
    assert_nothing_is_cut_off(figure)
    assert len(figure.axes) == 1 + layers
    for axes in figure.axes[1:]:
        assert axes.get_legend().get_window_extent().y1 <= axes.bbox.y0


@pytest.mark.parametrize("shape", [(5, 3), (14,), (1, 2, 7)])
def test_an_image_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match="image must have two axes and 7 pixels, as choice, got "):
        routing_over_image(np.zeros(shape), CHOICE, resolutions=RESOLUTIONS)


# The load of heads

STEPS = np.arange(1, 41) * 5


def loads(layers, heads):
    """Every layer and head at a level of its own; in a shuffled order, among others."""
    metrics = {
        f"train/load_layer{layer}_head{head}": (STEPS, np.full(40, 0.01 * (1 + head + 13 * layer)))
        for layer in reversed(range(layers))
        for head in reversed(range(heads))
    }
    return {"train/loss": (STEPS, np.full(40, 2.0)), **metrics, "val/load": (STEPS, np.ones(40))}


@pytest.mark.parametrize(("layers", "heads"), [(1, 2), (2, 11), (4, 3)])
def test_every_layer_has_a_panel_with_a_line_for_each_head_and_the_marks(layers, heads):
    figure = router_load(loads(layers, heads), title="a run")
    assert figure.get_suptitle() == "a run"
    assert [axes.get_title() for axes in figure.axes] == [f"layer {layer}" for layer in range(layers)]
    for layer, axes in enumerate(figure.axes):
        levels = [0.01 * (1 + head + 13 * layer) for head in range(heads)]
        *logged, even, collapsed = axes.lines
        assert [line.get_ydata()[-1] for line in logged] == pytest.approx(np.repeat(levels, 2).tolist())
        assert all(np.array_equal(line.get_xdata(), STEPS) for line in logged)
        assert [text.get_text() for text in axes.get_legend().texts] == [
            f"head {head}, at last {level:.0%}" for head, level in enumerate(levels)
        ]
        assert [(line.get_ydata()[0], line.get_linestyle()) for line in (even, collapsed)] == [
            (1 / heads, "--"),
            (0.02, ":"),
        ]
        assert [text.get_text() for text in axes.texts] == [f"even: {1 / heads:.0%}", "collapse: 2%"]
        bottom, top = axes.get_ylim()
        assert bottom == 0
        assert top > max(1 / heads, 0.01 * (heads + 13 * (layers - 1)))
    assert_nothing_is_cut_off(figure)


def test_heads_are_in_the_order_of_their_numbers_and_differ_in_lightness():
    [axes] = router_load(loads(1, 4)).axes
    levels = [lightness(line.get_color()) for line in axes.lines[1:8:2]]
    assert all(later - earlier > 0.1 for earlier, later in pairwise(levels))


def test_bold_lines_are_the_mean_over_a_tenth_of_the_run():
    noise = np.random.default_rng(0).random(40)
    [axes] = router_load({"train/load_layer0_head0": (STEPS, noise)}).axes
    raw, averaged = (np.asarray(line.get_ydata()) for line in axes.lines[:2])
    np.testing.assert_array_equal(raw, noise)
    np.testing.assert_allclose(averaged[20], noise[18:23].mean())
    assert axes.lines[0].get_linewidth() < axes.lines[1].get_linewidth()


def test_a_run_without_routers_is_refused():
    with pytest.raises(
        ValueError, match=r"^metrics must hold train/load_layer<l>_head<h>, got train/loss; only a netw"
    ):
        router_load({"train/loss": (STEPS, np.ones(40))})
    with pytest.raises(ValueError, match=r"^metrics must hold .* got none; only"):
        router_load({})
