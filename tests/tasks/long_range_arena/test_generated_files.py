"""What all files of generated examples share; test_listops_files.py has more of it, by way of ListOps."""

import errno
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from lineara.tasks.long_range_arena.generated_files import GeneratedFiles, check_sizes, cut


@dataclass(eq=False)
class Squares:
    roots: np.ndarray
    squares: np.ndarray

    def __post_init__(self):
        if (self.roots**2 != self.squares).any():
            raise ValueError("squares must be those of the roots")

    def part(self, start, stop):
        return Squares(self.roots[start:stop], self.squares[start:stop])


FILES = GeneratedFiles("squares", "Squares", 3, Squares, ("roots", "squares"))


def draw(num=12):
    roots = np.arange(num)
    return cut(Squares(roots, roots**2), {"train": num - 5, "val": 3, "test": 2})


def fail():
    pytest.fail("examples were generated")


def place(folder):
    return folder / "squares" / "squares-12.npz"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_splits_come_back_and_are_not_made_twice(tmp_path):
    assert FILES.prepare(place(tmp_path), {"size": 12}, draw) == place(tmp_path)
    splits = FILES.load(place(tmp_path))
    assert {split: part.roots.tolist() for split, part in splits.items()} == {
        "train": [0, 1, 2, 3, 4, 5, 6],
        "val": [7, 8, 9],
        "test": [10, 11],
    }
    assert splits["val"].squares.tolist() == [49, 64, 81]
    assert FILES.prepare(place(tmp_path), {"size": 12}, fail) == place(tmp_path)
    assert names(tmp_path / "squares") == ["squares-12.npz"]


def test_other_parameters_are_other_examples(tmp_path):
    FILES.prepare(place(tmp_path), {"size": 12}, draw)
    FILES.prepare(place(tmp_path), {"size": 13}, lambda: draw(13))
    assert len(FILES.load(place(tmp_path))["train"].roots) == 8


def damage_by_truncation(path):
    os.truncate(path, path.stat().st_size // 2)


def damage_by_emptying(path):
    path.write_bytes(b"")


def damage_by_examples_that_do_not_fit(path):
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {"val_squares": arrays["val_roots"]})


def damage_by_another_version(path):
    FILES.__class__("squares", "Squares", 4, Squares, ("roots", "squares")).prepare(path, {"size": 12}, draw)


@pytest.mark.parametrize(
    "damage",
    [damage_by_truncation, damage_by_emptying, damage_by_examples_that_do_not_fit],
)
def test_a_damaged_file_is_noticed_and_generated_again(tmp_path, damage):
    path = FILES.prepare(place(tmp_path), {"size": 12}, draw)
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} must be whole, .*; run `lineara data squares` again"
    ):
        FILES.load(path)
    with pytest.warns(RuntimeWarning, match="; generating it again now$"):
        FILES.prepare(path, {"size": 12}, draw)
    assert path.read_bytes() == whole


def test_another_version_is_generated_again(tmp_path):
    path = place(tmp_path)
    damage_by_another_version(path)
    sentence = "must have format 3, got 4; run `lineara data squares` again"
    with pytest.raises(ValueError, match=sentence):
        FILES.load(path)
    with pytest.warns(RuntimeWarning, match=sentence):
        FILES.prepare(path, {"size": 12}, draw)
    assert len(FILES.load(path)["train"].roots) == 7


def test_the_warning_points_at_the_caller_of_the_task(tmp_path):
    def prepare_squares():
        FILES.prepare(place(tmp_path), {"size": 12}, draw)

    prepare_squares()
    place(tmp_path).write_bytes(b"")
    with pytest.warns(RuntimeWarning) as caught:
        prepare_squares()
    lines = Path(__file__).read_text().splitlines()
    assert caught[0].filename == __file__
    assert lines[caught[0].lineno - 1].strip() == "prepare_squares()"


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a file of generated Squares .*make it with `lineara data squares`$"):
        FILES.load(place(tmp_path))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, error):
    def interrupt():
        assert [name.endswith(".tmp") for name in names(tmp_path / "squares")] == [True]
        raise error

    with pytest.raises(error):
        FILES.prepare(place(tmp_path), {}, interrupt)
    assert names(tmp_path / "squares") == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=rf"squares-12\.npz must be .*, got {os.strerror(errno.EFBIG)}; free some space"
        ):
            FILES.prepare(place(tmp_path), {}, lambda: draw(9000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path / "squares") == []


def test_only_abandoned_temporary_files_of_the_task_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    folder = tmp_path / "squares"
    folder.mkdir()
    start, here = "squares-12.npz", socket.gethostname()
    kept = [
        f"{start}.{here}.{os.getpid()}.0123abcd.tmp",
        f"{start}.other.host.{gone.pid}.0123abcd.tmp",
        f"cubes-12.npz.{here}.{gone.pid}.0123abcd.tmp",
        "squares-my.tmp",
    ]
    removed = [f"{start}.{here}.{gone.pid}.0123abcd.tmp", f"{start}.other.host.{os.getpid()}.89abcdef.tmp"]
    for name in kept + removed:
        (folder / name).touch()
    yesterday = time.time() - 25 * 60 * 60
    os.utime(folder / removed[1], (yesterday, yesterday))
    FILES.prepare(place(tmp_path), {}, draw)
    assert names(folder) == sorted([start, *kept])


@pytest.fixture
def locked_folder():
    """A read-only folder, for root as well by acting as an ordinary user."""
    folder, user = Path(tempfile.mkdtemp()), os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_read_only_root_is_refused_before_the_work(locked_folder):
    with pytest.raises(PermissionError, match=r"squares-12\.npz must be .*, got Permission denied; free some space"):
        FILES.prepare(place(locked_folder), {}, fail)


def test_sizes_are_at_least_0():
    check_sizes({"train": 0, "val": 3})
    with pytest.raises(ValueError, match=r"^num_val must be at least 0, got -1$"):
        check_sizes({"train": 0, "val": -1})
