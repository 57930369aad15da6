"""What attention costs against the number of positions, from measured costs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

_Row = Mapping[str, Any]
_Array = npt.NDArray[np.float64]

_FIELDS = ("attention", "positions", "backward", "seconds", "peak_bytes")
# Name, colour and mark, in the order of the legend. The colours are Okabe and Ito's, which the colour-blind tell apart.
_STYLES = {
    "efficient": ("efficient", "#0072B2", "o"),
    "efficient-reference": ("efficient, reference", "#56B4E9", "s"),
    "plain": ("efficient, plain composition", "#009E73", "^"),
    "einsum": ("efficient, einsum form", "#CC79A7", "v"),
    "softmax": ("dot-product", "#D55E00", "D"),
}
_OTHER_STYLES = (
    ("#444444", "P"),
    ("#6A3D9A", "X"),
    ("#999999", "<"),
    ("#8C564B", ">"),
    ("#17BECF", "p"),
    ("#F0E442", "h"),
    ("#B15928", "*"),
)
_QUANTITIES = (("seconds", 1e3, "time (ms)"), ("peak_bytes", 1e-6, "peak memory beyond the inputs (MB)"))
# A slope is fitted to so many of the longest lengths.
_FITTED_POINTS = 3


def read_costs(path: Path) -> list[dict[str, Any]]:
    """The rows of a file written by `lineara bench cost`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file of something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be a file of measured costs, got no such file; measure with `lineara bench cost`"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path} must be a file written by `lineara bench cost`, got {error}") from error


def cost_curves(rows: Sequence[_Row]) -> Figure:
    """Draw time and peak memory against the number of positions, both axes logarithmic.

    Above: time; below: peak memory. Left: forward; right: forward and backward. A column without rows and a line of
    panels without values are left out.
    Beside every line stands the power of the number of positions N that its last three points grow by.

    Args:
        rows: one mapping per measured case: `attention` (a name), `positions`, `backward` (a boolean), `seconds` and
            `peak_bytes`; further keys are ignored. None, or what is not positive, leaves a gap.

    Returns:
        A figure of up to four panels, with one line per attention in each.

    Raises:
        ValueError: for no rows, a row without one of the keys, or two rows of one case.
    """
    _check_rows(rows)
    passes = sorted({bool(row["backward"]) for row in rows})
    names = {str(row["attention"]) for row in rows}
    attentions = [*(name for name in _STYLES if name in names), *sorted(names - set(_STYLES))]
    quantities = [one for one in _QUANTITIES if any(row[one[0]] is not None and row[one[0]] > 0 for row in rows)]
    figure = Figure(figsize=(4.6 * len(passes) + 1.4, 4.1 * len(quantities)), dpi=100, layout="constrained")
    panels = figure.subplots(len(quantities), len(passes), squeeze=False, sharex=True, sharey="row")
    styles = _styles(attentions)
    for (field, factor, label), line_of_panels in zip(quantities, panels):
        for backward, axes in zip(passes, line_of_panels):
            for attention in attentions:
                chosen = [row for row in rows if row["attention"] == attention and bool(row["backward"]) == backward]
                _draw_line(axes, styles[attention], *_points(chosen, field, factor))
        line_of_panels[0].set_ylabel(label, fontsize=12)
    for backward, axes in zip(passes, panels[0]):
        axes.set_title("forward + backward" if backward else "forward", fontsize=13)
    for axes in panels.flat:
        _set_scales(axes, sorted({int(row["positions"]) for row in rows}))
    for axes in panels.flat:  # all limits are known now
        _write_slopes(axes)
    for axes in panels[-1]:
        axes.set_xlabel("positions N", fontsize=12)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=1 + len(passes),
        fontsize=11,
        title="$N^p$: growth over the last three lengths",
        frameon=False,
    )
    figure.align_ylabels(panels[:, 0])
    return figure


def _check_rows(rows: Sequence[_Row]) -> None:
    if not rows:
        raise ValueError("rows must hold at least one measured case, got none")
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        missing = [field for field in _FIELDS if field not in row]
        if missing:
            raise ValueError(f"rows must have the keys {', '.join(_FIELDS)}, got one without {', '.join(missing)}")
        case = (row["attention"], row["positions"], bool(row["backward"]))
        if case in seen:
            raise ValueError(f"rows must be of different cases, got two of {case}; draw one setting at a time")
        seen.add(case)


def _points(rows: Sequence[_Row], field: str, factor: float) -> tuple[_Array, _Array]:
    """Positions in rising order, and the values, NaN where there is none that a logarithmic axis can show."""
    rows = sorted(rows, key=lambda row: row["positions"])
    values = [row[field] * factor if row[field] is not None and row[field] > 0 else np.nan for row in rows]
    return np.array([row["positions"] for row in rows], dtype=np.float64), np.array(values, dtype=np.float64)


def _styles(attentions: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Name, colour and mark of each: its own, or those of the others in turn."""
    others = (name for name in attentions if name not in _STYLES)
    return _STYLES | {name: (name, *_OTHER_STYLES[i % len(_OTHER_STYLES)]) for i, name in enumerate(others)}


def _draw_line(axes: Axes, style: tuple[str, str, str], positions: _Array, values: _Array) -> None:
    label, color, marker = style
    axes.plot(positions, values, color=color, marker=marker, markersize=6, linewidth=2, label=label)


def _set_scales(axes: Axes, positions: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(positions[:: -(-len(positions) // 7)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(positions[0] / 1.3, positions[-1] * 2.8)  # room for the slopes
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.12g}"))
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)


def _write_slopes(axes: Axes) -> None:
    """The fitted power of N beside the end of every line; those that end at one length are moved apart."""
    bottom, top = np.log10(axes.get_ylim())
    gap = (top - bottom) / 14
    ends: dict[float, list[tuple[float, float, Line2D]]] = {}
    for line in axes.lines:
        positions, values = (np.asarray(data, dtype=np.float64) for data in line.get_data())
        shown = np.isfinite(values)
        if shown.sum() >= 2:
            x, y = np.log10(positions[shown]), np.log10(values[shown])
            slope = np.polyfit(x[-_FITTED_POINTS:], y[-_FITTED_POINTS:], 1)[0]
            ends.setdefault(positions[shown][-1], []).append((y[-1], slope, line))
    for position, lines in ends.items():
        lines.sort(key=lambda end: end[0])
        heights = _spread([height for height, _, _ in lines], gap)
        for height, (_, slope, line) in zip(heights, lines):
            axes.annotate(
                f"$N^{{{slope:.2f}}}$",
                (position, 10**height),
                xytext=(7, 0),
                textcoords="offset points",
                verticalalignment="center",
                annotation_clip=False,
                fontsize=11,
                color=line.get_color(),
            )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved apart to at least the gap, and as a whole by nothing."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + gap) if moved else height)
    excess = float(np.mean(moved) - np.mean(heights))
    return [height - excess for height in moved]
