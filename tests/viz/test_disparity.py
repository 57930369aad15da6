"""Drawn disparities, looked at pixel by pixel."""

import io
import math

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lineara.viz import disparity_comparison, disparity_picture
from lineara.viz.disparity import _BAR_ROOM, _MARGIN, _TITLE_HEIGHT, _UNKNOWN

HEIGHT, WIDTH = 431, 157
GREY = [round(255 * part) for part in to_rgb(_UNKNOWN)]


def drawn(figure):
    """(height, width, 3) of what a PNG of the figure shows, 0 to 255."""
    assert isinstance(figure, Figure)
    content = io.BytesIO()
    figure.savefig(content)
    return np.asarray(Image.open(content).convert("RGB")).astype(int)


def coloured(values, most, name="viridis"):
    """(height, width, 3): what the scale from 0 to `most` makes of values."""
    return colormaps[name](np.clip(np.asarray(values, dtype=float) / most, 0, 1))[..., :3] * 255


def random_map(height=HEIGHT, width=WIDTH, most=60.0, seed=0):
    return torch.rand(height, width, generator=torch.Generator().manual_seed(seed)) * most


def bars(figure):
    return [axes for axes in figure.axes if axes.get_ylabel()]


# One map.


def test_a_map_is_drawn_pixel_by_pixel_in_the_colours_of_its_scale():
    disparity = random_map()
    figure = disparity_picture(disparity)
    np.testing.assert_allclose(drawn(figure)[:HEIGHT, :WIDTH], coloured(disparity, float(disparity.max())), atol=2)
    [bar] = bars(figure)
    assert bar.get_ylabel() == "disparity in pixels"
    assert bar.get_ylim() == pytest.approx((0.0, float(disparity.max())))


def test_the_scale_can_be_given_and_then_is_the_same_for_all_maps():
    disparity = random_map(most=20.0)
    figure = disparity_picture(disparity, most=80.0)
    np.testing.assert_allclose(drawn(figure)[:HEIGHT, :WIDTH], coloured(disparity, 80.0), atol=2)
    assert bars(figure)[0].get_ylim() == (0.0, 80.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_known_is_grey_and_does_not_stretch_the_scale(value):
    disparity = random_map()
    valid = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    disparity[5:11, 3:7], disparity[20:23, 40:47], valid[20:23, 40:47] = value, 1000.0, False
    figure = disparity_picture(disparity, valid=valid)
    pixels = drawn(figure)[:HEIGHT, :WIDTH]
    known = valid & disparity.isfinite()
    assert (pixels[~known.numpy()] == GREY).all()
    assert bars(figure)[0].get_ylim()[1] < 61
    np.testing.assert_allclose(pixels[known.numpy()], coloured(disparity[known], float(disparity[known].max())), atol=2)


@pytest.mark.parametrize(("value", "end"), [(math.nan, 1.0), (-3.0, 1.0), (0.0, 1.0), (7.0, 7.0)])
def test_a_map_of_one_value_or_of_none_has_a_scale(value, end):
    figure = disparity_picture(torch.full((HEIGHT, WIDTH), value))
    assert bars(figure)[0].get_ylim() == (0.0, end)
    drawn(figure)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((431, 157), (431, 157)),
        ((211, 101), (422, 202)),  # twice: 400 on the longer side, 150 in width
        ((431, 61), (431 * 3, 61 * 3)),
        ((31, 20), (31 * 13, 20 * 13)),
        ((500, 4000), (250, 2000)),
        ((1, 1), (400, 400)),
    ],
)
def test_a_map_has_its_own_size_within_limits(size, expected):
    pixels = drawn(disparity_picture(torch.full(size, math.nan)))
    height, width = expected
    assert pixels.shape[:2] == (height, width + _MARGIN + _BAR_ROOM)
    assert (abs(pixels[:height, :width] - GREY) <= 1).all()
    assert (pixels[:height, width + 1 : width + _MARGIN - 2] == 255).all()


def test_a_title_stands_above_the_map():
    figure = disparity_picture(torch.full((HEIGHT, WIDTH), math.nan), title="a pair")
    pixels = drawn(figure)
    assert pixels.shape[0] == HEIGHT + _TITLE_HEIGHT
    assert (pixels[_TITLE_HEIGHT:, :WIDTH] == GREY).all()
    assert (pixels[:_TITLE_HEIGHT, :WIDTH] == 0).any()
    assert [text.get_text() for text in figure.texts] == ["a pair"]


# The comparison.


def panels(pixels, *, rows, columns, height=HEIGHT, width=WIDTH, top=_TITLE_HEIGHT):
    """The panels, row by row."""
    return [
        pixels[
            (start := top + row * (height + _TITLE_HEIGHT + _MARGIN)) : start + height,
            column * (width + _MARGIN) : column * (width + _MARGIN) + width,
        ]
        for row in range(rows)
        for column in range(columns)
    ]


