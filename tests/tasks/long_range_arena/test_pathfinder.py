import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from lineara.tasks.long_range_arena import pathfinder
from lineara.tasks.long_range_arena.pathfinder import PathfinderDrawing, PathfinderExamples, draw_image, generate
from lineara.tasks.long_range_arena.pathfinder_drawing import lay_out

EASY = PathfinderDrawing(contour_len=6)


def draw(num, **settings):
    return generate(num, **{"drawing": EASY, "num_workers": 1, "progress": False, **settings})


def test_labels_alternate_and_each_example_has_its_own_random_numbers():
    examples = draw(70, seed=3)
    assert examples.images.shape == (70, 32, 32)
    assert examples.images.dtype == examples.labels.dtype == np.uint8
    assert examples.labels.tolist() == [0, 1] * 35
    for i in (0, 1, 69):
        rng = np.random.default_rng(np.random.SeedSequence(3, spawn_key=(i,)))
        np.testing.assert_array_equal(examples.images[i], draw_image(rng, i % 2, EASY))
    assert len({image.tobytes() for image in examples.images}) == 70


def test_the_seed_and_the_drawing_decide():
    usual = draw(5).images
    np.testing.assert_array_equal(usual, draw(9).images[:5])
    assert (usual != draw(5, seed=1).images).any(axis=(1, 2)).all()
    assert (usual != draw(5, drawing=PathfinderDrawing(contour_len=9)).images).any(axis=(1, 2)).all()


def test_processes_draw_the_same(monkeypatch):
    monkeypatch.setattr(pathfinder, "_EXAMPLES_PER_CHUNK", 7)
    alone = draw(30).images
    np.testing.assert_array_equal(draw(30, num_workers=2).images, alone)
    monkeypatch.setattr(pathfinder, "_EXAMPLES_PER_CHUNK", 64)
    np.testing.assert_array_equal(draw(30).images, alone)


def test_one_chunk_needs_no_process(monkeypatch):
    monkeypatch.setattr(pathfinder, "_processes", lambda num: pytest.fail("processes were started"))
    assert len(draw(64, num_workers=8)) == 64
    assert len(draw(0, num_workers=8)) == 0


def accuracy_of_the_best_threshold(values, labels):
    """Learned from one half of the examples, counted on the other."""
    half = len(values) // 2
    bounds = np.quantile(values[:half], np.linspace(0, 1, 51))
    right = np.array([((values[:half] > bound) == labels[:half]).mean() for bound in bounds])
    best = int(np.abs(right - 0.5).argmax())
    return float(((values[half:] > bounds[best]) == ((labels[half:] == 1) == (right[best] > 0.5))).mean())


def test_such_a_threshold_finds_what_there_is_to_find():
    labels = np.arange(200) % 2
    assert accuracy_of_the_best_threshold(labels * 1.0, labels) == 1
    assert accuracy_of_the_best_threshold(-labels * 1.0, labels) == 1


def test_neither_brightness_nor_the_discs_distance_tells_the_label():
    """Within three standard deviations of 1,000 coins, and a little for the distance, as in the published images."""
    num = 2000
    examples = draw(num)
    for values in (examples.images.mean(axis=(1, 2)), (examples.images > 60).sum(axis=(1, 2))):
        assert abs(accuracy_of_the_best_threshold(values, examples.labels) - 0.5) < 0.05
    seeds = [np.random.SeedSequence(0, spawn_key=(i,)) for i in range(num)]
    markers = np.array([lay_out(np.random.default_rng(seed), i % 2, EASY).markers for i, seed in enumerate(seeds)])
    distances = np.linalg.norm(markers[:, 0] - markers[:, 1], axis=1)
    assert abs(accuracy_of_the_best_threshold(distances, examples.labels) - 0.5) < 0.1


def test_both_labels_light_as_many_pixels():
    examples = draw(1000, seed=5)
    lit = (examples.images > 60).sum(axis=(1, 2))
    means = [lit[examples.labels == label].mean() for label in (0, 1)]
    assert abs(means[0] - means[1]) < 4 * lit.std() / np.sqrt(250)
    assert 0.05 < lit.mean() / 1024 < 0.3


@pytest.mark.parametrize("name", ["num_examples", "seed", "num_workers"])
def test_negative_numbers_are_refused(name):
    settings = {"num_examples": 1, "progress": False, name: -1}
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1$"):
        generate(settings.pop("num_examples"), **settings)


def test_progress_is_shown_on_demand(capsys):
    draw(3)
    assert capsys.readouterr().err == ""
    draw(3, progress=True)
    assert "pathfinder: 100%" in capsys.readouterr().err


# Examples


def test_examples_are_indexed_and_cut():
    examples = draw(7)
    image, label = examples[3]
    assert label == 1
    np.testing.assert_array_equal(image, examples.images[3])
    part = examples.part(2, 5)
    assert len(part) == 3
    assert part.labels.tolist() == [0, 1, 0]
    assert part.images.base is not None  # a view


@pytest.mark.parametrize(
    ("images", "labels", "sentence"),
    [
        (np.zeros((3, 32, 31), np.uint8), np.zeros(3, np.uint8), r"images must be uint8 of the shape \(3, 32, 32\)"),
        (np.zeros((2, 32, 32), np.uint8), np.zeros(3, np.uint8), r"images must .* got uint8 of \(2, 32, 32\)"),
        (np.zeros((3, 32, 32)), np.zeros(3, np.uint8), "images must be uint8 .* got float64"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros(3), "labels must be uint8 .* got float64"),
        (np.zeros((3, 32, 32), np.uint8), np.zeros((3, 1), np.uint8), r"labels must .* got uint8 of \(3, 1\)"),
        (np.zeros((3, 32, 32), np.uint8), np.full(3, 2, np.uint8), "labels must be 0 or 1, got 2"),
    ],
)
def test_arrays_that_do_not_fit_together_are_refused(images, labels, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        PathfinderExamples(images, labels)


# Runs that end early

LONG = """
from lineara.tasks.long_range_arena.pathfinder import generate
if __name__ == "__main__":
    generate(1_000_000, num_workers=2)
"""


def members(group):
    """Processes of a group that are not over yet."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if its_group == str(group) and state != "Z":
                found.append(int(folder.name))
    return found


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs the list of processes in /proc")
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_processes_end_with_their_parent(tmp_path, how):
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(LONG)
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, script],
            stderr=file,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        wait_until(lambda: re.search(r" [1-9]\d*/1000000 ", log.read_text()))
        assert len(members(process.pid)) > 2
        if how == "killed":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGINT)
        wait_until(lambda: not members(process.pid))
    finally:
        for member in members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait()
    assert log.read_text().count("Traceback") == (how == "interrupted")  # none but the parent's own


def test_a_process_that_ends_is_one_sentence(monkeypatch):
    monkeypatch.setattr(pathfinder, "_EXAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr(pathfinder, "_start_worker", sys.exit)
    with pytest.raises(RuntimeError, match=r"^every process must live .* set num_workers to 1$"):
        draw(4, num_workers=2)
