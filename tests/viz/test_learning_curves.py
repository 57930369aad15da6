import re

import numpy as np
import pytest

from lineara.viz import learning_curves, read_metrics

HEADER = "epoch,step,train/accuracy,train/loss,val/accuracy,val/accuracy_of_majority_class,val/loss"


def write(run_dir, version, *lines):
    folder = run_dir / "metrics" / f"version_{version}"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder / "metrics.csv"


def as_lists(metrics):
    return {name: (steps.tolist(), values.tolist()) for name, (steps, values) in metrics.items()}


# Reading


def test_empty_cells_are_no_values_and_metrics_without_values_are_left_out(tmp_path):
    write(tmp_path, 0, HEADER, "0,4,0.125,2.5,,,", "0,4,,,0.25,,2.25", "0,9,0.5,2.0,,,")
    metrics = read_metrics(tmp_path)
    assert as_lists(metrics) == {
        "train/accuracy": ([4, 9], [0.125, 0.5]),
        "train/loss": ([4, 9], [2.5, 2.0]),
        "val/accuracy": ([4], [0.25]),
        "val/loss": ([4], [2.25]),
    }
    steps, values = metrics["val/loss"]
    assert steps.dtype == np.int64
    assert values.dtype == np.float64


def test_a_resumed_run_replaces_what_came_after_the_point_it_went_on_from(tmp_path):
    train, val = "epoch,step,train/loss", "epoch,step,train/loss,val/loss"
    # As strings, 10 would come before 2.
    write(tmp_path, 10, train, "0,30,-3", "0,40,-4")
    write(tmp_path, 1, val, "0,10,1,", "0,15,,15", "0,20,2,", "0,30,3,", "0,35,,35", "0,50,5,")
    write(tmp_path, 2, train, "0,25,2.5", "0,35,3.5", "0,45,4.5")
    (tmp_path / "metrics" / "version_11").mkdir()  # started, but nothing logged yet
    write(tmp_path, 12, train)
    assert as_lists(read_metrics(str(tmp_path))) == {
        "train/loss": ([10, 20, 25, 30, 40], [1, 2, 2.5, -3, -4]),
        "val/loss": ([15], [15]),
    }


def test_other_folders_are_no_versions(tmp_path):
    write(tmp_path, 0, "step,train/loss", "1,2")
    write(tmp_path, "0_copy", "step,train/loss", "1,3")
    assert as_lists(read_metrics(tmp_path)) == {"train/loss": ([1], [2])}


