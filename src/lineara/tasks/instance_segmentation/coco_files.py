"""COCO's annotation files: read, and checked entry by entry before any of it is used.

A file is one JSON object, of which these keys count:

    images        list of {"id", "file_name", "height", "width"}
    annotations   list of {"id", "image_id", "category_id", "bbox": [left, top, width, height] in pixels,
                  "segmentation", "iscrowd": 0 or 1, 0 if missing, "area" in pixels, the mask's if missing}
    categories    list of {"id", "name"}

A file of test images, such as COCO's image_info_test-dev2017.json, has no list of annotations.

A segmentation is a list of polygons [x, y, x, y, ...], or a run-length encoding {"size": [height, width], "counts"}
whose counts are a list of numbers, or COCO's text.
"""

import gc
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lineara.tasks.instance_segmentation.coco_entries import (
    Entry,
    annotation_reason,
    category_reason,
    image_reason,
    mask_area,
    normalized,
    without_stray_parts,
)

_SHOWN = 10
_LISTS = ("images", "annotations", "categories")
# The published instances_train2017.json has an object of height 0 in each of these images.
_IMAGES_WITH_A_FLAT_OBJECT = (200365, 550395)


def read_annotations(
    path: Path | str,
    *,
    image_folder: Path | str | None = None,
    skip_broken: bool = False,
) -> Entry:
    """The images, annotations and categories of a file, all of them checked.

    Args:
        path: the file.
        image_folder: where every image must lie; None does not look.
        skip_broken: leave out broken images, with their annotations, and broken annotations, and warn of each, of more
            than 10 by their number. Otherwise only the two flat objects of COCO's own training file are left out.

    Returns:
        {"images", "annotations", "categories"}, with iscrowd and area in every annotation; "annotations" is None where
        the file has no such list. "num_left_out" images were left out.

    Raises:
        FileNotFoundError: there is no such file, or an image is missing.
        ValueError: the file is damaged, or an entry is broken; names the file and the entry's id.
    """
    path = Path(path)
    with without_garbage_collection():
        content = _read(path)
        broken = BrokenItems(are_counted=True)
        categories = _checked(path, "category", content["categories"], category_reason)
        if not categories:
            raise ValueError(
                f"{path} must list at least one category, got none; add those of its objects, or name another file"
            )
        uses = Counter(_id(entry) for entry in content["images"])

        def reason_of_image(entry: Any) -> str | None:
            if _id(entry) is not None and uses[_id(entry)] > 1:
                return "its id must be its own, got one that another image has"
            return image_reason(entry)

        images = _checked(path, "image", content["images"], reason_of_image, broken if skip_broken else None)
        if image_folder is not None:
            images = _present(path, images, Path(image_folder), broken if skip_broken else None)
        # Their image is reported; each of them need not be.
        left_out = {_id(entry) for entry in content["images"]} - images.keys() - {None} if skip_broken else set()

        def reason(entry: Any) -> str | None:
            return annotation_reason(entry, images, categories)

        whole = list(map(without_stray_parts, content["annotations"] or ()))
        stray = sum(entry is not before for entry, before in zip(whole, content["annotations"] or ()))
        if stray:
            warnings.warn(
                f"{path}: polygons of fewer than 3 points are left out of {stray} annotations",
                RuntimeWarning,
                stacklevel=2,
            )
        given = [
            entry
            for entry in whole
            if _id(entry, "image_id") not in left_out and not _is_published_fault(path, entry, broken)
        ]
        annotations = _checked(path, "annotation", given, reason, broken if skip_broken else None)
        for annotation in annotations.values():
            _complete(annotation, images)
    broken.tell_of_the_rest(path)
    return {
        "images": list(images.values()),
        "annotations": None if content["annotations"] is None else list(annotations.values()),
        "categories": list(categories.values()),
        "num_left_out": len(content["images"]) - len(images),
    }


