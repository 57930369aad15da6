"""The report of a comparison, by made-up results whose means and spreads are known."""

import csv
import json

import pytest

from lineara.runs.comparison_report import Row, comparison_table, write_report

SETTINGS = {
    "checkpoint.monitor": "val/accuracy",
    "checkpoint.mode": "max",
    "trainer.max_steps": 26,
    "data.init_args.batch_size": 20,
}


def result(accuracy, seconds, peak_bytes, **changes):
    return {
        "metrics": {
            "test/accuracy": accuracy,
            "test/accuracy_of_majority_class": 0.17,
            "test/loss": 2 * accuracy,
        },
        "seconds_per_step": seconds,
        "peak_bytes": peak_bytes,
        "memory": "growth of resident memory during fit",
        "best_validation_score": accuracy + 0.01,
        "num_parameters": 1234567,
        "device": "CPU",
        "versions": {"torch": "2.0"},
    } | changes


def rows(**settings):
    settings = SETTINGS | settings
    return [
        Row(
            "efficient",
            (0, 1, 2),
            settings,
            # Deviations of -0.02, 0.00 and 0.02 from the mean: a sample standard deviation of 0.02.
            {0: result(0.38, 0.002, 10e6), 1: result(0.40, 0.009, 13e6), 2: result(0.42, 0.003, 11e6)},
        ),
        Row("softmax", (0, 1, 2), settings, {1: result(0.375, None, 2345.6e6)}, {2: "the disk is full"}),
        Row("never", (0, 1, 2), settings),
        Row("broken", (0, 1, 2), settings, failures={0: "dim must be even"}),
    ]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_holds_means_spreads_medians_and_maxima():
    lines = comparison_table(rows()).splitlines()
    table = [cells(line) for line in lines[:6] if not line.startswith("|:")]
    assert table == [
        ["recipe", "test/accuracy", "of majority_class", "ms per step", "peak memory, MB", "parameters", "seeds done"],
        ["efficient", "0.4000 +- 0.0200 (n = 3)", "0.1700", "3.00", "13.0", "1,234,567", "3 of 3"],
        ["softmax", "0.3750 (n = 1)", "0.1700", "", "2,345.6", "1,234,567", "1 of 3, 1 failed"],
        ["never", "not yet run", "", "", "", "", "0 of 3"],
        ["broken", "failed", "", "", "", "", "0 of 3, 1 failed"],
    ]
    assert len({len(line) for line in lines[:6]}) == 1


def test_the_notes_say_what_was_measured_and_what_failed():
    text = comparison_table(rows())
    for words in (
        "test/accuracy (higher is better): of the checkpoint that val/accuracy chooses",
        "sample standard deviation",
        "Peak memory: growth of resident memory during fit;",
        "max_steps 26, batch_size 20",
        "Measured on: CPU; torch 2.0.",
        "- Failed: softmax, seed 2: the disk is full",
        "- Failed: broken, seed 0: dim must be even",
    ):
        assert words in text


def test_results_of_several_devices_are_said_to_be():
    one = rows()[:1]
    one[0].results[1]["device"] = "H200"
    assert "Measured on: CPU and H200;" in comparison_table(one)


def test_the_score_is_what_the_checkpoint_is_chosen_by():
    lower = rows(**{"checkpoint.monitor": "val/loss", "checkpoint.mode": "min"})
    assert lower[0].score == pytest.approx(0.8)
    assert lower[0].spread == pytest.approx(0.04)
    text = comparison_table(lower)
    assert "| recipe    |                test/loss |" in text
    assert "test/loss (lower is better)" in text
    assert "majority_class" not in text


def test_one_run_is_described_in_a_line():
    efficient, softmax, *_ = rows()
    assert efficient.describe(1) == "test/accuracy 0.4000, 9.00 ms per step, peak 13.0 MB"
    assert softmax.describe(1) == "test/accuracy 0.3750, peak 2,345.6 MB"


TABLES = [f"comparison.{end}" for end in ("csv", "json", "md", "tex")]


def test_rows_are_written_for_spreadsheets_and_papers(tmp_path):
    write_report(rows(), tmp_path)
    lines = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [(line["recipe"], line["seed"], line["test/accuracy"]) for line in lines[:3]] == [
        ("efficient", "0", "0.38"),
        ("efficient", "1", "0.4"),
        ("efficient", "2", "0.42"),
    ]
    assert [line["failure"] for line in lines if line["failure"]] == ["the disk is full", "dim must be even"]
    text = (tmp_path / "comparison.tex").read_text()
    assert f"efficient & 0.4000 $\\pm$ {0.02 / 3**0.5:.4f} & 3.00 & 13.0 & 1,234,567 \\\\" in text
    named = rows()
    named[0].recipe = "a_b&c%"
    write_report(named, tmp_path)
    assert r"a\_b\&c\% & " in (tmp_path / "comparison.tex").read_text()


def test_files_and_pictures_are_written(tmp_path):
    write_report(rows(), tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [*TABLES, "trade_off.pdf", "trade_off.png"]
    assert (tmp_path / "trade_off.pdf").read_bytes().startswith(b"%PDF")
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert (written["score"], written["lower_is_better"], written["seeds"]) == ("test/accuracy", False, [0, 1, 2])
    first, second, third, fourth = written["recipes"]
    assert first["score"] == pytest.approx(0.4)
    assert first["spread"] == pytest.approx(0.02)
    assert first["scores"] == {"0": 0.38, "1": 0.40, "2": 0.42}
    assert (first["seconds"], first["peak_bytes"], first["num_parameters"]) == (0.003, 13e6, 1234567)
    assert second["spread"] is None
    assert second["failures"] == {"2": "the disk is full"}
    assert third["score"] is None
    assert fourth["failures"] == {"0": "dim must be even"}


def test_without_a_finished_run_there_is_no_picture(tmp_path):
    write_report(rows()[2:], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == TABLES
