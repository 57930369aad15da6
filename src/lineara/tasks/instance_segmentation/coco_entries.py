"""One image, annotation or category of a COCO file: what is wrong with it, and the mask that it describes."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt
from faster_coco_eval.core import mask as run_lengths

_IMAGE_KEYS = ("id", "file_name", "height", "width")
_WHOLE = ("id", "image_id", "category_id", "height", "width", "iscrowd")
_ANNOTATION_KEYS = ("id", "image_id", "category_id", "bbox", "segmentation")
_LONGEST_QUOTE = 60
_LARGEST_ID = 2**63 - 1  # what 64 bits hold
_NUMBERS = {int, float}  # and not bool, which Python counts among the whole numbers

Entry = dict[str, Any]


def normalized(entry: Any) -> Any:
    """The entry with whole numbers where a tool wrote 1.0, and 0 or 1 where it wrote false or true for iscrowd."""
    if not isinstance(entry, dict):
        return entry
    changed = {key: int(entry[key]) for key in _WHOLE if type(entry.get(key)) is float and entry[key].is_integer()}
    if type(entry.get("iscrowd")) is bool:
        changed["iscrowd"] = int(entry["iscrowd"])
    return entry | changed if changed else entry


def without_stray_parts(entry: Any) -> Any:
    """The annotation without polygons of fewer than 3 points, where others remain."""
    polygons = entry.get("segmentation") if isinstance(entry, dict) else None
    if not isinstance(polygons, list):
        return entry
    kept = [polygon for polygon in polygons if not isinstance(polygon, list) or len(polygon) >= 6]
    return entry | {"segmentation": kept} if kept and len(kept) < len(polygons) else entry


def image_reason(entry: Any) -> str | None:
    """What is wrong with an image, or None."""
    why = _reason_about_keys(entry, _IMAGE_KEYS)
    if why is not None:
        return why
    if not isinstance(entry["file_name"], str) or not entry["file_name"]:
        return f"file_name must be a name, got {_quoted(entry['file_name'])}"
    for key in ("height", "width"):
        if type(entry[key]) is not int or entry[key] < 1:
            return f"{key} must be a whole number of pixels of at least 1, got {_quoted(entry[key])}"
    return None


def category_reason(entry: Any) -> str | None:
    """What is wrong with a category, or None."""
    why = _reason_about_keys(entry, ("id", "name"))
    if why is not None:
        return why
    if not isinstance(entry["name"], str):
        return f"name must be text, got {_quoted(entry['name'])}"
    return None


def annotation_reason(entry: Any, images: Mapping[int, Entry], categories: Mapping[int, Entry]) -> str | None:
    """What is wrong with an annotation of one of these images and categories, or None."""
    why = _reason_about_keys(entry, _ANNOTATION_KEYS)
    if why is not None:
        return why
    image_id, category_id = entry["image_id"], entry["category_id"]
    if type(image_id) is not int or image_id not in images:
        return f"image_id must be that of a listed image, got {_quoted(image_id)}"
    if type(category_id) is not int or category_id not in categories:
        return f"category_id must be that of a listed category, got {_quoted(category_id)}"
    is_crowd, area = entry.get("iscrowd", 0), entry.get("area", 0)
    if type(is_crowd) is not int or is_crowd not in (0, 1):
        return f"iscrowd must be 0 or 1, got {_quoted(is_crowd)}"
    if not _is_finite([area]) or area < 0:
        return f"area must be a finite number of at least 0, got {_quoted(area)}"
    height, width = images[image_id]["height"], images[image_id]["width"]
    return _box_reason(entry["bbox"], height, width) or _segmentation_reason(entry["segmentation"], height, width)


def decode(segmentation: Any, height: int, width: int) -> npt.NDArray[np.uint8]:
    """The mask (height, width) of 0 and 1 that a checked segmentation describes."""
    return run_lengths.decode(_encoded(segmentation, height, width))


def encode(mask: npt.NDArray[np.uint8]) -> Entry:
    """Run-length encoding of a mask (height, width) of 0 and 1, as text that JSON can hold."""
    encoded: Any = run_lengths.encode(np.asfortranarray(mask))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def mask_area(segmentation: Any, height: int, width: int) -> float:
    """The number of pixels of a checked segmentation."""
    return float(run_lengths.area(_encoded(segmentation, height, width)))


def _encoded(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        polygons: Any = run_lengths.frPyObjects(segmentation, height, width)
        return run_lengths.merge(polygons)
    if isinstance(segmentation["counts"], list):
        return run_lengths.frPyObjects(segmentation, height, width)
    return segmentation


def _reason_about_keys(entry: Any, keys: tuple[str, ...]) -> str | None:
    if not isinstance(entry, dict):
        return f"it must be an object with {', '.join(keys)}, got {_quoted(entry)}"
    for key in keys:
        if key not in entry:
            return f"it must have {', '.join(keys)}, got no {key}"
    if type(entry["id"]) is not int or not 0 <= entry["id"] <= _LARGEST_ID:
        return f"its id must be a whole number from 0 to 2**63 - 1, got {_quoted(entry['id'])}"
    return None


def _box_reason(box: Any, height: int, width: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not _is_finite(box) or box[2] <= 0 or box[3] <= 0:
        return f"bbox must be 4 finite numbers with a width and a height above 0, got {_quoted(box)}"
    left, top, box_width, box_height = box
    if not (left < width and top < height and left + box_width > 0 and top + box_height > 0):
        return f"bbox must overlap its image of {width} x {height} pixels (width x height), got {_quoted(box)}"
    return None


def _segmentation_reason(segmentation: Any, height: int, width: int) -> str | None:
    if isinstance(segmentation, list):
        return _polygons_reason(segmentation, height, width)
    if not isinstance(segmentation, dict) or "size" not in segmentation or "counts" not in segmentation:
        return f"segmentation must be polygons, or size and counts of run lengths, got {_quoted(segmentation)}"
    size = segmentation["size"]
    if size != [height, width] or set(map(type, size)) != {int}:
        return f"the size of its run lengths must be the image's [{height}, {width}], got {_quoted(size)}"
    counts = segmentation["counts"]
    try:
        lengths = counts if isinstance(counts, list) else _read_counts(counts)
        whole = all(type(length) is int and length >= 0 for length in lengths)
    except (TypeError, ValueError):
        return f"its run lengths must be a list of numbers or COCO's text, got {_quoted(counts)}"
    if not whole or sum(lengths) != height * width:
        total = sum(lengths) if whole else _quoted(counts)
        return f"its run lengths must be at least 0 and sum to {height} x {width} = {height * width}, got {total}"
    if not any(lengths[1::2]):
        return f"its run lengths must have a pixel of the object, got none in {_quoted(counts)}"
    return None


def _polygons_reason(polygons: list[Any], height: int, width: int) -> str | None:
    """Looks at the bounds of polygons alone: to draw those of COCO would take minutes."""
    if not polygons:
        return "segmentation must be at least one polygon, got none"
    is_seen = False
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not _is_finite(polygon):
            return f"a polygon must be at least 3 points [x, y, x, y, x, y] of finite numbers, got {_quoted(polygon)}"
        columns, rows = polygon[0::2], polygon[1::2]
        left, right, top, bottom = min(columns), max(columns), min(rows), max(rows)
        # What draws a polygon goes along its sides step by step, however far from the image they are.
        if left < -width or right > 2 * width or top < -height or bottom > 2 * height:
            return (
                f"a polygon must not go further than one image size beyond its image of {width} x {height} pixels "
                f"(width x height), got x from {left:g} to {right:g} and y from {top:g} to {bottom:g}"
            )
        # Parts of an object may be flat or lie outside; not all of them.
        is_seen |= max(left, 0) < min(right, width) and max(top, 0) < min(bottom, height)
    if not is_seen:
        return (
            f"segmentation must cover some of its image of {width} x {height} pixels (width x height), got polygons "
            f"that are flat or outside, {_quoted(polygons)}"
        )
    return None


def _read_counts(text: Any) -> list[int]:
    """Run lengths of COCO's text: 5 bits a character, the lowest first; from the fourth on, the change from two before.

    Raises:
        TypeError: for what is no text.
        ValueError: for another character, or a number that does not end.
    """
    if not isinstance(text, str):
        raise TypeError("not text")
    counts = list[int]()
    value = shift = 0
    for character in text.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"not a character of run lengths: {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:  # the number goes on
            continue
        if bits & 16:  # it is negative
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("the last number does not end")
    return counts


def _is_finite(numbers: list[Any]) -> bool:
    try:
        return set(map(type, numbers)) <= _NUMBERS and isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False


def _quoted(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[: _LONGEST_QUOTE - 3]}..."
