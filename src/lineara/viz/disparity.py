"""Disparities as colours: one map at its own size, or image, truth, prediction and error side by side."""

from math import ceil

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from torch import Tensor

_Array = npt.NDArray[np.float64]

_DISPARITY_COLOURS, _ERROR_COLOURS = "viridis", "magma"
# Where nothing is known: in neither of the scales.
_UNKNOWN = "#B0B0B0"
_DPI = 100
# Pixels of a panel's longer side, and of its width: a smaller map is enlarged, so that what is written can be read.
_LEAST_SIDE, _LEAST_WIDTH, _MOST_SIDE = 400, 150, 2000
_TITLE_HEIGHT, _MARGIN, _BAR_WIDTH, _BAR_ROOM = 30, 10, 18, 90
# Above this share of the errors the scale ends: a few large ones would make all others look alike.
_SHOWN_SHARE = 0.98


def disparity_picture(
    disparity: Tensor, *, valid: Tensor | None = None, most: float | None = None, title: str = ""
) -> Figure:
    """Draw a disparity map in colours, near things bright, with its scale in pixels at the right.

    The map is drawn pixel by pixel: as many pixels large as it is, enlarged by a whole factor below 400 on its longer
    side or 150 in width, made smaller above 2000.

    Args:
        disparity: (height, width), in pixels.
        valid: (height, width), bool: where it is known; elsewhere it is grey, as where it is not finite. None is
            everywhere.
        most: the upper end of the scale, which begins at 0; None is the largest disparity shown.
        title: above the map.

    Returns:
        A figure of the map and its scale.

    Raises:
        ValueError: for tensors of other shapes, or an end of the scale that is not above 0.
    """
    if disparity.dim() != 2 or disparity.numel() == 0:
        raise ValueError(f"disparity must have the shape (height, width), got {tuple(disparity.shape)}")
    _check_size("valid", valid, disparity)
    shown = _known(disparity, valid)
    panels = _Panels(shown.shape, rows=1, columns=1, bars=1, titled=bool(title))
    panels.draw(0, shown, _colours(_DISPARITY_COLOURS), _upper_end(most, shown), title)
    panels.bar(0, 0, "disparity in pixels", _exceeds(shown, _upper_end(most, shown)))
    return panels.figure


def disparity_comparison(
    image: Tensor,
    truth: Tensor,
    valid: Tensor,
    prediction: Tensor,
    *,
    most: float | None = None,
    most_error: float | None = None,
    title: str = "",
) -> Figure:
    """Draw the left image, the true disparity, the predicted one and the error: side by side, or two by two if wide.

    Truth and prediction have one scale. Where the truth is not known it is grey, and so is the error.

    Args:
        image: (3, height, width), numbers in 0..1 or integers in 0..255.
        truth: (height, width), in pixels.
        valid: (height, width), bool: where the truth is known.
        prediction: (height, width), in pixels.
        most: the upper end of the disparities' scale; None is the largest truth shown, or where there is none the
            largest prediction.
        most_error: the upper end of the errors' scale; None covers 98 % of the errors, and at least 1 pixel.
        title: above all of them.

    Returns:
        A figure of four panels and two scales.

    Raises:
        ValueError: for tensors of other shapes, or an end of a scale that is not above 0.
    """
    if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(f"image must have the shape (3, height, width), got {tuple(image.shape)}")
    for name, values in (("truth", truth), ("valid", valid), ("prediction", prediction)):
        _check_size(name, values, image[0])
    known, predicted = _known(truth, valid), _known(prediction, None)
    error = np.ma.masked_invalid(np.ma.abs(predicted - known))
    most = _upper_end(most, known if known.count() else predicted)
    if most_error is None:
        most_error = max(1.0, float(np.quantile(error.compressed(), _SHOWN_SHARE))) if error.count() else 1.0
    most_error = _upper_end(most_error, error)
    height, width = known.shape
    rows, columns = (1, 4) if height >= width else (2, 2)
    panels = _Panels((height, width), rows=rows, columns=columns, bars=2, titled=True, title=title)
    panels.draw(0, _as_picture(image), None, 1.0, "left image")
    panels.draw(1, known, _colours(_DISPARITY_COLOURS), most, "truth")
    panels.draw(2, predicted, _colours(_DISPARITY_COLOURS), most, "prediction")
    mean = f"error, mean {error.mean():.2f} px" if error.count() else "error, none known"
    panels.draw(3, error, _colours(_ERROR_COLOURS), most_error, mean)
    panels.bar(0, 1, "disparity in pixels", _exceeds(known, most) or _exceeds(predicted, most))
    panels.bar(1, 3, "error in pixels", _exceeds(error, most_error))
    return panels.figure


