"""Several recipes at an equal budget: the same data, steps and seeds, so that only the network differs.

The output folder holds

    comparison.md, .json, .csv and .tex, trade_off.png and .pdf    rewritten after every run
    <recipe>/seed<k>/                                a run folder as `lineara fit` leaves it, and in it
        settings.json       what the run was begun with
        output.txt          what its last start wrote
        measured/           step times of every start, and the numbers of the test
        result.json         only there once the run is finished and tested
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from lineara.runs.comparison_report import Row, write_report
from lineara.runs.files import write_text
from lineara.runs.parser_errors import did_you_mean
from lineara.runs.run_cost import collect
from lineara.runs.run_folder import folder_lock
from lineara.runs.training import TrainingCommand, flat_settings

_RECIPES = Path("recipes")
# A run has a process of its own: its peak memory is its own, and what ends it leaves the others alone. The thread ends
# it together with the process that started it, whose end of the pipe then closes.
_RUN = """
import os, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
from lineara.cli import main
words = sys.argv[1:]
sys.exit(main(["fit", *words, "--ckpt_path", "last"]) or main(["test", *words]))
"""
# What belongs to one start, or is what is compared.
_NOT_BUDGET = ("config", "run_dir", "seed_everything", "checkpoint.dirpath")
_NETWORK = "model.init_args.network"

_Settings = dict[str, Any]


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or the name of a file in a folder of recipes/, such as `listops_softmax`.

    Raises:
        FileNotFoundError: if there is none; it names those in recipes/.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(_RECIPES.glob("*/*.yaml"))}
    if name not in known:
        near = did_you_mean(name, known)
        there = f"there are: {', '.join(known) or 'none (the current folder holds no recipes)'}"
        raise FileNotFoundError(
            f"a recipe must be a file, or the name of one in {_RECIPES}/, got {name!r}{near or f'; {there}'}"
        )
    return known[name]


def compare(
    recipes: Sequence[Path | str],
    *,
    seeds: Sequence[int],
    output: Path | str,
    overrides: Sequence[str] = (),
    progress: Callable[[str], object] | None = None,
) -> list[Row]:
    """Train and test every recipe with every seed, and write the report after every run.

    A run that was interrupted goes on where it stopped; one that is finished is not run again. A run that fails does
    not keep the others from happening.

    Args:
        recipes: files that differ in the network alone (and in run_dir and seed_everything, which are not used).
        seeds: numbers for the run's `seed_everything`.
        output: folder of the runs and of the report.
        overrides: settings for all recipes, as `KEY=VALUE` with a recipe's keys, such as `trainer.max_steps=100`.
        progress: called with one line of text before and after each run.

    Returns:
        One row per recipe, in the order of the recipes, with its results and its failures by seed.

    Raises:
        ValueError: for no recipe or seed, one given twice, recipes of different budgets, or runs in `output` that were
            begun with other settings or that another process is writing.
    """
    paths, output, report = [Path(path) for path in recipes], Path(output), progress or (lambda line: None)
    _check_names("recipes", [path.stem for path in paths])
    _check_names("seeds", list(seeds))
    _check_overrides(overrides)
    settings = {path.stem: _read_settings(path, overrides) for path in paths}
    _check_equal_budget(settings)
    rows = [Row(path.stem, tuple(seeds), settings[path.stem]) for path in paths]
    with _locked_output(output):
        for row in rows:
            for seed in seeds:
                _check_begun_with(_run_dir(output, row.recipe, seed), row.settings)
            row.results.update(_finished(output, row))
        write_report(rows, output)
        # Seeds outermost: every recipe has a first number early.
        for seed in seeds:
            for path, row in zip(paths, rows):
                if seed in row.results:
                    report(f"{row.recipe}, seed {seed}: done before")
                    continue
                _complete(row, path, seed, output, overrides, report)
                write_report(rows, output)
    return rows


def _check_names(what: str, names: Sequence[object]) -> None:
    if not names:
        raise ValueError(f"{what} must name at least one, got none")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{what} must differ from each other, got {twice} twice; a run's folder bears its name")


def _check_overrides(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise ValueError(f"an override must be KEY=VALUE, such as trainer.max_steps=100, got {override!r}")
        if key in ("seed_everything", "run_dir", "config"):
            raise ValueError(f"an override must be of a recipe's settings, got {key}; use --seeds and --output")


def _words(recipe: Path, overrides: Sequence[str]) -> list[str]:
    return ["--config", str(recipe), *(f"--{override}" for override in overrides)]


def _read_settings(recipe: Path, overrides: Sequence[str]) -> _Settings:
    """Every setting of a recipe by its path, without what belongs to one start of it."""
    try:
        if not recipe.read_bytes().strip():
            raise ValueError("a recipe must hold settings, got an empty file")
        words = [*_words(recipe, overrides), "--seed_everything=false"]
        config = TrainingCommand(words, run=False, instantiate=False).config
    except ValueError as error:
        raise ValueError(f"{recipe}: {str(error).removeprefix(': ')}") from error
    except OSError as error:
        raise type(error)(f"{recipe} must be a recipe that can be read, got {error.strerror or error}") from error
    # By way of JSON, so that what is read back from a file can be compared with it.
    flat = json.loads(json.dumps(flat_settings(config.as_dict()), default=str))
    settings = {key.removeprefix("."): value for key, value in flat.items()}
    monitor = settings["checkpoint.monitor"]
    if not str(monitor).startswith("val"):
        raise ValueError(f"{recipe}: checkpoint.monitor must name a score of the validation, val/<name>, got {monitor}")
    return {key: value for key, value in settings.items() if key not in _NOT_BUDGET}


def _check_equal_budget(settings: Mapping[str, _Settings]) -> None:
    """Raise unless the recipes differ in nothing but their networks."""
    (first, ours), *others = settings.items()
    for other, theirs in others:
        difference = _first_difference(ours, theirs, ignore=_NETWORK)
        if difference:
            key, one, two = difference
            raise ValueError(
                f"recipes must have the same budget, got {key} {one} in {first} and {two} in {other}; set it for all, "
                f"such as by --override {key}={one}"
            )


def _check_begun_with(run_dir: Path, settings: _Settings) -> None:
    """Raise if the folder holds a run of other settings: its numbers would be mixed with new ones."""
    path = run_dir / "settings.json"
    # A run that never came to a checkpoint, such as one whose recipe was wrong, begins anew.
    if not path.exists() or not any((run_dir / name).exists() for name in ("checkpoints", "result.json")):
        return
    difference = _first_difference(_read_json(path), settings)
    if difference:
        key, one, two = difference
        raise ValueError(
            f"{run_dir} must be a run of the recipe as it is now, got {key} {two} but it was begun with {one}; "
            f"name another --output, or remove the folder"
        )


def _first_difference(one: _Settings, two: _Settings, ignore: str | None = None) -> tuple[str, str, str] | None:
    for key in one | two:
        ignored = ignore is not None and (key == ignore or key.startswith(f"{ignore}."))
        if not ignored and one.get(key, "not set") != two.get(key, "not set"):
            return key, str(one.get(key, "not set")), str(two.get(key, "not set"))
    return None


@contextmanager
def _locked_output(output: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(output))
        except ValueError as error:
            raise ValueError(
                f"output must be a folder that no other `lineara compare` is writing to, got {output}; wait for it, or "
                "name another folder by --output"
            ) from error
        except OSError as error:
            raise type(error)(
                f"output must be a folder that can be written to, got {output} ({error.strerror}); name another one by "
                "--output"
            ) from error
        yield


def _run_dir(output: Path, recipe: str, seed: int) -> Path:
    return output / recipe / f"seed{seed}"


def _finished(output: Path, row: Row) -> dict[int, dict[str, Any]]:
    """The results that are there, by seed."""
    results: dict[int, dict[str, Any]] = {}
    for seed in row.seeds:
        path = _run_dir(output, row.recipe, seed) / "result.json"
        if path.exists():
            results[seed] = _read_json(path)
    return results


def _complete(
    row: Row, path: Path, seed: int, output: Path, overrides: Sequence[str], report: Callable[[str], object]
) -> None:
    """Run one seed of a row, and put its result or its reason into the row."""
    run_dir = _run_dir(output, row.recipe, seed)
    report(f"{row.recipe}, seed {seed}: runs; what it writes: {run_dir / 'output.txt'}")
    reason = _run(path, seed, run_dir, row, overrides)
    if reason is None:
        row.results.update(_finished(output, row))
        report(f"{row.recipe}, seed {seed}: {row.describe(seed)}")
    else:
        row.failures[seed] = reason
        report(f"{row.recipe}, seed {seed}: failed: {reason}")


def _run(recipe: Path, seed: int, run_dir: Path, row: Row, overrides: Sequence[str]) -> str | None:
    """Train and test in a process of its own and keep the result; returns the reason of a run that fails."""
    write_text(run_dir / "settings.json", json.dumps(row.settings, indent=1) + "\n")
    words = [
        *_words(recipe, overrides),
        f"--seed_everything={seed}",
        f"--run_dir={run_dir}",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=lineara.runs.run_cost.RunCost",
    ]
    log = run_dir / "output.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *words],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        try:
            status = process.wait()
        finally:
            process.kill()  # does nothing to one that has ended; safe at any moment: files are written whole
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
    if status != 0:
        return _reason(log, status)
    result = {"recipe": row.recipe, "seed": seed, **collect(run_dir), "settings": dict(row.settings)}
    if row.score_name not in result["metrics"]:
        return (
            f"its test must log {row.score_name}, got {', '.join(result['metrics'])}; log it, or set "
            "checkpoint.monitor to a score that it logs"
        )
    write_text(run_dir / "result.json", json.dumps(result, indent=1) + "\n")
    return None


def _reason(log: Path, status: int) -> str:
    """Why a run failed, in one sentence: its own, or the last line that it wrote."""
    if status < 0:
        return f"its process was ended by signal {-status}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()] or ["it wrote nothing"]
    return said[-1].removeprefix("lineara: error: ")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} must be a file of `lineara compare`, got {error}; remove the folder {path.parent}"
        ) from error
