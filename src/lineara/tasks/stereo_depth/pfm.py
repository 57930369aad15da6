"""Portable float maps, the files of disparities: a header of text, then rows of float32 from the bottom to the top."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lineara.runs.files import atomic_write

# More than any header takes.
_HEADER_BYTES = 256
_HEADER = re.compile(rb"(PF|Pf)\s+(\S+)\s+(\S+)\s+(\S+)(\r\n|\s)")
_CHANNELS = {b"Pf": 1, b"PF": 3}


def read_pfm(path: Path | str, *, channels: int | None = None) -> npt.NDArray[np.float32]:
    """The values of a file, the upper row first.

    The sign of the scale in the header tells the order of bytes; its size is not applied, since files of disparities
    carry all kinds of numbers there.

    Args:
        path: of the file.
        channels: refuse a file that does not have so many, 1 or 3; None takes both.

    Returns:
        (height, width) of one channel, (height, width, 3) of three.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such map, or cut off, or has another number of channels.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_HEADER_BYTES)
            form, width, height, order, offset = _header(path, start)
            found = _CHANNELS[form]
            if channels not in (None, found):
                raise ValueError(f"{path} must have {_counted(channels or 1)}, got {_counted(found)}")
            # Before anything is read: a damaged header may ask for more memory than there is.
            needed = height * width * found * 4
            beyond = start[offset : max(offset, size - needed)]
            if start[offset - 1 : offset] in (b" ", b"\t") and beyond.endswith(b"\n") and not beyond.strip():
                offset += len(beyond)  # blanks behind the scale, not values that begin like them
            if size - offset != needed:
                raise ValueError(
                    f"{path} must hold {height} x {width} values of {_counted(found)}, {needed:,} bytes, as its header "
                    f"says, got {size - offset:,}; get the file again"
                )
            file.seek(offset)
            content = file.read(needed)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be a portable float map, got no such file") from None
    except OSError as error:
        raise type(error)(f"{path} must be a file that can be read, got {error.strerror or error}") from error
    shape = (height, width) if found == 1 else (height, width, found)
    rows = np.frombuffer(content, f"{order}f4").reshape(shape)
    return np.ascontiguousarray(rows[::-1], dtype=np.float32)


def write_pfm(path: Path | str, values: npt.NDArray[Any]) -> None:
    """Write (height, width) or (height, width, 3) values as float32, the lower bytes first; whole or not at all.

    Raises:
        ValueError: for values of another shape.
    """
    values = np.asarray(values)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] != 3) or values.size == 0:
        raise ValueError(f"values must be (height, width) or (height, width, 3) and not empty, got {values.shape}")
    form = "Pf" if values.ndim == 2 else "PF"
    header = f"{form}\n{values.shape[1]} {values.shape[0]}\n-1.0\n"
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(header.encode())
        file.write(np.ascontiguousarray(values[::-1], dtype="<f4").data)


def _header(path: Path, start: bytes) -> tuple[bytes, int, int, str, int]:
    """The form, width, height, order of bytes ("<" or ">"), and where the values begin."""
    match = _HEADER.match(start)
    if match is None:
        raise ValueError(
            f"{path} must begin as a portable float map does, with Pf or PF, width, height and scale, got "
            f"{start[:20]!r}"
        )
    form, *numbers, _ = match.groups()
    try:
        if b"_" in b"".join(numbers):  # which Python's own numbers may have
            raise ValueError
        width, height, scale = int(numbers[0]), int(numbers[1]), float(numbers[2])
    except ValueError:
        words = b" ".join(numbers).decode(errors="replace")
        raise ValueError(f"{path} must have numbers for width, height and scale, got {words!r}") from None
    if width < 1 or height < 1:
        raise ValueError(f"{path} must have a width and a height of at least 1, got {width} and {height}")
    if scale == 0 or not np.isfinite(scale):
        raise ValueError(f"{path} must have a scale below or above 0, got {scale}")
    return form, width, height, "<" if scale < 0 else ">", match.end()


def _counted(channels: int) -> str:
    return f"{channels} channel{'' if channels == 1 else 's'}"