def _check_size(name: str, values: Tensor | None, like: Tensor) -> None:
    if values is not None and values.shape != like.shape:
        raise ValueError(f"{name} must have the shape {tuple(like.shape)}, as the others, got {tuple(values.shape)}")


def _known(values: Tensor, valid: Tensor | None) -> np.ma.MaskedArray:
    """The values, masked where they are not known or not finite."""
    shown = np.ma.masked_invalid(values.detach().cpu().double().numpy())
    return shown if valid is None else np.ma.masked_where(~valid.detach().cpu().bool().numpy(), shown)


def _as_picture(image: Tensor) -> _Array:
    """(height, width, 3) from 0 to 1."""
    most = 1.0 if image.is_floating_point() else 255.0
    return (image.detach().cpu().double() / most).clamp(0.0, 1.0).permute(1, 2, 0).numpy()


def _colours(name: str) -> Colormap:
    return colormaps[name].with_extremes(bad=_UNKNOWN)


def _upper_end(given: float | None, shown: np.ma.MaskedArray) -> float:
    if given is None:
        largest = float(shown.max()) if shown.count() else 0.0
        return largest if largest > 0 else 1.0
    if not 0 < given < np.inf:
        raise ValueError(f"the upper end of a scale must be a number above 0, got {given}")
    return float(given)


def _exceeds(shown: np.ma.MaskedArray, most: float) -> bool:
    return bool(shown.count()) and float(shown.max()) > most


class _Panels:
    """A figure of equal panels, each drawn pixel by pixel, with bars at the right."""

    def __init__(
        self, size: tuple[int, ...], *, rows: int, columns: int, bars: int, titled: bool, title: str = ""
    ) -> None:
        longer = max(size)
        enlarged = max(ceil(_LEAST_SIDE / longer), ceil(_LEAST_WIDTH / size[1]))
        scale = min(float(enlarged), max(1, _MOST_SIDE // longer) if longer <= _MOST_SIDE else _MOST_SIDE / longer)
        self.height, self.width = (max(1, round(length * scale)) for length in size)
        self._interpolation = "nearest" if scale >= 1 else "antialiased"
        self._columns = columns
        self._band = _TITLE_HEIGHT if titled else 0
        self._top = _TITLE_HEIGHT if title else 0
        margin = _MARGIN if rows * columns > 1 else 0
        self._step_right, self._step_down = self.width + margin, self.height + self._band + margin
        self._bars_left = columns * self._step_right - margin + _MARGIN
        self._total_width = self._bars_left + bars * _BAR_ROOM
        self._total_height = self._top + rows * self._step_down - margin
        # A low panel needs room for the numbers of its bar; a little more, as matplotlib cuts what is behind the point.
        self._total_height = max(self._total_height, self._top + 160)
        figure_size = (self._total_width + 0.01) / _DPI, (self._total_height + 0.01) / _DPI
        self.figure = Figure(figsize=figure_size, dpi=_DPI)
        self._drawn: dict[int, ScalarMappable] = {}
        if title:
            self.figure.text(0.5, 1 - self._top / 2 / self._total_height, title, fontsize=12, ha="center", va="center")

    def draw(self, index: int, picture: _Array, colours: Colormap | None, most: float, title: str) -> None:
        row, column = divmod(index, self._columns)
        left, top = column * self._step_right, self._top + row * self._step_down + self._band
        axes = self._axes(left, top, self.width, self.height)
        self._drawn[index] = axes.imshow(
            picture, cmap=colours, norm=Normalize(0.0, most), interpolation=self._interpolation, aspect="auto"
        )
        axes.set_axis_off()
        if self._band:
            middle = (left + self.width / 2) / self._total_width, 1 - (top - self._band / 2) / self._total_height
            # As large as fits above the panel.
            font_size = min(12.0, 1.6 * self.width / max(len(title), 1) * 72 / _DPI)
            self.figure.text(*middle, title, fontsize=font_size, ha="center", va="center")

    def bar(self, number: int, index: int, label: str, goes_on: bool) -> None:
        """The scale of a panel, as the bar of this number; with an arrow where some values lie above the scale."""
        left, top = self._bars_left + number * _BAR_ROOM, self._top + self._band + 8
        axes = self._axes(left, top, _BAR_WIDTH, self._total_height - top - 8)
        bar = self.figure.colorbar(
            self._drawn[index], cax=axes, extend="max" if goes_on else "neither", extendfrac=0.03
        )
        bar.set_label(label, fontsize=11)
        bar.ax.tick_params(labelsize=10)

    def _axes(self, left: float, top: float, width: float, height: float) -> Axes:
        bottom = self._total_height - top - height
        return self.figure.add_axes(
            (
                left / self._total_width,
                bottom / self._total_height,
                width / self._total_width,
                height / self._total_height,
            )
        )
