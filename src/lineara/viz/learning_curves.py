"""Loss and accuracy of a training run over its steps, from the files that the run writes."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Metrics = Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
_Points = dict[str, dict[int, float]]  # metric -> step -> value

_TRAINING, _VALIDATION, _TRIVIAL = "#E69F00", "#0072B2", "#444444"
_TRIVIAL_PREFIX = "val/accuracy_of_"
# Training values are averaged over this share of the run.
_SMOOTHED_SHARE = 0.05


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
    """Draw loss and accuracy against the optimiser's steps.

    Training values are drawn faintly, and boldly their mean over a twentieth of the run; validation values have a mark
    each, and the best one is named. Dashed lines are the accuracies of trivial answers, which need no attention.

    Args:
        metrics: from `read_metrics`: `"train/loss"`, `"val/loss"`, `"train/accuracy"`, `"val/accuracy"` (fractions) and
            any `"val/accuracy_of_<answer>"`, of which the last value counts. Others are ignored, missing ones left out.
        title: above the panels.

    Returns:
        A figure of two panels, loss and accuracy.

    Raises:
        ValueError: if there is nothing to draw.
    """
    if not any(f"{stage}/{name}" in metrics for stage in ("train", "val") for name in ("loss", "accuracy")):
        raise ValueError(f"metrics must hold a loss or an accuracy of train or val, got {', '.join(metrics) or 'none'}")
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13)
    for name, best, axes in zip(("loss", "accuracy"), (np.nanargmin, np.nanargmax), figure.subplots(1, 2)):
        _draw_training(axes, metrics, f"train/{name}")
        _draw_validation(axes, metrics, f"val/{name}", best)
        if name == "accuracy":
            _draw_trivial_answers(axes, metrics)
        _finish(axes, name)
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
            step = _number(row["step"], int, f"{where}, step")
            for name in points:
                if row[name]:
                    points[name][step] = _number(row[name], float, f"{where}, {name}")
    return points


def _number[T: (int, float)](text: str, kind: Callable[[str], T], where: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}: must be a number, got {text!r}; correct or remove the line") from None
