"""The motorcycle: its files are scikit-image's, and whole however they were written."""

import fcntl
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from lineara.tasks.stereo_depth.calibration import read_calibration
from lineara.tasks.stereo_depth.motorcycle_files import motorcycle_paths, prepare_motorcycle, read_motorcycle

FILES = ("left.png", "right.png", "disparity.pfm", "calib.txt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motorcycle")
    prepare_motorcycle(folder)
    return folder


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def copied(folder, tmp_path):
    for name, content in contents(folder).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".lock").touch()
    return tmp_path


def test_the_files_are_the_photographs_and_their_truth(folder):
    left, right, disparity = data.stereo_motorcycle()
    frame = read_motorcycle(folder)
    assert np.array_equal(frame.left.permute(1, 2, 0).numpy(), left)
    assert np.array_equal(frame.right.permute(1, 2, 0).numpy(), right)
    assert np.array_equal(frame.disparity.numpy(), disparity)
    assert np.array_equal(frame.valid.numpy(), np.isfinite(disparity))
    assert 0.92 < frame.valid.float().mean() < 0.93


def test_the_truth_counts_from_the_left_view_to_the_left_in_the_right_one(folder):
    frame = read_motorcycle(folder)
    rows, columns = frame.valid.nonzero(as_tuple=True)
    differences = []
    for sign in (-1, 1):
        partners = columns + sign * frame.disparity[rows, columns].round().long()
        inside = (partners >= 0) & (partners < 741)
        colours = [frame.left[:, rows, columns][:, inside], frame.right[:, rows, partners.clamp(0, 740)][:, inside]]
        differences.append((colours[0].float() - colours[1].float()).abs().mean())
    assert differences[0] < 0.3 * differences[1]


def test_the_calibration_is_that_of_the_photographs(folder):
    left, right, calibration = motorcycle_paths(folder)
    assert (left.name, right.name) == ("left.png", "right.png")
    camera = {"focal_length": 994.978, "center_x": 311.193, "center_y": 254.877, "baseline": 0.193001, "doffs": 31.086}
    assert read_calibration(calibration) == camera | {"width": 741, "height": 500}
    for number in ("994.978", "311.193", "254.877", "31.086", "193.001"):
        assert number in data.stereo_motorcycle.__doc__
        assert number in calibration.read_text()


def test_a_set_that_is_there_is_left_alone(folder):
    before = {name: (folder / name).stat().st_mtime_ns for name in FILES}
    prepare_motorcycle(folder)
    assert {name: (folder / name).stat().st_mtime_ns for name in FILES} == before


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_written_again(folder, copied, name):
    (copied / name).unlink()
    prepare_motorcycle(copied)
    assert contents(copied) == contents(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_reported_and_written_again(folder, copied, name):
    (copied / name).write_bytes((copied / name).read_bytes()[:-50])
    with pytest.warns(RuntimeWarning, match=rf"{name} must .*; writing the motorcycle again now$"):
        prepare_motorcycle(copied)
    assert contents(copied) == contents(folder)


def test_files_of_another_size_are_reported_and_written_again(folder, copied, make):
    for name in ("left.png", "right.png"):
        Image.new("RGB", (741, 499)).save(copied / name)
    with pytest.warns(RuntimeWarning, match=r"left\.png must have 500 x 741 pixels, got 499 x 741; writing"):
        prepare_motorcycle(copied)
    (copied / "disparity.pfm").write_bytes(make.pfm_bytes(np.ones((500, 740))))
    with pytest.warns(RuntimeWarning, match=r"disparity\.pfm must have 500 x 741 pixels, got 500 x 740; writing"):
        prepare_motorcycle(copied)
    assert contents(copied) == contents(folder)


@pytest.mark.parametrize("name", FILES)
def test_files_of_something_else_are_refused_and_kept(tmp_path, name):
    (tmp_path / name).write_bytes(b"something else")
    for _ in range(2):  # the first refusal leaves nothing that lets the second one pass
        with pytest.raises(
            ValueError,
            match=rf"^data_root must be an empty folder or .*, got \S+ with a {name} of something else; name",
        ):
            prepare_motorcycle(tmp_path)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"something else")]


def test_other_files_and_folders_stay(folder, tmp_path):
    others = [".left-a.png", ".other-abcdefgh.png", ".left-abcdefgh.txt", ".my-notes.txt", "photograph.png"]
    for name in others:
        (tmp_path / name).write_bytes(b"theirs")
    (tmp_path / ".left-abcdefgh.png").mkdir()
    (tmp_path / ".calib-abcdefgh.txt").write_bytes(b"part")
    prepare_motorcycle(tmp_path)
    assert contents(tmp_path) == contents(folder)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {".lock", ".left-abcdefgh.png", *others, *FILES}


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "motorcycle").write_text("in the way")
    with pytest.raises(
        OSError, match=r"motorcycle must be a folder that can be written, got .*; set another data_root$"
    ):
        prepare_motorcycle(tmp_path / "motorcycle")


def test_without_scikit_image_the_extra_is_named(tmp_path, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ImportError, match=r"need scikit-image, .*: pip install 'lineara\[train,vision\]'$"):
        prepare_motorcycle(tmp_path)
    prepare_motorcycle(folder)  # it is there


PREPARE = """
import sys
from pathlib import Path
from lineara.tasks.stereo_depth.motorcycle_files import prepare_motorcycle
"""
HANG = """
import time
from PIL import Image
save = Image.Image.save

def save_or_hang(image, path, **options):
    if "right" not in path.name:
        return save(image, path, **options)
    path.write_bytes(b"part")
    print("hangs", flush=True)
    time.sleep(99)

Image.Image.save = save_or_hang
"""


def preparing(folder, before=""):
    """A process that prepares the folder once it is told to, by a line on its standard input."""
    code = f"{PREPARE}{before}\nprint('ready', flush=True)\nsys.stdin.readline()\nprepare_motorcycle(Path(sys.argv[1]))"
    words = [sys.executable, "-c", code, str(folder)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def begin(process):
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("\n")
    process.stdin.flush()


def test_processes_that_prepare_the_same_folder_agree(folder, tmp_path):
    processes = [preparing(tmp_path) for _ in range(2)]
    for process in processes:
        begin(process)
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert contents(tmp_path) == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *FILES])


def test_a_process_waits_for_another_that_prepares_the_folder(folder, tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = preparing(tmp_path)
        begin(process)
        time.sleep(0.7)  # a process that does not wait has written something by then
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        fcntl.flock(lock, fcntl.LOCK_UN)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert contents(tmp_path) == contents(folder)


def test_after_a_kill_in_the_middle_the_set_becomes_whole_and_nothing_is_left_over(folder, tmp_path):
    process = preparing(tmp_path, before=HANG)
    begin(process)
    assert process.stdout.readline() == "hangs\n"
    process.kill()
    process.communicate(timeout=60)
    assert (tmp_path / "left.png").is_file()
    assert not (tmp_path / "right.png").exists()
    assert len(list(tmp_path.glob(".right-*"))) == 1
    prepare_motorcycle(tmp_path)
    assert contents(tmp_path) == contents(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *FILES])


def test_frames_are_tensors_of_their_own(folder):
    frame = read_motorcycle(folder)
    frame.disparity[:] = 0
    assert torch.isinf(read_motorcycle(folder).disparity).any()