def test_image_truth_prediction_and_error_stand_side_by_side():
    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))
    truth, error = random_map(), random_map(most=5.0, seed=1)
    valid = random_map(seed=2) > 20
    figure = disparity_comparison(image, truth, valid, truth + error, most=64.0, most_error=8.0)
    shown, true, predicted, wrong = panels(drawn(figure), rows=1, columns=4)
    np.testing.assert_allclose(shown, image.permute(1, 2, 0) * 255, atol=1)
    np.testing.assert_allclose(predicted, coloured(truth + error, 64.0), atol=2)
    known = valid.numpy()
    assert 0.2 < known.mean() < 0.8
    for panel, expected in ((true, coloured(truth, 64.0)), (wrong, coloured(error, 8.0, "magma"))):
        np.testing.assert_allclose(panel[known], expected[known], atol=2)
        assert (panel[~known] == GREY).all()
    titles = [text.get_text() for text in figure.texts]
    assert titles == ["left image", "truth", "prediction", f"error, mean {float(error[valid].mean()):.2f} px"]
    assert [bar.get_ylabel() for bar in bars(figure)] == ["disparity in pixels", "error in pixels"]
    assert [bar.get_ylim() for bar in bars(figure)] == [(0.0, 64.0), (0.0, 8.0)]


def test_wide_frames_stand_two_by_two():
    truth = torch.full((149, 601), math.nan)
    figure = disparity_comparison(torch.full((3, 149, 601), 51, dtype=torch.uint8), truth, truth > 0, truth)
    first, *others = panels(drawn(figure), rows=2, columns=2, height=149, width=601)
    assert (first == 51).all()
    for panel in others:
        assert panel.shape == (149, 601, 3)
        assert (panel == GREY).all()
    assert figure.texts[3].get_text() == "error, none known"


def test_truth_and_prediction_share_the_scale_of_the_truth():
    truth = random_map(most=30.0)
    valid = torch.ones_like(truth, dtype=torch.bool)
    figure = disparity_comparison(torch.zeros(3, HEIGHT, WIDTH), truth, valid, truth * 3)
    end = float(truth.max())
    _, true, predicted, _ = panels(drawn(figure), rows=1, columns=4)
    np.testing.assert_allclose(true, coloured(truth, end), atol=2)
    np.testing.assert_allclose(predicted, coloured(truth * 3, end), atol=2)
    assert bars(figure)[0].get_ylim() == pytest.approx((0.0, end))


def test_without_any_truth_the_scale_is_the_predictions():
    nothing = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    figure = disparity_comparison(torch.zeros(3, HEIGHT, WIDTH), random_map(), nothing, random_map(most=17.0))
    assert 16 < bars(figure)[0].get_ylim()[1] < 17
    drawn(figure)


def test_a_few_large_errors_do_not_hide_the_others():
    truth = random_map()
    valid, prediction = torch.ones_like(truth, dtype=torch.bool), truth + 2.0
    prediction[:5] += 300.0
    figure = disparity_comparison(torch.zeros(3, HEIGHT, WIDTH), truth, valid, prediction)
    assert bars(figure)[1].get_ylim()[1] == pytest.approx(2.0, rel=1e-4)
    exact = disparity_comparison(torch.zeros(3, HEIGHT, WIDTH), truth, valid, truth)
    assert bars(exact)[1].get_ylim()[1] == 1.0


@pytest.mark.parametrize(("most", "goes_on"), [(64.0, False), (30.0, True)])
def test_a_scale_that_values_exceed_ends_in_an_arrow(most, goes_on):
    figure = disparity_picture(random_map(), most=most)
    [bar] = bars(figure)
    long_axes = bar.get_position()
    corner = drawn(figure)[round((1 - long_axes.y1) * HEIGHT) + 1]
    left = round(long_axes.x0 * (WIDTH + _MARGIN + _BAR_ROOM)) + 3
    assert (corner[left] == 255).all() == goes_on  # beside the arrow's tip nothing is drawn


def test_a_comparison_may_have_a_title():
    nothing = torch.zeros(HEIGHT, WIDTH)
    figure = disparity_comparison(torch.zeros(3, HEIGHT, WIDTH), nothing, nothing > 0, nothing, title="one frame")
    assert "one frame" in [text.get_text() for text in figure.texts]
    pixels = drawn(figure)
    assert pixels.shape[0] == HEIGHT + 2 * _TITLE_HEIGHT
    first, *_ = panels(pixels, rows=1, columns=4, top=2 * _TITLE_HEIGHT)
    assert (first == 0).all()


# Wrong calls.


@pytest.mark.parametrize("size", [(3, 5, 7), (5,), (0, 7)])
def test_a_map_of_another_shape_is_refused(size):
    with pytest.raises(ValueError, match=r"^disparity must have the shape \(height, width\), got "):
        disparity_picture(torch.zeros(size))


@pytest.mark.parametrize("most", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_ends_nowhere_is_refused(most):
    with pytest.raises(ValueError, match=r"^the upper end of a scale must be a number above 0, got "):
        disparity_picture(torch.zeros(5, 7), most=most)


def test_maps_of_different_sizes_are_refused():
    right = {"truth": torch.zeros(5, 7), "valid": torch.zeros(5, 7) > 0, "prediction": torch.zeros(5, 7)}
    disparity_comparison(torch.zeros(3, 5, 7), **right)
    for name in right:
        with pytest.raises(ValueError, match=rf"^{name} must have the shape \(5, 7\), as the others, got \(7, 5\)$"):
            disparity_comparison(torch.zeros(3, 5, 7), **{**right, name: right[name].T})
    for image in (torch.zeros(5, 7, 3), torch.zeros(1, 3, 5, 7), torch.zeros(3, 0, 7)):
        with pytest.raises(ValueError, match=r"^image must have the shape \(3, height, width\), got "):
            disparity_comparison(image, **right)
    with pytest.raises(ValueError, match=r"^valid must have the shape \(5, 7\)"):
        disparity_picture(torch.zeros(5, 7), valid=torch.zeros(7, 5) > 0)
