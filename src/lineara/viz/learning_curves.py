"""Loss and score of a training run over its steps, from the files that the run writes."""

import csv
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Metrics = Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
_Points = dict[str, dict[int, float]]  # metric -> step -> value

_TRAINING, _VALIDATION, _TRIVIAL = "#E69F00", "#0072B2", "#444444"
_TRIVIAL_PREFIX = "val/accuracy_of_"
# What tasks log as their score; the first that a run has is drawn.
_SCORES = {"accuracy": "accuracy", "mask_ap": "mask AP", "epe": "end-point error (px)"}
_LOWER_IS_BETTER = ("loss", "epe")
# Training values are averaged over this share of the run.
_SMOOTHED_SHARE = 0.1


def read_metrics(run_dir: Path | str) -> dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]:
    """Read every number that a run has logged.

    A run that was interrupted and resumed has several files, `<run_dir>/metrics/version_<n>/metrics.csv`. From its
    first step on, a later one replaces what earlier ones say.

    Args:
        run_dir: the run's folder, as given to `lineara fit --run_dir`.

    Returns:
        For every metric that has values, such as `"val/loss"`, its steps (rising) and its values, both (points,).

    Raises:
        FileNotFoundError: for a folder without such a file.
        ValueError: for a file with other content; it names the file and the line.
    """
    folder = Path(run_dir) / "metrics"
    versions = [path for path in folder.glob("version_*/metrics.csv") if _version(path).isdecimal()]
    if not versions:
        raise FileNotFoundError(
            f"{folder} must hold version_<n>/metrics.csv, got no such file; name the folder of a run of `lineara fit`"
        )
    merged: _Points = {}
    for path in sorted(versions, key=lambda path: int(_version(path))):
        later = _read_csv(path)
        first = min((step for points in later.values() for step in points), default=None)
        if first is not None:
            merged = {name: {s: v for s, v in points.items() if s < first} for name, points in merged.items()}
        for name, points in later.items():
            merged.setdefault(name, {}).update(points)
    return {name: _as_arrays(points) for name, points in merged.items() if points}


def learning_curves(metrics: Metrics, *, title: str = "") -> Figure:
    """Draw loss and score against the optimiser's steps: accuracy, mask AP or end-point error.

    Training values are drawn faintly, and boldly their mean over a tenth of the run; validation values have a mark
    each, and the best one is named. Dashed lines are the accuracies of trivial answers, which need no attention.

    Args:
        metrics: from `read_metrics`: `"train/loss"`, `"val/loss"`, `"train/accuracy"`, `"val/accuracy"` or
            `"val/mask_ap"` (fractions) or `"val/epe"` (pixels), and any `"val/accuracy_of_<answer>"`, of which the last
            value counts. Others are ignored, missing ones left out.
        title: above the panels.

    Returns:
        A figure of two panels, loss and score.

    Raises:
        ValueError: if there is nothing to draw.
    """
    logged = [name for name in ("loss", *_SCORES) if f"train/{name}" in metrics or f"val/{name}" in metrics]
    if not logged:
        raise ValueError(f"metrics must hold a loss or a score of train or val, got {', '.join(metrics) or 'none'}")
    score = next((name for name in logged if name in _SCORES), "accuracy")
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    panels = figure.subplots(1, 2)
    for axes, name in zip(panels, ("loss", score)):
        if f"train/{name}" in metrics:
            _draw_training(axes, *metrics[f"train/{name}"])
        if f"val/{name}" in metrics:
            _draw_validation(axes, *metrics[f"val/{name}"], best_is_highest=name not in _LOWER_IS_BETTER)
        axes.set_xlabel("optimiser step", fontsize=11)
        axes.set_title(_SCORES.get(name, name), fontsize=12)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    _draw_trivial_answers(panels[1], metrics)
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize=10, framealpha=0.85, edgecolor="none")
    return figure


def _version(path: Path) -> str:
    return path.parent.name.removeprefix("version_")


def _read_csv(path: Path) -> _Points:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        names = next(reader, [])
        if "step" not in names:
            raise ValueError(f"{path}, line 1: the columns must include step, got {', '.join(names) or 'none'}")
        points: _Points = {name: {} for name in names if name not in ("epoch", "step")}
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(names):
                raise ValueError(f"{where}: must have {len(names)} cells, got {len(cells)}; correct or remove the line")
            row = dict(zip(names, cells))
            try:
                step = int(row["step"])
                for name in points:
                    if row[name]:
                        points[name][step] = float(row[name])
            except ValueError:
                raise ValueError(
                    f"{where}: cells must be numbers or empty, got {','.join(cells)!r}; correct or remove the line"
                ) from None
    return points


def _as_arrays(points: dict[int, float]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    steps = sorted(points)
    return np.array(steps, dtype=np.int64), np.array([points[step] for step in steps], dtype=np.float64)


def _draw_training(axes: Axes, steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
    axes.plot(steps, values, color=_TRAINING, alpha=0.35, linewidth=0.9)
    axes.plot(steps, smoothed(values), color=_TRAINING, linewidth=2, label="training, averaged")


def _draw_validation(
    axes: Axes, steps: npt.NDArray[np.int64], values: npt.NDArray[np.float64], *, best_is_highest: bool
) -> None:
    label = "validation"
    if np.isfinite(values).any():
        best = int(np.nanargmax(values) if best_is_highest else np.nanargmin(values))
        label += f", best {values[best]:.3f} at step {steps[best]:,}"
    axes.plot(steps, values, color=_VALIDATION, linewidth=2, marker="o", markersize=4.5, label=label)


def _draw_trivial_answers(axes: Axes, metrics: Metrics) -> None:
    """A dashed line each, with its name beside it, right of the panel."""
    for name, (_, values) in metrics.items():
        if name.startswith(_TRIVIAL_PREFIX):
            answer = name.removeprefix(_TRIVIAL_PREFIX).replace("_", " ")
            axes.axhline(values[-1], color=_TRIVIAL, linewidth=1.2, linestyle="--")
            axes.annotate(
                f"{answer}\nalone: {values[-1]:.3f}",
                (1, values[-1]),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
                fontsize=10,
                color=_TRIVIAL,
            )


def smoothed(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The centred mean over `_SMOOTHED_SHARE` of the values; over fewer where the window reaches beyond an end."""
    reach = int(len(values) * _SMOOTHED_SHARE / 2)
    window = np.ones(2 * reach + 1)
    # Not mode="same", whose length is the window's where that is the longer one.
    total, count = (np.convolve(x, window)[reach : reach + len(values)] for x in (values, np.ones_like(values)))
    return total / count
