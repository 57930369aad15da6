"""Pairs of images without a truth, and the calibration of the cameras that took them."""

import re
import warnings
from math import isfinite
from pathlib import Path

from lineara.tasks.image_files import list_images

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CAMERA = re.compile(rf"\[\s*({_NUMBER})\s+\S+\s+\S+\s*;")


def pairs_to_predict(left: str | None, right: str | None) -> list[tuple[str, Path, Path]]:
    """Name, left and right file of each pair.

    Args:
        left, right: two images, or two folders, whose images of equal names are pairs. One without a partner is warned
            of and left out.

    Raises:
        ValueError: they are not both given, or not both images or both folders.
        FileNotFoundError: one does not exist, or the folders have no pair.
    """
    if left is None or right is None:
        raise ValueError(
            f"predict_left and predict_right must be two images or two folders, got {left} and {right}; set "
            "--data.predict_left and --data.predict_right"
        )
    views = Path(left), Path(right)
    for view in views:
        if not view.exists():
            raise FileNotFoundError(f"{view} must be an image or a folder of images, got nothing there; name another")
    if views[0].is_dir() != views[1].is_dir():
        raise ValueError(
            f"predict_left and predict_right must be two images or two folders, got {left} and {right}, of which one "
            "is a folder"
        )
    if views[0].is_file():
        return [(views[0].stem, *views)]
    return _pairs_in_folders(*views)


def read_calibration(path: Path | str) -> dict[str, float]:
    """The cameras of a calib.txt, as Middlebury's: lines of cam0=[f 0 x; 0 f y; 0 0 1], baseline=mm and doffs=pixels.

    Returns:
        focal_length of the left camera in pixels, baseline in metres, doffs in pixels (0 where there is no such line).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is missing or has no such number.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be a calibration file, got no such file; name another one") from None
    except OSError as error:
        raise type(error)(f"{path} must be a file that can be read, got {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file, got one that is not: {error}") from error
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    camera = _CAMERA.match(fields.get("cam0", ""))
    if camera is None:
        raise ValueError(
            f"{path} must have a line cam0=[f 0 x; 0 f y; 0 0 1] with the focal length f in pixels, got "
            f"{fields.get('cam0', 'no such line')}"
        )
    return {
        "focal_length": _number(path, "cam0", camera[1], above_zero=True),
        "baseline": _number(path, "baseline", fields.get("baseline"), above_zero=True) / 1000,
        "doffs": _number(path, "doffs", fields.get("doffs", "0")),
    }


def _pairs_in_folders(left: Path, right: Path) -> list[tuple[str, Path, Path]]:
    views = [{path.name: path for path in list_images(folder)} for folder in (left, right)]
    both = views[0].keys() & views[1].keys()
    for here, there, folder in ((views[0], views[1], right), (views[1], views[0], left)):
        for name in sorted(here.keys() - there.keys()):
            warnings.warn(
                f"left out: {here[name]} must have a partner of its name in {folder}, got none",
                RuntimeWarning,
                stacklevel=4,
            )
    if not both:
        raise FileNotFoundError(
            f"{left} and {right} must hold images of equal names, got none; rename one of each pair"
        )
    return [(Path(name).stem, views[0][name], views[1][name]) for name in sorted(both)]


def _number(path: Path, name: str, given: str | None, *, above_zero: bool = False) -> float:
    value = float(given) if given is not None and re.fullmatch(_NUMBER, given) else None
    if value is None or not isfinite(value) or (above_zero and value <= 0):
        wanted = "a number above 0" if above_zero else "a number"
        raise ValueError(f"{path} must have {wanted} for {name}, got {given if given is not None else 'no such line'}")
    return value