@pytest.mark.parametrize("folder", ["metrics/version_0", "metrics", "."])
def test_a_missing_file_is_named(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'metrics'} must hold version_<n>/metrics.csv")):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("lines", "number", "sentence"),
    [
        ([""], 1, "the columns must include step, got none"),
        (["epoch,train/loss"], 1, "the columns must include step, got epoch, train/loss"),
        (["step,train/loss", "1,2", "2"], 3, "must have 2 cells, got 1; correct or remove the line"),
        (["step,train/loss", "1,2,3"], 2, "must have 2 cells, got 3; correct or remove the line"),
        (["step,train/loss", "1,2", "2,1", "3,1.2.3"], 4, "cells must be numbers or empty, got '3,1.2.3'"),
        (["step,train/loss", ",2"], 2, "cells must be numbers or empty, got ',2'"),
        (["step,train/loss", "1.5,2"], 2, "cells must be numbers or empty, got '1.5,2'"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path, lines, number, sentence):
    write(tmp_path, 0, "step,train/loss", "1,2")
    path = write(tmp_path, 3, *lines)
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {number}: {sentence}")):
        read_metrics(tmp_path)


# Drawing

STEPS = np.arange(1, 41) * 25
VAL_STEPS = np.array([250, 500, 750, 1000])
METRICS = {
    "train/loss": (STEPS, np.linspace(2.3, 1.1, 40)),
    "train/accuracy": (STEPS, np.linspace(0.1, 0.4, 40)),
    "val/loss": (VAL_STEPS, np.array([2.0, 1.6, 1.2, 1.3])),
    "val/accuracy": (VAL_STEPS, np.array([0.2, 0.35, 0.375, 0.36])),
    "val/accuracy_of_majority_class": (VAL_STEPS, np.array([0.9, 0.17, 0.17, 0.17])),
    "val/accuracy_of_root_operator": (VAL_STEPS, np.full(4, 0.361)),
    "lr": (STEPS, STEPS * 1e-6),
}


def lines_of(axes):
    return [tuple(np.asarray(data, dtype=float) for data in line.get_data()) for line in axes.lines]


def assert_line(line, steps, values):
    np.testing.assert_array_equal(line[0], steps)
    np.testing.assert_array_equal(line[1], values)


def test_both_panels_show_what_was_logged(tmp_path):
    figure = learning_curves(METRICS, title="a run")
    assert figure.get_suptitle() == "a run"
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    for axes in figure.axes:
        logged, smoothed, validation = lines_of(axes)[:3]
        name = axes.get_title()
        assert_line(logged, *METRICS[f"train/{name}"])
        assert_line(validation, *METRICS[f"val/{name}"])
        np.testing.assert_array_equal(smoothed[0], STEPS)
        assert axes.lines[0].get_alpha() < 1
        assert axes.lines[2].get_marker() == "o"
        assert axes.get_xlabel() == "optimiser step"
    figure.savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size < 300_000


def test_the_best_validation_is_named():
    loss, accuracy = learning_curves(METRICS).axes
    assert loss.lines[2].get_label() == "validation, best 1.200 at step 750"
    assert accuracy.lines[2].get_label() == "validation, best 0.375 at step 750"


def test_a_detectors_score_is_its_mask_ap():
    mask_ap = (VAL_STEPS, np.array([0.1, 0.4, 0.3, 0.2]))
    loss, score = learning_curves({"train/loss": METRICS["train/loss"], "val/mask_ap": mask_ap}).axes
    assert score.get_title() == "mask AP"
    assert_line(lines_of(score)[0], *mask_ap)
    assert score.lines[0].get_label() == "validation, best 0.400 at step 500"
    assert loss.get_title() == "loss"


def test_of_errors_in_pixels_the_lowest_is_the_best():
    errors = (VAL_STEPS, np.array([8.0, 3.0, 4.0, 5.0]))
    _, score = learning_curves({"train/epe": METRICS["train/loss"], "val/epe": errors}).axes
    assert score.get_title() == "end-point error (px)"
    assert score.lines[2].get_label() == "validation, best 3.000 at step 500"


def test_trivial_answers_are_dashed_labelled_lines_beside_the_accuracy_only():
    loss, accuracy = learning_curves(METRICS).axes
    assert len(loss.lines) == 3
    assert [(line.get_ydata()[0], line.get_linestyle()) for line in accuracy.lines[3:]] == [(0.17, "--"), (0.361, "--")]
    labels = {text.get_text(): text.xy for text in accuracy.texts}
    assert labels == {"majority class\nalone: 0.170": (1, 0.17), "root operator\nalone: 0.361": (1, 0.361)}


def test_smoothing_is_a_centred_mean_over_a_tenth_of_the_run():
    noise = np.random.default_rng(0).standard_normal(40)
    (_, (_, smoothed), *_), _ = (
        lines_of(axes) for axes in learning_curves(METRICS | {"train/loss": (STEPS, noise)}).axes
    )
    for i in (2, 20, 37):
        np.testing.assert_allclose(smoothed[i], noise[i - 2 : i + 3].mean())
    np.testing.assert_allclose(smoothed[0], noise[:3].mean())
    np.testing.assert_allclose(smoothed[-2], noise[-4:].mean())


@pytest.mark.parametrize("num_points", [1, 2, 3])
def test_a_run_that_has_just_begun_can_be_drawn(num_points):
    points = (STEPS[:num_points], np.arange(num_points) + 0.5)
    loss, accuracy = learning_curves({"train/loss": points}).axes
    assert_line(lines_of(loss)[1], *points)
    assert lines_of(accuracy) == []


def test_a_run_that_diverged_can_be_drawn():
    loss, _ = learning_curves({"val/loss": (VAL_STEPS, np.array([2.0, 1.5, np.nan, np.nan]))}).axes
    assert loss.lines[0].get_label() == "validation, best 1.500 at step 500"
    loss, _ = learning_curves({"val/loss": (VAL_STEPS, np.full(4, np.nan))}).axes
    assert loss.lines[0].get_label() == "validation"


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="metrics must hold a loss or a score of train or val, got lr"):
        learning_curves({"lr": METRICS["lr"]})
