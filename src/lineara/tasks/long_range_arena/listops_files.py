"""ListOps files: the cache of generated examples, and the published tab-separated files."""

import json
import os
import re
import secrets
import socket
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lineara.tasks.long_range_arena.listops import ListOpsExamples, ListOpsGrammar, encode, generate

_BENCHMARK = ListOpsGrammar()
_FORMAT = 1
_SPLITS = ("train", "val", "test")
_ARRAYS = ("tokens", "offsets", "labels")
_HEADER = "Source\tTarget"
# <cache>.npz.<host>.<process id>.<8 hexadecimal digits>.tmp, see `_temporary_beside`.
_TEMPORARY = re.compile(r"listops-.*\.npz\.(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp")
_DAY = 24 * 60 * 60


def prepare_listops(
    data_root: Path | str,
    *,
    num_train: int = 96_000,
    num_val: int = 2_000,
    num_test: int = 2_000,
    grammar: ListOpsGrammar = _BENCHMARK,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Generate the three splits into `<data_root>/listops/`, or find them there, and return the file's path.

    No expression occurs twice, within a split or across them. The file appears whole or not at all. One that
    is damaged is reported by a warning and generated again.

    Args:
        data_root: folder, made if missing.
        num_train, num_val, num_test: examples of each split, at least 0.
        grammar, seed, num_workers, progress: as for `listops.generate`.

    Raises:
        ValueError: an argument is out of range, or the grammar has too few different expressions.
        OSError: the file cannot be read or written; noticed before the work, but for a disk that fills up.

    Cost: for the benchmark's sizes, about 60 MB on disk and 400 MB of memory.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    for split, size in sizes.items():
        if size < 0:
            raise ValueError(f"num_{split} must be at least 0, got {size}")
    parameters = {"format": _FORMAT, **asdict(grammar), "seed": seed, **sizes}
    path = Path(data_root) / "listops" / _file_name(grammar, seed, sizes)
    with _explaining(path):
        _remove_leftovers(path.parent)
        if _is_current(path, parameters):
            return path
    with _temporary_beside(path) as file:
        examples = generate(sum(sizes.values()), grammar=grammar, seed=seed, num_workers=num_workers, progress=progress)
        _write(path, file, parameters, _split(examples, sizes))
    return path


def load_listops(path: Path | str) -> dict[str, ListOpsExamples]:
    """The splits "train", "val" and "test" of a file that `prepare_listops` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another format version.
    """
    return _read(Path(path))[1]


def load_listops_folder(folder: Path | str) -> dict[str, ListOpsExamples]:
    """The splits "train", "val" and "test": the published `basic_{train,val,test}.tsv` of a folder.

    Raises:
        FileNotFoundError, ValueError: as for `read_listops_tsv`.
    """
    return {split: read_listops_tsv(Path(folder) / f"basic_{split}.tsv") for split in _SPLITS}


def read_listops_tsv(path: Path | str) -> ListOpsExamples:
    """Examples of one published file: a header, then an expression, a tab and its value 0..9 on each line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is broken; names the file and the line, the header being line 1.
    """
    path = Path(path)
    try:
        file = path.open(encoding="utf-8", errors="replace", newline="\n")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be one of the published files basic_{{train,val,test}}.tsv, got no such file; "
            "put them there or generate examples with `lineara data listops`"
        ) from None
    tokens, labels = [np.zeros(0, np.uint8)], list[int]()
    with file:
        if (header := file.readline().rstrip("\r\n")) != _HEADER:
            raise ValueError(f"{path}, line 1: the header must be {_HEADER!r}, got {header[:80]!r}")
        for number, line in enumerate(file, start=2):
            try:
                expression, label = _parse(line.rstrip("\r\n"))
                tokens.append(encode(expression))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
            labels.append(label)
    offsets = np.cumsum([len(each) for each in tokens], dtype=np.int64)
    return ListOpsExamples(np.concatenate(tokens), offsets, np.array(labels, np.uint8))


def _parse(line: str) -> tuple[str, int]:
    expression, tab, label = line.partition("\t")
    if not tab:
        raise ValueError(f"a line must be an expression, a tab and a label, got no tab in {line[:80]!r}")
    if not expression.strip(" ()"):
        raise ValueError(f"the expression must not be empty, got {expression[:80]!r}")
    if label not in list("0123456789"):
        raise ValueError(f"the label must be one of 0..9, got {label[:80]!r}")
    return expression, int(label)


def _file_name(grammar: ListOpsGrammar, seed: int, sizes: dict[str, int]) -> str:
    drawn = f"len{grammar.min_len}-{grammar.max_len}-depth{grammar.max_depth}"
    drawn += f"-op{grammar.operator_probability}-args{grammar.max_args}"
    return f"listops-{drawn}-seed{seed}-{'-'.join(map(str, sizes.values()))}.npz"


def _split(examples: ListOpsExamples, sizes: dict[str, int]) -> dict[str, ListOpsExamples]:
    stops = np.cumsum(list(sizes.values())).tolist()
    return {split: examples.part(stop - sizes[split], stop) for split, stop in zip(sizes, stops)}


@contextmanager
def _explaining(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"{path} must be readable and writable, got {error.strerror or error}; make room and give access "
            "there or choose another data root"
        ) from error


def _remove_leftovers(folder: Path) -> None:
    """Delete temporary files whose writer was killed."""
    for temporary in folder.glob("listops-*.tmp"):
        with suppress(OSError):
            if (match := _TEMPORARY.fullmatch(temporary.name)) and _is_abandoned(temporary, **match.groupdict()):
                temporary.unlink()


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


def _is_current(path: Path, parameters: dict[str, int | float]) -> bool:
    if not path.exists():
        return False
    try:
        return _read(path)[0] == parameters
    except ValueError as error:
        warnings.warn(f"{error}; generating it again now", RuntimeWarning, stacklevel=3)
        return False


def _read(path: Path) -> tuple[dict[str, int | float], dict[str, ListOpsExamples]]:
    try:
        with path.open("rb") as content, np.load(content, allow_pickle=False) as file:
            parameters = json.loads(str(file["parameters"]))
            version = parameters["format"]
            splits = {split: ListOpsExamples(*(file[f"{split}_{part}"] for part in _ARRAYS)) for split in _SPLITS}
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be a file of generated ListOps examples, got no such file; make it with "
            "`lineara data listops`"
        ) from None
    except (PermissionError, IsADirectoryError, MemoryError):
        raise
    except Exception as error:  # a damaged file is an error of zipfile, zlib, numpy, json or ours
        raise ValueError(
            f"{path} must be whole, got a damaged file ({error!r}); run `lineara data listops` again"
        ) from error
    if version != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT}, got {version}; run `lineara data listops` again")
    return parameters, splits


@contextmanager
def _temporary_beside(path: Path) -> Generator[BinaryIO]:
    """A new file in the folder of `path`, deleted at the end unless `_write` has moved it to `path`."""
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


def _write(path: Path, file: BinaryIO, parameters: dict[str, int | float], splits: dict[str, ListOpsExamples]) -> None:
    arrays = {f"{split}_{part}": getattr(splits[split], part) for split in _SPLITS for part in _ARRAYS}
    with _explaining(path):
        np.savez_compressed(file, parameters=np.array(json.dumps(parameters)), **arrays)
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).replace(path)
