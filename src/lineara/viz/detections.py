"""Detected objects over their image: boxes, masks, names and scores."""

from collections.abc import Mapping
from math import ceil

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

_Array = npt.NDArray[np.float64]

# One after the other for the objects of an image: bright on photographs, and neighbours in the list far apart.
_COLOURS = (
    *("#E6194B", "#3CB44B", "#FFE119", "#4363D8", "#F58231", "#46F0F0", "#F032E6"),
    *("#BCF60C", "#FABEBE", "#008080", "#E6BEFF", "#9A6324", "#800000", "#AAFFC3"),
)
_TINT = 0.45
_DPI = 100
# Pixels of the figure's longer side: a smaller image is enlarged, so that what is written on it can be read.
_LEAST_SIDE, _MOST_SIDE = 500, 2000
_TITLE_HEIGHT = 30


def detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor,
    masks: Tensor | None = None,
    *,
    names: Mapping[int, str] | None = None,
    title: str = "",
) -> Figure:
    """Draw detected objects over their image, each in a colour of its own, the surest on top.

    The figure is as many pixels large as the image, but at least 500 and at most 2000 on its longer side: small images
    are enlarged by a whole factor. A title adds a band above.

    Args:
        image: (3, height, width), numbers in 0..1 or integers in 0..255.
        boxes: (n, 4), corners x1, y1, x2, y2 in pixels of the image; n may be 0.
        labels: (n,) integers.
        scores: (n,) in 0..1.
        masks: (n, height, width) or (n, 1, height, width): the object is where it exceeds 0.5. None draws no masks.
        names: what to write for a label; the label itself where a name is missing.
        title: above the image.

    Returns:
        A figure of one panel.

    Raises:
        ValueError: for tensors of other shapes, or of different numbers of objects.
    """
    _check(image, boxes, labels, scores, masks)
    picture = _as_picture(image)
    surest_last = scores.detach().cpu().float().argsort(stable=True, descending=True).tolist()[::-1]
    colours = {index: _COLOURS[rank % len(_COLOURS)] for rank, index in enumerate(reversed(surest_last))}
    if masks is not None:
        for index in surest_last:
            _tint(picture, (masks[index] > 0.5).cpu().reshape(picture.shape[:2]).numpy(), colours[index])
    axes, scale = _panel(picture, title)
    font_size = float(np.clip(0.016 * max(picture.shape[:2]) * scale, 8.0, 18.0))
    for index in surest_last:
        name = (names or {}).get(int(labels[index]), str(int(labels[index])))
        corners = boxes[index].detach().cpu().tolist()
        _draw_box(axes, corners, f"{name} {float(scores[index]):.2f}", colours[index], font_size)
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _check(image: Tensor, boxes: Tensor, labels: Tensor, scores: Tensor, masks: Tensor | None) -> None:
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must have the shape (3, height, width), got {tuple(image.shape)}")
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have the shape (n, 4), got {tuple(boxes.shape)}")
    for name, values in (("labels", labels), ("scores", scores)):
        if values.shape != boxes.shape[:1]:
            raise ValueError(f"{name} must have the shape ({len(boxes)},), one per box, got {tuple(values.shape)}")
    if masks is not None:
        expected = (len(boxes), *image.shape[1:])
        if tuple(masks.shape) not in (expected, (len(boxes), 1, *image.shape[1:])):
            raise ValueError(f"masks must have the shape {expected}, one per box, got {tuple(masks.shape)}")


def _as_picture(image: Tensor) -> _Array:
    """(height, width, 3) from 0 to 1, to be drawn on."""
    most = 1.0 if image.is_floating_point() else 255.0
    return (image.detach().cpu().double() / most).clamp(0.0, 1.0).permute(1, 2, 0).contiguous().numpy()


def _tint(picture: _Array, mask: npt.NDArray[np.bool_], colour: str) -> None:
    """Colour what lies inside, and its outline in full."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # Only where the object is: photographs are large, and hold many.
    around = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part, inside, tint = picture[around], mask[around], np.array(to_rgb(colour))
    part[inside] += _TINT * (tint - part[inside])
    padded = np.pad(inside, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    part[inside & ~inner] = tint


def _panel(picture: _Array, title: str) -> tuple[Axes, float]:
    """Axes that the picture fills, and how many pixels of the figure one of its pixels takes."""
    height, width = picture.shape[:2]
    longer = max(height, width)
    scale = float(max(1, ceil(_LEAST_SIDE / longer))) if longer < _MOST_SIDE else _MOST_SIDE / longer
    band = _TITLE_HEIGHT if title else 0
    columns, rows = max(1, round(width * scale)), max(1, round(height * scale)) + band
    # A little more, because matplotlib cuts what is behind the point.
    figure = Figure(figsize=((columns + 0.01) / _DPI, (rows + 0.01) / _DPI), dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0 - band / rows))
    axes.imshow(
        picture, interpolation="nearest" if scale >= 1 else "antialiased", aspect="auto", extent=(0, width, height, 0)
    )
    axes.set_axis_off()
    if title:
        figure.text(0.5, 1.0 - band / rows / 2, title, fontsize=12, ha="center", va="center")
    return axes, scale


def _draw_box(axes: Axes, corners: list[float], text: str, colour: str, font_size: float) -> None:
    left, top, right, bottom = corners
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=font_size / 7)
    )
    # Above the box; inside it where there is no room above, and towards the left where there is none at the right.
    pixels = axes.transData.transform([(left, top), (right, top)])  # from the lower left corner of the figure
    area = axes.get_window_extent()
    line_height = 1.6 * font_size * _DPI / 72
    text_width = 0.62 * len(text) * font_size * _DPI / 72
    below = pixels[0, 1] + line_height > area.y1
    leftwards = pixels[0, 0] + text_width > area.x1 and pixels[1, 0] > text_width
    axes.text(
        right if leftwards else left,
        top,
        text,
        fontsize=font_size,
        color="black" if np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) > 0.5 else "white",
        horizontalalignment="right" if leftwards else "left",
        verticalalignment="top" if below else "bottom",
        bbox={"facecolor": colour, "edgecolor": "none", "alpha": 0.85, "pad": 1.0},
        clip_on=True,
    )
