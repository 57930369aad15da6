"""Drawn detections, looked at pixel by pixel."""

import io

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image

from lineara.viz.detections import _COLOURS, detections

HEIGHT, WIDTH = 503, 617
GREY = torch.full((3, HEIGHT, WIDTH), 0.5)
BOXES = torch.tensor([[30.0, 50.0, 130.0, 90.0], [200.0, 300.0, 350.0, 450.0]])
LABELS, SCORES = torch.tensor([7, 17]), torch.tensor([0.625, 0.875])


def boxed_masks(boxes, height=HEIGHT, width=WIDTH):
    masks = torch.zeros(len(boxes), height, width)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1.0
    return masks


def drawn(figure):
    """(height, width, 3) of what a PNG of the figure shows, 0 to 255."""
    content = io.BytesIO()
    figure.savefig(content)
    return np.asarray(Image.open(content).convert("RGB")).astype(int)


def empty():
    return torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0)


def test_a_photograph_is_shown_pixel_by_pixel():
    image = torch.rand(3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    figure = detections(image, *empty(), torch.zeros(0, HEIGHT, WIDTH))
    assert isinstance(figure, Figure)
    pixels = drawn(figure)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(pixels, image.permute(1, 2, 0).numpy() * 255, atol=1)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((503, 617), (503, 617)),
        ((406, 617), (406, 617)),
        ((101, 61), (505, 305)),
        ((1, 1), (500, 500)),
        ((41, 4100), (20, 2000)),
    ],
)
def test_the_figure_is_as_large_as_the_image_within_limits(size, expected):
    assert drawn(detections(torch.zeros(3, *size), *empty())).shape[:2] == expected


def test_a_title_stands_above_the_image():
    figure = detections(GREY, *empty(), title="no objects")
    pixels = drawn(figure)
    assert pixels.shape == (HEIGHT + 30, WIDTH, 3)
    assert (abs(pixels[30:] - 127.5) < 1).all()
    assert (pixels[:30].min(), pixels[:30].max()) == (0, 255)
    assert [text.get_text() for text in figure.texts] == ["no objects"]


def test_integers_are_brightness_from_0_to_255():
    image = torch.full((3, HEIGHT, WIDTH), 51, dtype=torch.uint8)
    assert (drawn(detections(image, *empty())) == 51).all()


def test_each_object_has_its_box_its_name_with_score_and_its_tint():
    masks = boxed_masks(BOXES)
    masks[1] *= 0.5  # nowhere above one half
    [axes] = detections(GREY, BOXES, LABELS, SCORES, masks, names={7: "cup"}).axes
    assert [text.get_text() for text in axes.texts] == ["cup 0.62", "17 0.88"]
    corners = [[*patch.get_xy(), *patch.get_xy()] for patch in axes.patches]
    sizes = [[0, 0, patch.get_width(), patch.get_height()] for patch in axes.patches]
    np.testing.assert_allclose(np.add(corners, sizes), BOXES)
    # The surest has the first colour.
    assert [to_hex(patch.get_edgecolor()).upper() for patch in axes.patches] == [_COLOURS[1], _COLOURS[0]]
    pixels = drawn(axes.get_figure())
    tinted = 0.55 * 0.5 + 0.45 * np.array(to_rgb(_COLOURS[1]))
    np.testing.assert_allclose(pixels[60:85, 40:120].reshape(-1, 3), np.tile(tinted * 255, (25 * 80, 1)), atol=1)
    np.testing.assert_allclose(pixels[320:440, 220:340], 127.5, atol=1)
    # The frame itself, in the middle of the upper edge of the second box.
    np.testing.assert_allclose(pixels[300, 340], np.array(to_rgb(_COLOURS[0])) * 255, atol=8)


def test_a_mask_has_an_outline_in_its_full_colour():
    mask = torch.zeros(1, HEIGHT, WIDTH)
    mask[0, 200:300, 100:200] = 1
    pixels = drawn(detections(GREY, torch.tensor([[10.0, 400.0, 90.0, 490.0]]), LABELS[:1], SCORES[:1], mask))
    colour = np.array(to_rgb(_COLOURS[0])) * 255
    np.testing.assert_allclose(pixels[200, 150], colour, atol=1)
    np.testing.assert_allclose(pixels[250, 199], colour, atol=1)
    assert abs(pixels[201, 150] - colour).max() > 50
    np.testing.assert_allclose(pixels[199, 150], 127.5, atol=1)


