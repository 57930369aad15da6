"""The report of a comparison: tables, the same numbers for programs, and a picture of score against cost."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineara.runs.files import save_figure, write_text

_NOT_YET = "not yet run"
_BUDGET = ("trainer.max_steps", "data.init_args.batch_size")


@dataclass
class Row:
    """One recipe of a comparison.

    Args:
        recipe: its name.
        seeds: the seeds that it is to be run with.
        settings: its settings by their path; `checkpoint.monitor` and `checkpoint.mode` say what the score is.
        results: by seed, what `result.json` of a finished run holds.
        failures: by seed, the sentence of a run that failed.
    """

    recipe: str
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)

    @property
    def score_name(self) -> str:
        """The number of the test that belongs to the validation score that the best checkpoint is chosen by."""
        return str(self.settings["checkpoint.monitor"]).replace("val", "test", 1)

    @property
    def lower_is_better(self) -> bool:
        return self.settings["checkpoint.mode"] == "min"

    @property
    def scores(self) -> list[float]:
        """In the order of the seeds, of those that are done and measured it."""
        metrics = [self.results[seed]["metrics"] for seed in self.seeds if seed in self.results]
        return [values[self.score_name] for values in metrics if self.score_name in values]

    @property
    def score(self) -> float | None:
        """The mean over the seeds that are done."""
        return statistics.fmean(self.scores) if self.scores else None

    @property
    def spread(self) -> float | None:
        """The sample standard deviation over the seeds; None for fewer than two."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def trivial_scores(self) -> dict[str, float]:
        """What trivial answers reach, by their name: the numbers of the test named `<score>_of_<answer>`."""
        prefix = f"{self.score_name}_of_"
        values: dict[str, list[float]] = {}
        for result in self.results.values():
            for name, value in result["metrics"].items():
                if name.startswith(prefix):
                    values.setdefault(name.removeprefix(prefix), []).append(value)
        return {name: statistics.fmean(found) for name, found in values.items()}

    @property
    def seconds_per_step(self) -> float | None:
        """The median over the seeds of the median over their steps."""
        seconds = [result["seconds_per_step"] for result in self.results.values()]
        seconds = [value for value in seconds if value is not None]
        return statistics.median(seconds) if seconds else None

    @property
    def peak_bytes(self) -> int | None:
        """The largest over the seeds."""
        return max((result["peak_bytes"] for result in self.results.values()), default=None)

    @property
    def num_parameters(self) -> int | None:
        return next((result["num_parameters"] for result in self.results.values()), None)

    def describe(self, seed: int) -> str:
        """One finished run in a few words."""
        result = self.results[seed]
        seconds = result["seconds_per_step"]
        words = [f"{self.score_name} {_number(result['metrics'].get(self.score_name), 4)}"]
        words += [] if seconds is None else [f"{_number(seconds * 1e3, 2)} ms per step"]
        return ", ".join([*words, f"peak {_number(result['peak_bytes'] / 1e6, 1)} MB"])

    def as_dict(self) -> dict[str, Any]:
        """All that the report says of this recipe, for a file or `viz.trade_off`."""
        return {
            "recipe": self.recipe,
            "score": self.score,
            "spread": self.spread,
            "scores": {str(seed): self.results[seed]["metrics"].get(self.score_name) for seed in self._done},
            "trivial_scores": self.trivial_scores,
            "seconds": self.seconds_per_step,
            "peak_bytes": self.peak_bytes,
            "num_parameters": self.num_parameters,
            "best_validation_scores": {str(s): self.results[s]["best_validation_score"] for s in self._done},
            "failures": {str(seed): sentence for seed, sentence in self.failures.items()},
        }

    @property
    def _done(self) -> list[int]:
        return [seed for seed in self.seeds if seed in self.results]


def write_report(rows: Sequence[Row], output: Path) -> None:
    """Write comparison.md, .json, .csv and .tex and, once there is something to draw, trade_off.png and .pdf."""
    from lineara.viz.trade_off import trade_off

    first = rows[0]
    content = {
        "score": first.score_name,
        "lower_is_better": first.lower_is_better,
        "seeds": first.seeds,
        "recipes": [row.as_dict() for row in rows],
    }
    write_text(output / "comparison.json", json.dumps(content, indent=1) + "\n")
    write_text(output / "comparison.md", comparison_table(rows) + "\n")
    write_text(output / "comparison.csv", _as_csv(rows))
    write_text(output / "comparison.tex", _as_latex(rows))
    drawn = [row.as_dict() for row in rows if row.score is not None and row.seconds_per_step is not None]
    if drawn:
        figure = trade_off(drawn, score_label=f"{first.score_name} ({_direction(first)})")
        for end in (".png", ".pdf"):
            save_figure(figure, output / f"trade_off{end}")


