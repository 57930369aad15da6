import errno
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from lineara.tasks.long_range_arena import pathfinder_files
from lineara.tasks.long_range_arena.pathfinder import PathfinderDrawing, generate
from lineara.tasks.long_range_arena.pathfinder_files import (
    load_pathfinder,
    load_pathfinder_folder,
    prepare_pathfinder,
)

EASY = PathfinderDrawing(contour_len=6)
SIZES = {"num_train": 11, "num_val": 5, "num_test": 3}
SETTINGS = {**SIZES, "drawing": EASY, "num_workers": 1, "progress": False}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail(*_args, **_settings):
    pytest.fail("examples were generated")


def drawn(num, **settings):
    return generate(num, drawing=EASY, num_workers=1, progress=False, **settings)


# The cache


def test_prepared_splits_are_the_generated_examples_in_order(tmp_path):
    path = prepare_pathfinder(tmp_path / "data", seed=3, **SETTINGS)
    assert path == tmp_path / "data/pathfinder/pathfinder-len6-seed3-11-5-3.npz"
    splits = load_pathfinder(path)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 11, "val": 5, "test": 3}
    expected = drawn(19, seed=3)
    np.testing.assert_array_equal(np.concatenate([part.images for part in splits.values()]), expected.images)
    np.testing.assert_array_equal(np.concatenate([part.labels for part in splits.values()]), expected.labels)


def test_a_second_preparation_leaves_the_file_alone(tmp_path, monkeypatch):
    path = prepare_pathfinder(tmp_path, **SETTINGS)
    before = path.stat()
    monkeypatch.setattr(pathfinder_files, "generate", fail)
    assert prepare_pathfinder(str(tmp_path), **SETTINGS) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_each_parameter_has_a_file_of_its_own(tmp_path):
    drawings = [
        {"contour_len": 7},
        {"paddle_len": 3},
        {"thickness": 1.0},
        {"margin": 2},
        {"padding": 2},
        {"marker_radius": 2.0},
        {"seed_distance": 6},
        {"continuity": 1.5},
        {"antialias": 4},
        {"distractor_paddles": 6},
        {"target_contrast": 1.0},
        {"distractor_contrast": 1.5},
    ]
    others = [{}, {"seed": 1}, *({name: 2} for name in SIZES)]
    others += [{"drawing": PathfinderDrawing(**{"contour_len": 6, **drawing})} for drawing in drawings]
    few = {"num_train": 1, "num_val": 1, "num_test": 0}
    paths = [prepare_pathfinder(tmp_path, **SETTINGS | few | other) for other in others]
    assert len(set(paths)) == len(names(tmp_path / "pathfinder")) == len(others)
    assert len(drawings) == len(EASY.__dict__)


def test_a_damaged_file_is_noticed_and_drawn_again(tmp_path):
    path = prepare_pathfinder(tmp_path, **SETTINGS)
    whole = path.read_bytes()
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"val_labels": arrays["val_labels"][:-1]})
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must .*; run `lineara data pathfinder` again"):
        load_pathfinder(path)
    with pytest.warns(RuntimeWarning, match="; generating it again now$") as caught:
        prepare_pathfinder(tmp_path, **SETTINGS)
    assert caught[0].filename == __file__
    assert path.read_bytes() == whole