def test_the_surest_object_lies_on_top():
    same = boxed_masks(BOXES[1:]).expand(2, -1, -1)
    for scores in (SCORES, SCORES.flip(0)):
        [axes] = detections(GREY, BOXES, LABELS, scores, same).axes
        assert axes.texts[-1].get_text().endswith("0.88")
        pixels = drawn(axes.get_figure())
        under = 0.55 * 0.5 + 0.45 * np.array(to_rgb(_COLOURS[1]))
        over = 0.55 * under + 0.45 * np.array(to_rgb(_COLOURS[0]))
        np.testing.assert_allclose(pixels[400, 275], over * 255, atol=1)


def test_masks_may_have_a_channel_be_boolean_or_half_precise():
    masks = boxed_masks(BOXES)
    expected = drawn(detections(GREY, BOXES, LABELS, SCORES, masks))
    for same in (masks[:, None], masks.bool(), masks.to(torch.uint8), masks.bfloat16()):
        np.testing.assert_array_equal(drawn(detections(GREY, BOXES, LABELS, SCORES, same)), expected)


def test_no_image_is_changed():
    image, masks = GREY.clone(), boxed_masks(BOXES)
    detections(image, BOXES, LABELS, SCORES, masks)
    assert torch.equal(image, GREY)
    assert torch.equal(masks, boxed_masks(BOXES))


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 20, 20),
        (597, 0, 617, 20),
        (0, 483, 20, 503),
        (597, 483, 617, 503),
        (300, 3, 400, 20),
        (560, 200, 600, 300),
    ],
    ids=str,
)
def test_names_lie_inside_the_image(box):
    figure = detections(GREY, torch.tensor([box]).float(), LABELS[:1], SCORES[:1], names={7: "dining table"})
    figure.canvas.draw()
    written = figure.axes[0].texts[0].get_window_extent()
    assert written.x0 >= -1
    assert written.y0 >= -1
    assert written.x1 <= WIDTH + 1
    assert written.y1 <= HEIGHT + 1


def test_more_objects_than_colours_are_drawn():
    num = 2 * len(_COLOURS) + 3
    boxes = torch.arange(num)[:, None] * 10.0 + torch.tensor([1.0, 1, 50, 50])
    [axes] = detections(GREY, boxes, torch.arange(num), torch.linspace(0, 1, num)).axes
    assert len(axes.patches) == num
    assert len({to_hex(patch.get_edgecolor()) for patch in axes.patches}) == len(_COLOURS)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"image": torch.zeros(HEIGHT, WIDTH, 3)},
            r"image must have the shape \(3, height, width\), got \(503, 617, 3\)",
        ),
        ({"image": torch.zeros(3, 0, 5)}, r"image must have the shape .* got \(3, 0, 5\)"),
        ({"boxes": torch.zeros(4)}, r"boxes must have the shape \(n, 4\), got \(4,\)"),
        ({"labels": torch.zeros(3)}, r"labels must have the shape \(2,\), one per box, got \(3,\)"),
        ({"scores": torch.zeros(2, 1)}, r"scores must have the shape \(2,\), one per box, got \(2, 1\)"),
        (
            {"masks": torch.zeros(2, WIDTH, HEIGHT)},
            r"masks must have the shape \(2, 503, 617\), .* got \(2, 617, 503\)",
        ),
        ({"masks": torch.zeros(2, 2, HEIGHT, WIDTH)}, r"masks must have the shape \(2, 503, 617\)"),
    ],
    ids=str,
)
def test_tensors_of_other_shapes_are_refused(changed, sentence):
    given = {"image": GREY, "boxes": BOXES, "labels": LABELS, "scores": SCORES, "masks": None, **changed}
    with pytest.raises(ValueError, match=f"^{sentence}"):
        detections(**given)
