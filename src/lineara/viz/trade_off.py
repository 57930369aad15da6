"""What several networks reach against what they cost."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_Row = Mapping[str, Any]

_FIELDS = ("recipe", "score", "spread", "seconds", "peak_bytes")
# Okabe and Ito's colours, which the colour-blind tell apart; the marks tell the rows apart in grey.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
_MARKERS = ("o", "D", "^", "s", "v", "P", "X", "<", ">", "*", "p")
_COSTS = (("seconds", 1e3, "time per training step (ms)"), ("peak_bytes", 1e-6, "peak memory of the training (MB)"))
_INCHES_PER_LABEL = 0.3


def trade_off(rows: Sequence[_Row], *, score_label: str) -> Figure:
    """Draw the score against the time of a training step, and beside it against the peak memory.

    Each row has its own mark and colour, and its name stands at the right, at the height of its score.

    Args:
        rows: one mapping per network: `recipe` (its name), `score`, `spread` (drawn as an error bar to both sides;
            None draws none), `seconds` and `peak_bytes`; further keys are ignored.
        score_label: of the vertical axis.

    Returns:
        A figure of two panels.

    Raises:
        ValueError: for no rows, a row without one of the keys, or two rows of one name.
    """
    _check_rows(rows)
    height = max(4.2, 1.6 + _INCHES_PER_LABEL * len(rows))
    figure = Figure(figsize=(11, height), dpi=100, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (field, factor, label) in zip(panels, _COSTS):
        for index, row in enumerate(rows):
            axes.errorbar(
                row[field] * factor,
                row["score"],
                yerr=row["spread"],
                **_style(index),
                markersize=9,
                markeredgecolor="white",
                elinewidth=1.6,
                capsize=4,
                zorder=3,
            )
        axes.set_xlim(0, 1.12 * factor * max(row[field] for row in rows) or 1)
        axes.set_xlabel(label, fontsize=12)
        axes.tick_params(labelsize=11)
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(score_label, fontsize=12)
    _write_names(panels[-1], rows, gap=_INCHES_PER_LABEL / (height - 1))
    return figure


def _check_rows(rows: Sequence[_Row]) -> None:
    if not rows:
        raise ValueError("rows must hold at least one network, got none")
    names: set[str] = set()
    for row in rows:
        missing = [field for field in _FIELDS if field not in row]
        if missing:
            raise ValueError(f"rows must have the keys {', '.join(_FIELDS)}, got one without {', '.join(missing)}")
        if row["recipe"] in names:
            raise ValueError(f"rows must be of different recipes, got two of {row['recipe']}")
        names.add(row["recipe"])


def _style(index: int) -> dict[str, Any]:
    return {"color": _COLORS[index % len(_COLORS)], "marker": _MARKERS[index % len(_MARKERS)]}


def _write_names(axes: Axes, rows: Sequence[_Row], *, gap: float) -> None:
    """Every name at the height of its score in the right margin, those too near to each other moved apart.

    `gap` is the distance between two names as a share of the panel's height.
    """
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    order = sorted(range(len(rows)), key=lambda index: rows[index]["score"])
    wanted = [(rows[index]["score"] - bottom) / (top - bottom) for index in order]
    for index, place in zip(order, _spread(wanted, gap)):
        axes.plot(1.06, place, **_style(index), markersize=8, clip_on=False, transform=axes.transAxes, linestyle="none")
        axes.annotate(
            rows[index]["recipe"],
            (1.09, place),
            xycoords="axes fraction",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=11,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Rising heights moved apart to at least the gap, as little as that takes, and into 0 to 1 where there is room."""
    # Less its share of gaps, a height must only not fall: neighbours that do take their mean.
    groups: list[list[float]] = []
    for index, height in enumerate(heights):
        groups.append([height - index * gap])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    levels = [fmean(group) for group in groups for _ in group]
    highest = max(0.0, 1 - (len(heights) - 1) * gap)
    return [min(max(level, 0.0), highest) + index * gap for index, level in enumerate(levels)]
