"""Pairs of images without a truth."""

import glob
import re
import warnings
from pathlib import Path

from lineara.tasks.image_files import list_images


def pairs_to_predict(left: str | None, right: str | None) -> list[tuple[str, Path, Path]]:
    """Name, left and right file of each pair.

    Args:
        left, right: two images, or two folders, whose images of equal names are pairs, or two patterns such as
            `scenes/*/im0.png` and `scenes/*/im1.png`, whose `*` stand for the same in both. An image without a partner
            is warned of and left out.

    Returns:
        Names are those of the files; of views in one folder, which sets of scenes all name alike, with the folder
        before it. A name may come twice: what is written by it gets a number.

    Raises:
        ValueError: they are not both given, or not both images or both folders.
        FileNotFoundError: one does not exist, or the folders have no pair.
    """
    if left is None or right is None:
        raise ValueError(
            f"predict_left and predict_right must be two images or two folders, got {left} and {right}; set "
            "--data.predict_left and --data.predict_right"
        )
    if "*" in left or "*" in right:
        return _pairs_of_patterns(left, right)
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
        return [(_name(*views), *views)]
    return _pairs_in_folders(*views)


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


def in_place_of_stars(pattern: str, path: str) -> list[str] | None:
    """What the stars of a pattern stand for in a path; None where it does not match."""
    found = re.fullmatch("([^/]*)".join(map(re.escape, pattern.split("*"))), path)
    return None if found is None else list(found.groups())


def _pairs_of_patterns(left: str, right: str) -> list[tuple[str, Path, Path]]:
    if left.count("*") != right.count("*"):
        raise ValueError(
            f"predict_left and predict_right must have as many *, got {left} and {right}; write a * where they are "
            "alike"
        )
    pairs: list[tuple[str, Path, Path]] = []
    for found in sorted(glob.glob(left)):  # noqa: PTH207 - hidden names stay out
        parts = iter(in_place_of_stars(left, found) or ())
        partner = Path("".join(next(parts, "") if part == "*" else part for part in re.split(r"(\*)", right)))
        if partner.is_file():
            pairs.append((_name(Path(found), partner), Path(found), partner))
        else:
            warnings.warn(f"left out: {found} must have a partner {partner}, got none", RuntimeWarning, stacklevel=4)
    if not pairs:
        raise FileNotFoundError(f"{left} and {right} must be patterns of pairs, got no pair; name others")
    return pairs


def _name(left: Path, right: Path) -> str:
    return f"{left.resolve().parent.name}/{left.stem}" if left.parent == right.parent else left.stem
