"""Files written whole or not at all."""

import errno
import os
import re
import select
import stat
import subprocess
import sys

import pytest
from matplotlib.figure import Figure

from lineara.runs.files import atomic_write, preparation_lock, save_figure, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(path, error):
    with atomic_write(path) as temporary:
        temporary.write_text("half of the text")
        raise error


def test_a_file_appears_when_the_block_ends_and_not_before(tmp_path):
    path = tmp_path / "new" / "folder" / "notes.txt"
    with atomic_write(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".txt"  # what writes by the file's name picks the right format
        temporary.write_text("first half, ")
        assert not path.exists()
        with temporary.open("a") as file:
            file.write("second half")
    assert path.read_text() == "first half, second half"
    assert names(path.parent) == ["notes.txt"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with atomic_write(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(error, match="half way"):
        fail_half_way(path, error("half way"))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_an_exception_leaves_no_file_where_there_was_none(tmp_path):
    with pytest.raises(ValueError, match="half way"):
        fail_half_way(tmp_path / "notes.txt", ValueError("half way"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_it_can_be_read_by_everybody_and_written_by_its_owner(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "notes.txt", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "notes.txt").stat().st_mode) == 0o644


def test_two_writers_do_not_write_into_one_another(tmp_path):
    path = tmp_path / "notes.txt"
    with atomic_write(path) as first, atomic_write(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert names(tmp_path) == ["notes.txt"]


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "notes.txt", "π ≠ ∂é\n")
    assert (tmp_path / "notes.txt").read_bytes() == "π ≠ ∂é\n".encode()


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("no folder")
    path = tmp_path / "file" / "notes.txt"
    with pytest.raises(
        OSError, match=f"^{re.escape(str(path))} must be writable, got .*; free some space or choose another folder$"
    ):
        write_text(path, "text")
    assert (tmp_path / "file").read_text() == "no folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    path = tmp_path / "locked" / "notes.txt"
    with pytest.raises(PermissionError, match=f"^{re.escape(str(path))} must be writable, got Permission denied; "):
        write_text(path, "text")


def test_a_folder_in_the_files_place_is_named_and_stays(tmp_path):
    path = tmp_path / "notes.txt"
    path.mkdir()
    with pytest.raises(IsADirectoryError, match=f"^{re.escape(str(path))} must be a file to write, got a folder; name"):
        write_text(path, "text")
    assert names(tmp_path) == ["notes.txt"]


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match=f"^{re.escape(str(path))} must be writable, got No space left on device; free"):
        fail_half_way(path, full)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["notes.txt"]


def test_a_picture_is_written_in_the_form_that_its_name_says(tmp_path):
    figure = Figure()
    for suffix, begins in ((".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")):
        save_figure(figure, tmp_path / f"curves{suffix}")
        assert (tmp_path / f"curves{suffix}").read_bytes().startswith(begins)
    with pytest.raises(
        ValueError, match=r"^a picture must be a .png, .pdf or .svg file, got .*curves.txt; name another"
    ):
        save_figure(figure, tmp_path / "curves.txt")
    assert names(tmp_path) == ["curves.pdf", "curves.png", "curves.svg"]


def test_a_folder_is_one_processes_at_a_time(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom lineara.runs.files import preparation_lock\n"
        "with preparation_lock(Path(sys.argv[1])):\n    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "set")]
    first, second = (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)
    )
    waiting = {first.stdout: first, second.stdout: second}
    [[inside], _, _] = select.select(list(waiting), [], [], 60)
    assert inside.readline() == "in\n"
    assert select.select([out for out in waiting if out is not inside], [], [], 0.5)[0] == []
    waiting.pop(inside).kill()  # the system lets go of the folder
    [(outside, other)] = waiting.items()
    assert outside.readline() == "in\n"
    other.communicate("\n", timeout=60)
    assert other.returncode == 0
    first.communicate(), second.communicate()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"file/set must be a folder that can be written, got .*; set another data_root$"),
        preparation_lock(tmp_path / "file" / "set"),
    ):
        pass
