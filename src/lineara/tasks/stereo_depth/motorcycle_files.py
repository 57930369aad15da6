"""The photographs of a motorcycle that come with scikit-image, with their disparities, as files.

It is one of Middlebury's pairs of 2014, at a quarter of its size: 500 x 741 pixels, with disparities of 7.2 to 59.9
pixels for 92.65 % of them.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lineara.runs.files import atomic_write, preparation_lock, write_text
from lineara.tasks.stereo_depth.frames import Frame, read_float_truth, read_views
from lineara.tasks.stereo_depth.pfm import write_pfm

_IMAGES = ("left.png", "right.png")
_TRUTH = "disparity.pfm"
_CALIBRATION = "calib.txt"
_FILES = (*_IMAGES, _TRUTH, _CALIBRATION)
_SIZE = (500, 741)
# As scikit-image's documentation states it; the right camera's principal point lies 31.086 pixels further right.
_CALIBRATION_TEXT = """\
cam0=[994.978 0 311.193; 0 994.978 254.877; 0 0 1]
cam1=[994.978 0 342.279; 0 994.978 254.877; 0 0 1]
doffs=31.086
baseline=193.001
width=741
height=500
"""


def prepare_motorcycle(folder: Path | str) -> None:
    """Write left.png, right.png, disparity.pfm and calib.txt into a folder, unless they are there.

    Every file appears whole or not at all. One that is damaged is reported by a warning and written again. Processes
    that prepare the same folder wait for each other.

    Args:
        folder: made if missing.

    Raises:
        ImportError: scikit-image is not installed.
        OSError: the folder cannot be written.
        ValueError: it holds a file of such a name that is something else's.
    """
    folder = Path(folder)
    if _is_current(folder):
        return
    _check_ours(folder)
    with preparation_lock(folder):
        if not _is_current(folder, warn=True):  # another process may have written it meanwhile
            _write(folder)


def read_motorcycle(folder: Path | str) -> Frame:
    """The whole frame (500, 741).

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged.
    """
    folder = Path(folder)
    left, right = read_views(*(folder / name for name in _IMAGES))
    disparity = torch.from_numpy(read_float_truth(str(folder / _TRUTH)))
    for name, size in ((_IMAGES[0], left.shape[1:]), (_TRUTH, disparity.shape)):
        if tuple(size) != _SIZE:
            raise ValueError(f"{folder / name} must have {_SIZE[0]} x {_SIZE[1]} pixels, got {size[0]} x {size[1]}")
    return Frame(left, right, disparity, torch.isfinite(disparity))


def motorcycle_paths(folder: Path | str) -> tuple[Path, Path, Path]:
    """Left view, right view and calibration."""
    left, right = (Path(folder) / name for name in _IMAGES)
    return left, right, Path(folder) / _CALIBRATION


def _write(folder: Path) -> None:
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "the photographs of a motorcycle need scikit-image, which is not installed; install it with: "
            "pip install 'lineara[train,vision]'"
        ) from error
    for name in map(Path, _FILES):
        for leftover in folder.glob(f".{name.stem}-????????{name.suffix}"):  # of a process that was killed
            if leftover.is_file():
                leftover.unlink()
    *views, disparity = data.stereo_motorcycle()
    for name, view in zip(_IMAGES, views):
        with atomic_write(folder / name) as temporary:
            Image.fromarray(view).save(temporary, format="png")
    write_pfm(folder / _TRUTH, disparity.astype(np.float32))
    write_text(folder / _CALIBRATION, _CALIBRATION_TEXT)


def _check_ours(folder: Path) -> None:
    """Refuse files that would be overwritten in a folder that was never prepared, which leaves a lock first."""
    foreign = [name for name in _FILES if (folder / name).exists()]
    if foreign and not (folder / ".lock").exists():
        raise ValueError(
            f"data_root must be an empty folder or one that holds the motorcycle, got {folder} with a {foreign[0]} of "
            "something else; name another one"
        )


def _is_current(folder: Path, *, warn: bool = False) -> bool:
    """Whether all files are there and whole."""
    if not all((folder / name).is_file() for name in _FILES):
        return False
    try:
        read_motorcycle(folder)
        if (folder / _CALIBRATION).read_text(encoding="utf-8", errors="replace") != _CALIBRATION_TEXT:
            raise ValueError(f"{folder / _CALIBRATION} must be the motorcycle's calibration")
    except ValueError as error:
        if warn:
            warnings.warn(f"{error}; writing the motorcycle again now", RuntimeWarning, stacklevel=3)
        return False
    return True
