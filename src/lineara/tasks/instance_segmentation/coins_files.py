"""The photograph of coins that comes with scikit-image, as a set in COCO's format.

The photograph shows four rows of six coins on a dark ground. It is cut between the rows, through no coin:

    train    the upper two rows    12 coins    150 x 384 pixels
    val      the third row          6 coins     75 x 384
    test     the fourth row         6 coins     78 x 384
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lineara.runs.files import atomic_write, preparation_lock, write_text
from lineara.tasks.image_files import read_pixels
from lineara.tasks.instance_segmentation.coco_entries import encode
from lineara.tasks.instance_segmentation.coco_files import read_annotations

_VERSION = 1
_NUM_COINS = 24
# First and last row of pixels, the latter not included.
_ROWS = {"train": (0, 150), "val": (150, 225), "test": (225, 303)}
_CATEGORY = {"id": 1, "name": "coin"}
# Side of the square whose mean a pixel must exceed: about two coins wide, since the ground is brighter at the top.
_NEIGHBOURHOOD = 101
# Smaller than a coin, larger than a speck of dust.
_LEAST_RADIUS = 6

Mask = npt.NDArray[np.bool_]


def prepare_coins(folder: Path | str) -> None:
    """Write images/<split>.png and annotations/<split>.json into a folder, unless they are there.

    Every file appears whole or not at all. One that is damaged, or of another version, is reported by a warning and
    written again. Processes that prepare the same folder wait for each other.

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


def coins() -> tuple[npt.NDArray[np.uint8], list[Mask]]:
    """The photograph (303, 384), and a mask of its size for each of the 24 coins, in the order of reading.

    A pixel belongs to a coin where it is brighter than its neighbourhood; what touches the border is the ground.

    Raises:
        ImportError: scikit-image is not installed.
    """
    try:
        from skimage import data, filters, measure, morphology, segmentation
    except ImportError as error:
        raise ImportError(
            "the set of coins needs scikit-image, which is not installed; install it with: "
            "pip install 'lineara[train,vision]'"
        ) from error
    from scipy.ndimage import binary_fill_holes

    photograph = data.coins()
    smooth = filters.gaussian(photograph, 1, preserve_range=True)
    bright = smooth > filters.threshold_local(photograph, _NEIGHBOURHOOD, offset=0)
    filled = binary_fill_holes(morphology.closing(bright, morphology.disk(2)))
    labels: Any = measure.label(segmentation.clear_border(morphology.opening(filled, morphology.disk(_LEAST_RADIUS))))
    found: list[Mask] = [labels == label for label in range(1, labels.max() + 1)]
    assert len(found) == _NUM_COINS, f"the photograph has {_NUM_COINS} coins, found {len(found)}"
    return photograph, sorted(found, key=_row_and_left)


def _row_and_left(coin: Mask) -> tuple[int, int]:
    rows, columns = coin.nonzero()
    return sum(rows.mean() > end for end in (85, 150, 225)), int(columns.min())


def _write(folder: Path) -> None:
    for file in _files(folder):
        for leftover in file.parent.glob(f".{file.stem}-????????{file.suffix}"):  # of a process that was killed
            if leftover.is_file():
                leftover.unlink()
    photograph, masks = coins()
    for split, (first, end) in _ROWS.items():
        strip = photograph[first:end]
        parts = [mask[first:end] for mask in masks if mask[first:end].any()]
        name = f"{split}.png"
        with atomic_write(folder / "images" / name) as temporary:
            Image.fromarray(strip).save(temporary, format="png")
        image = {"id": 1, "file_name": name, "height": strip.shape[0], "width": strip.shape[1]}
        content = {
            "info": {"description": "The coins of scikit-image, cut by lineara", "version": _VERSION},
            "images": [image],
            "annotations": [_annotation(number, part) for number, part in enumerate(parts, start=1)],
            "categories": [_CATEGORY],
        }
        write_text(_annotation_file(folder, split), json.dumps(content, indent=1) + "\n")


def _annotation(number: int, mask: Mask) -> dict[str, Any]:
    rows, columns = mask.nonzero()
    left, top = int(columns.min()), int(rows.min())
    return {
        "id": number,
        "image_id": 1,
        "category_id": _CATEGORY["id"],
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
        "segmentation": encode(mask.astype(np.uint8)),
    }


def _annotation_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"{split}.json"


def _files(folder: Path) -> list[Path]:
    return [file for split in _ROWS for file in (folder / "images" / f"{split}.png", _annotation_file(folder, split))]


def _check_ours(folder: Path) -> None:
    """Refuse files that would be overwritten in a folder that was never prepared, which leaves a lock first."""
    foreign = [file.relative_to(folder) for file in _files(folder) if file.exists()]
    if foreign and not (folder / ".lock").exists():
        raise ValueError(
            f"data_root must be an empty folder or one that holds the coins, got {folder} with {foreign[0]} of "
            "something else; name another one"
        )


def _is_current(folder: Path, *, warn: bool = False) -> bool:
    """Whether all files are there, whole and of this version."""
    try:
        for split in _ROWS:
            file = _annotation_file(folder, split)
            (image,) = read_annotations(file, image_folder=folder / "images")["images"]
            if read_pixels(folder / "images" / image["file_name"]).shape[1:] != (image["height"], image["width"]):
                raise ValueError(f"{folder / 'images' / image['file_name']} must have the size that {file} says")
            if json.loads(file.read_text(encoding="utf-8")).get("info", {}).get("version") != _VERSION:
                raise ValueError(f"{file} must be of version {_VERSION}")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as error:
        if warn:
            warnings.warn(f"{error}; writing the set of coins again now", RuntimeWarning, stacklevel=3)
        return False
    return True