class BrokenItems:
    """Warns of broken things: of the first ten one by one, of the others by their number.

    Args:
        are_counted: whether `tell_of_the_rest` will be called, because there is an end to them.
    """

    def __init__(self, *, are_counted: bool) -> None:
        self.are_counted = are_counted
        self.count = 0

    def add(self, sentence: str) -> None:
        self.count += 1
        if self.count <= _SHOWN:
            end = "" if self.are_counted or self.count < _SHOWN else "; further ones are left out without a word"
            warnings.warn(f"left out: {sentence}{end}", RuntimeWarning, stacklevel=2)

    def tell_of_the_rest(self, path: Path) -> None:
        rest = self.count - _SHOWN
        if rest > 0:
            warnings.warn(f"left out: {rest} more broken entries of {path}", RuntimeWarning, stacklevel=3)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Millions of new lists make the collector search, in vain, for half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(path: Path) -> Entry:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be an annotation file in COCO's format, got no such file; put it there or name another one"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be whole JSON, got a damaged file ({error}); get it again") from error
    if isinstance(content, dict):
        for key in _LISTS:
            if isinstance(content.get(key), list):
                content[key] = list(map(normalized, content[key]))
        content.setdefault("annotations", None)
    required = ("images", "categories") if isinstance(content, dict) and content["annotations"] is None else _LISTS
    missing = [key for key in required if not (isinstance(content, dict) and isinstance(content.get(key), list))]
    if missing:
        raise ValueError(
            f"{path} must hold the lists images, annotations and categories, got no list {missing[0]}; name a file of "
            "COCO's kind instances_*.json"
        )
    return content


def _checked(
    path: Path,
    kind: str,
    entries: list[Any],
    reason: Callable[[Any], str | None],
    broken: BrokenItems | None = None,
) -> dict[int, Entry]:
    """The good entries by their ids; a broken one is refused unless it can be told to `broken`."""
    good = dict[int, Entry]()
    for position, entry in enumerate(entries):
        why = reason(entry)
        if why is None and kind == "category" and entry["id"] in good:
            why = "its id must be its own, got one that an earlier category has"
        if why is None:  # annotations are known by their place: tools that join files leave their ids as they were
            good[position if kind == "annotation" else entry["id"]] = entry
            continue
        has_id = isinstance(entry, dict) and "id" in entry
        name = f"{kind} {entry['id']}" if has_id else f"{kind} at position {position} of its list"
        if broken is None:
            advice = "mend the file" if kind == "category" else "mend the file or set skip_broken"
            raise ValueError(f"{path}, {name}: {why}; {advice}")
        broken.add(f"{path}, {name}: {why}")
    return good


def _present(path: Path, images: dict[int, Entry], folder: Path, broken: BrokenItems | None) -> dict[int, Entry]:
    # One listing is much faster than a question for each of 118,000 files, above all over a network.
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set[str]()
    present = dict[int, Entry]()
    for number, image in images.items():
        name = image["file_name"]
        if name in names or ("/" in name and (folder / name).is_file()):
            present[number] = image
            continue
        if "\\" in name and (folder / name.replace("\\", "/")).is_file():  # as Windows separates folders
            present[number] = image | {"file_name": name.replace("\\", "/")}
            continue
        sentence = f"{path}, image {number}: {folder / name} must be an image file, got no such file"
        if broken is None:
            raise FileNotFoundError(f"{sentence}; put it there or set skip_broken")
        broken.add(sentence)
    return present


def _id(entry: Any, key: str = "id") -> int | None:
    number = entry.get(key) if isinstance(entry, dict) else None
    return number if type(number) is int else None


def _is_published_fault(path: Path, annotation: Any, broken: BrokenItems) -> bool:
    if _id(annotation, "image_id") not in _IMAGES_WITH_A_FLAT_OBJECT:
        return False
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and box[3] == 0):
        return False
    broken.add(f"{path}, annotation {annotation.get('id')}: a flat object of COCO's own training set, bbox {box}")
    return True


def _complete(annotation: Entry, images: dict[int, Entry]) -> None:
    annotation.setdefault("iscrowd", 0)
    if "area" not in annotation:
        image = images[annotation["image_id"]]
        annotation["area"] = mask_area(annotation["segmentation"], image["height"], image["width"])
