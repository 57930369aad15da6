"""Files written whole or not at all, and folders written by one process at a time."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an exception."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} must be a file to write, got a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    except OSError as error:
        raise type(error)(
            f"{path} must be writable, got {error.strerror or error}; free some space or choose another folder"
        ) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        raise type(error)(
            f"{path} must be writable, got {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_figure(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG, PDF or SVG, by the end of the path."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"a picture must be a .png, .pdf or .svg file, got {path}; name another one")
    with atomic_write(path) as temporary:
        figure.savefig(temporary)


@contextmanager
def preparation_lock(folder: Path) -> Iterator[None]:
    """Wait until no other process prepares the folder; the lock ends with the process, however that ends."""
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise type(error)(
            f"{folder} must be a folder that can be written, got {error.strerror or error}; set another data_root"
        ) from error
    try:
        yield
    finally:
        lock.release()
