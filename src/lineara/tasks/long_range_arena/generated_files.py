"""Files of generated examples, one kind per task: written whole or not at all, found again, checked when read."""

import json
import os
import re
import secrets
import socket
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np

SPLITS = ("train", "val", "test")
# <name>.npz.<host>.<process id>.<8 hexadecimal digits>.tmp, see `_temporary_beside`.
_TEMPORARY = re.compile(r".*\.npz\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_DAY = 24 * 60 * 60

Examples = TypeVar("Examples")
Parameters = dict[str, Any]


@dataclass(frozen=True)
class GeneratedFiles(Generic[Examples]):
    """How one task keeps its three splits.

    Args:
        task: as `lineara data` names it; files are `<data_root>/<task>/<task>-*.npz`.
        title: the task's name in sentences.
        version: of the format; a file of another one is generated again.
        examples: makes the examples of a split from its arrays, or raises ValueError if they do not fit together.
        arrays: attributes of the examples that hold these arrays.
    """

    task: str
    title: str
    version: int
    examples: Callable[..., Examples]
    arrays: tuple[str, ...]

    def prepare(
        self, path: Path, parameters: Parameters, generate: Callable[[], dict[str, Examples]], *, stacklevel: int = 3
    ) -> Path:
        """Find the file made with these parameters, or generate it; the path.

        A damaged one is reported by a warning, `stacklevel` counted from here, and generated again.

        Raises:
            OSError: the file cannot be read or written; noticed before the work, but for a disk that fills up.
        """
        parameters = {"format": self.version, **parameters}
        with _explaining(path):
            self._remove_leftovers(path.parent)
            if self._is_current(path, parameters, stacklevel + 1):
                return path
        with _temporary_beside(path) as file:
            self._write(path, file, parameters, generate())
        return path

    def load(self, path: Path) -> dict[str, Examples]:
        """The splits "train", "val" and "test" of a file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, or of another format version.
        """
        return self._read(path)[1]

    def _remove_leftovers(self, folder: Path) -> None:
        """Delete temporary files whose writer was killed."""
        for temporary in folder.glob(f"{self.task}-*.tmp"):
            with suppress(OSError):
                if (match := _TEMPORARY.fullmatch(temporary.name)) and _is_abandoned(temporary, **match.groupdict()):
                    temporary.unlink()

    def _is_current(self, path: Path, parameters: Parameters, stacklevel: int) -> bool:
        if not path.exists():
            return False
        try:
            return self._read(path)[0] == parameters
        except ValueError as error:
            warnings.warn(f"{error}; generating it again now", RuntimeWarning, stacklevel=stacklevel)
            return False

    def _read(self, path: Path) -> tuple[Parameters, dict[str, Examples]]:
        command = f"`lineara data {self.task}`"
        try:
            with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
                parameters = json.loads(str(file["parameters"]))
                version = parameters["format"]
                splits = {split: self.examples(*(file[f"{split}_{part}"] for part in self.arrays)) for split in SPLITS}
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} must be a file of generated {self.title} examples, got no such file; make it with {command}"
            ) from None
        except (PermissionError, IsADirectoryError, MemoryError):
            raise
        except Exception as error:  # a damaged file is an error of zipfile, zlib, numpy, json or ours
            raise ValueError(f"{path} must be whole, got a damaged file ({error!r}); run {command} again") from error
        if version != self.version:
            raise ValueError(f"{path} must have format {self.version}, got {version}; run {command} again")
        return parameters, splits

    def _write(self, path: Path, file: BinaryIO, parameters: Parameters, splits: dict[str, Examples]) -> None:
        arrays = {f"{split}_{part}": getattr(splits[split], part) for split in SPLITS for part in self.arrays}
        with _explaining(path):
            np.savez_compressed(file, parameters=np.array(json.dumps(parameters)), **arrays)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)


def check_sizes(sizes: dict[str, int]) -> None:
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"num_{split} must be at least 0, got {size}")


def cut(examples: Any, sizes: dict[str, int]) -> dict[str, Any]:
    """Splits of the given sizes, one after the other, of examples that have `part(start, stop)`."""
    stops = np.cumsum(list(sizes.values())).tolist()
    return {split: examples.part(stop - sizes[split], stop) for split, stop in zip(sizes, stops)}


def _is_abandoned(temporary: Path, host: str, pid: str) -> bool:
    if host == socket.gethostname() and os.name == "posix":
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # somebody else's process, but it runs
            pass
    # Another host's processes cannot be seen, and numbers of processes are used again; no run takes a day.
    return time.time() - temporary.stat().st_mtime > _DAY


@contextmanager
def _explaining(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{path} must be readable and writable, got {error.strerror or error}; free some space and give access "
            "there or choose another data root"
        ) from error


@contextmanager
def _temporary_beside(path: Path) -> Generator[BinaryIO]:
    """A new file in the folder of `path`, deleted at the end unless it has been moved to `path`."""
    name = f"{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with _explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.with_name(name).open("xb")
    try:
        yield file
    finally:
        # After a failed write, closing fails again; after a good one, nothing is left to be written.
        with suppress(OSError):
            file.close()
        path.with_name(name).unlink(missing_ok=True)