@pytest.mark.parametrize("name", SIZES)
def test_a_negative_size_is_refused_before_anything_is_written(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 0, got -1$"):
        prepare_pathfinder(tmp_path, **SETTINGS | {name: -1})
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(pathfinder_files, "generate", fail)
    (tmp_path / "data").touch()
    with pytest.raises(OSError, match=r"data/pathfinder/.* must be .*, got Not a directory; free some space"):
        prepare_pathfinder(tmp_path / "data", **SETTINGS)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=rf"seed0.*npz must be .*, got {os.strerror(errno.EFBIG)}; free some space"):
            prepare_pathfinder(tmp_path, **SETTINGS | {"num_train": 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "pathfinder") == []


KILLED = """
import sys
from lineara.tasks.long_range_arena.pathfinder_files import prepare_pathfinder
if __name__ == "__main__":
    prepare_pathfinder(sys.argv[1], num_train=1_000_000, num_workers=2)
"""


def test_a_killed_run_leaves_no_broken_file_and_the_next_one_cleans_up(tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "pathfinder"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script, tmp_path], stderr=subprocess.DEVNULL) as process:
        while not (folder.exists() and names(folder)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert [name.endswith(".tmp") for name in names(folder)] == [True]
    path = prepare_pathfinder(tmp_path, **SETTINGS)
    assert names(folder) == [path.name]


# The published folders


def publish(folder, files, mode="L"):
    """Write examples as the published sets are: metadata files by number, and the images beside them."""
    (folder / "metadata").mkdir(parents=True)
    for k, examples in files.items():
        (folder / "imgs" / str(k)).mkdir(parents=True)
        lines = []
        for i, (image, label) in enumerate(examples):
            Image.fromarray(image).convert(mode).save(folder / "imgs" / str(k) / f"sample_{i}.png")
            lines.append(f"imgs/{k} sample_{i}.png {i} {label} 1.0 14 4 2 0.5 1 1\n")
        (folder / "metadata" / f"{k}.npy").write_text("".join(lines))


@pytest.fixture(scope="module")
def examples():
    return drawn(23)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_published_folder_is_cut_in_the_order_of_its_numbers(tmp_path, examples, mode):
    files = {10: examples.part(13, 23), 2: examples.part(0, 13)}  # as strings, 10 would come before 2
    publish(tmp_path, files, mode)
    (tmp_path / "metadata" / "combined.npy").write_bytes(b"\x93NUMPY")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = load_pathfinder_folder(str(tmp_path))
    assert list(splits) == ["train", "val", "test"]
    for split, start, stop in (("train", 0, 18), ("val", 18, 20), ("test", 20, 23)):
        np.testing.assert_array_equal(splits[split].images, examples.images[start:stop])
        assert splits[split].labels.tolist() == examples.labels[start:stop].tolist()


def test_the_folder_above_stands_for_its_hard_set(tmp_path, examples):
    publish(tmp_path / "curv_contour_length_14", {0: examples})
    publish(tmp_path / "curv_baseline", {0: examples.part(0, 3)})
    assert len(load_pathfinder_folder(tmp_path)["train"]) == 18
    assert len(load_pathfinder_folder(tmp_path / "curv_baseline")["train"]) == 2


def test_empty_broken_and_missing_images_are_left_out_with_one_warning(tmp_path, examples):
    publish(tmp_path, {0: examples})
    images = tmp_path / "imgs" / "0"
    (images / "sample_4.png").write_bytes(b"")
    (images / "sample_9.png").unlink()
    os.truncate(images / "sample_11.png", 60)
    (images / "sample_15.png").write_text("no image")
    with pytest.warns(RuntimeWarning) as caught:
        splits = load_pathfinder_folder(tmp_path)
    [warning] = caught
    named = ", ".join(str(images / f"sample_{i}.png") for i in (4, 9, 11))
    assert str(warning.message) == f"4 of 23 images are missing or broken and left out: {named}, ..."
    assert warning.filename == __file__
    kept = [i for i in range(23) if i not in (4, 9, 11, 15)]
    np.testing.assert_array_equal(np.concatenate([part.images for part in splits.values()]), examples.images[kept])
    assert np.concatenate([part.labels for part in splits.values()]).tolist() == examples.labels[kept].tolist()
    assert [len(part) for part in splits.values()] == [15, 2, 2]


def test_a_single_empty_image_is_named(tmp_path, examples):
    publish(tmp_path, {0: examples})
    (tmp_path / "imgs/0/sample_4.png").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match=r"^1 of 23 images are .* left out: \S*imgs/0/sample_4\.png$"):
        load_pathfinder_folder(tmp_path)


@pytest.mark.parametrize(
    "line",
    ["imgs/0 sample_1.png 1", "imgs/0 sample_1.png 1 2 1.0", "imgs/0 sample_1.png 1 1.0", "", "\x93NUMPY\x01"],
)
def test_a_broken_line_is_named(tmp_path, examples, line):
    publish(tmp_path, {0: examples.part(0, 2)})
    file = tmp_path / "metadata" / "0.npy"
    file.write_bytes(f"imgs/0 sample_0.png 0 0 1.0\n{line}\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}, line 2: must be `imgs/<k> .* got '"):
        load_pathfinder_folder(tmp_path)


def test_an_image_of_another_size_is_named(tmp_path, examples):
    publish(tmp_path, {0: examples.part(0, 2)})
    path = tmp_path / "imgs/0/sample_1.png"
    Image.fromarray(np.zeros((64, 61), np.uint8)).save(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must be .* 32 x 32 pixels, got 61 x 64$"):
        load_pathfinder_folder(tmp_path)


@pytest.mark.parametrize("there", [".", "imgs/0", "metadata"])
def test_a_folder_without_metadata_is_one_sentence(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    sentence = rf"^{re.escape(str(tmp_path))} must be a published folder such as curv_contour_length_14, got no "
    with pytest.raises(FileNotFoundError, match=sentence + r"metadata/<k>\.npy in it; .*`lineara data pathfinder`$"):
        load_pathfinder_folder(tmp_path)


def test_a_folder_without_images_is_one_sentence(tmp_path, examples):
    publish(tmp_path, {0: examples.part(0, 2)})
    for image in (tmp_path / "imgs" / "0").iterdir():
        image.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"must hold the images that its metadata lists, got none; .* and imgs/"
    ):
        load_pathfinder_folder(tmp_path)