def comparison_table(rows: Sequence[Row]) -> str:
    """A table, aligned as text and valid as Markdown, one row per recipe; below it, what its columns are."""
    trivial = list(dict.fromkeys(name for row in rows for name in row.trivial_scores))
    header = ["recipe", rows[0].score_name, *(f"of {name}" for name in trivial)]
    lines = [[*header, "ms per step", "peak memory, MB", "parameters", "seeds done"]]
    for row in rows:
        seconds, peak = row.seconds_per_step, row.peak_bytes
        cells = [_score(row), *(_number(row.trivial_scores.get(name), 4) for name in trivial)]
        cells += [_number(seconds and seconds * 1e3, 2), _number(peak and peak / 1e6, 1)]
        cells += ["" if row.num_parameters is None else f"{row.num_parameters:,}", _seeds_done(row)]
        lines.append([row.recipe, *cells])
    return "\n".join([*_aligned(lines), "", *_notes(rows)])


def _as_csv(rows: Sequence[Row]) -> str:
    """A line for every seed of every recipe; empty where a run is not done."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ["recipe", "seed", rows[0].score_name, "seconds_per_step", "peak_bytes", "num_parameters", "failure"]
    )
    for row in rows:
        for seed in row.seeds:
            result = row.results.get(seed, {})
            score = result.get("metrics", {}).get(row.score_name)
            numbers = [result.get(name) for name in ("seconds_per_step", "peak_bytes", "num_parameters")]
            table.writerow([row.recipe, seed, score, *numbers, row.failures.get(seed)])
    return text.getvalue()


def _as_latex(rows: Sequence[Row]) -> str:
    """A table for the packages booktabs and amsmath; scores are means with their standard errors over the seeds."""
    lines = [r"\begin{tabular}{lrrrr}", r"\toprule"]
    lines += [rf"recipe & {_escaped(rows[0].score_name)} & ms per step & peak MB & parameters \\", r"\midrule"]
    for row in rows:
        score = "--" if row.score is None else f"{row.score:.4f}"
        error = "" if row.spread is None else rf" $\pm$ {row.spread / len(row.scores) ** 0.5:.4f}"
        seconds, peak = row.seconds_per_step, row.peak_bytes
        cells = [score + error, _number(seconds and seconds * 1e3, 2), _number(peak and peak / 1e6, 1)]
        cells.append("" if row.num_parameters is None else f"{row.num_parameters:,}")
        lines.append(" & ".join([_escaped(row.recipe), *(cell or "--" for cell in cells)]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for character in "\\&%$#_{}":
        text = text.replace(character, r"\textbackslash " if character == "\\" else f"\\{character}")
    return text


def _score(row: Row) -> str:
    if row.score is None:
        return "failed" if row.failures else _NOT_YET
    spread = "" if row.spread is None else f" +- {row.spread:.4f}"
    return f"{row.score:.4f}{spread} (n = {len(row.scores)})"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _seeds_done(row: Row) -> str:
    failed = f", {len(row.failures)} failed" if row.failures else ""
    return f"{len(row.results)} of {len(row.seeds)}{failed}"


def _direction(row: Row) -> str:
    return "lower is better" if row.lower_is_better else "higher is better"


def _notes(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    results = [result for row in rows for result in row.results.values()]
    budget = ", ".join(f"{key.split('.')[-1]} {first.settings[key]}" for key in _BUDGET if key in first.settings)
    notes = [
        f"- {first.score_name} ({_direction(first)}): of the checkpoint that {first.settings['checkpoint.monitor']} "
        "chooses; mean over n seeds +- sample standard deviation.",
        "- ms per step: the median over the training steps of a run, without validation and the loading of data and "
        "without the first 10 steps of a start; of that the median over the seeds.",
        f"- Peak memory: {_joined(result['memory'] for result in results) or 'of fit'}; the largest over the seeds.",
        f"- Same for all recipes: {budget}, and every other setting but the network.",
    ]
    if results:
        versions = _joined(", ".join(f"{n} {v}" for n, v in result["versions"].items()) for result in results)
        notes.append(f"- Measured on: {_joined(result['device'] for result in results)}; {versions}.")
    notes += [f"- Failed: {row.recipe}, seed {seed}: {why}" for row in rows for seed, why in row.failures.items()]
    return notes


def _joined(values: Any) -> str:
    return " and ".join(dict.fromkeys(values))


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [
        f"| {line[0].ljust(widths[0])} | " + " | ".join(c.rjust(w) for c, w in zip(line[1:], widths[1:])) + " |"
        for line in lines
    ]
    rule = f"|:{'-' * (widths[0] + 1)}|" + "|".join("-" * (width + 1) + ":" for width in widths[1:]) + "|"
    return [text[0], rule, *text[1:]]
