"""Pathfinder files: the cache of generated examples, and the published folders of PNG images."""

import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from lineara.tasks.long_range_arena.generated_files import GeneratedFiles, check_sizes, cut
from lineara.tasks.long_range_arena.pathfinder import PathfinderExamples, generate
from lineara.tasks.long_range_arena.pathfinder_board import SIZE, PathfinderDrawing

_BENCHMARK = PathfinderDrawing()
_FILES = GeneratedFiles("pathfinder", "Pathfinder", 1, PathfinderExamples, ("images", "labels"))
_HARD = "curv_contour_length_14"
_LAYOUT = (
    "it holds metadata/<k>.npy, text files with a line `imgs/<k> sample_<i>.png <i> <label> ...` per image, and "
    "imgs/<k>/sample_<i>.png"
)
_NAMED_PATHS = 3


def prepare_pathfinder(
    data_root: Path | str,
    *,
    num_train: int = 160_000,
    num_val: int = 20_000,
    num_test: int = 20_000,
    drawing: PathfinderDrawing = _BENCHMARK,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Draw the three splits into `<data_root>/pathfinder/`, or find them there, and return the file's path.

    The file appears whole or not at all. One that is damaged is reported by a warning and drawn again.

    Args:
        data_root: folder, made if missing.
        num_train, num_val, num_test: examples of each split, at least 0.
        drawing, seed, num_workers, progress: as for `pathfinder.generate`.

    Raises:
        ValueError: an argument is out of range, or the contours of the drawing do not fit the image.
        OSError: the file cannot be read or written; noticed before the work, but for a disk that fills up.

    Cost: for the benchmark's sizes, about 60 MB on disk and 300 MB of memory.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    check_sizes(sizes)
    path = Path(data_root) / "pathfinder" / _file_name(drawing, seed, sizes)

    def draw() -> dict[str, PathfinderExamples]:
        examples = generate(sum(sizes.values()), drawing=drawing, seed=seed, num_workers=num_workers, progress=progress)
        return cut(examples, sizes)

    return _FILES.prepare(path, {**asdict(drawing), "seed": seed, **sizes}, draw)


def load_pathfinder(path: Path | str) -> dict[str, PathfinderExamples]:
    """The splits "train", "val" and "test" of a file that `prepare_pathfinder` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another format version.
    """
    return _FILES.load(Path(path))


def load_pathfinder_folder(folder: Path | str) -> dict[str, PathfinderExamples]:
    """The splits "train", "val" and "test" of a published folder: 80, 10 and 10 % in the order of its metadata.

    Images that are missing or broken are left out (one of the published ones is empty) and reported by one warning.

    Args:
        folder: one that holds `imgs/` and `metadata/`, or whose `curv_contour_length_14/`, the hard set, does.

    Raises:
        FileNotFoundError: there is no metadata, or none of its images.
        ValueError: a line of the metadata is broken, or an image is not of 32 x 32 pixels; names the file.
    """
    folder = _folder_with_metadata(Path(folder))
    images, labels, broken = list[npt.NDArray[np.uint8]](), list[int](), list[Path]()
    for path, label in _listed(folder):
        image = _read_png(path)
        if image is None:
            broken.append(path)
        else:
            images.append(image)
            labels.append(label)
    if not images:
        raise FileNotFoundError(f"{folder} must hold the images that its metadata lists, got none; {_LAYOUT}")
    if broken:
        named = ", ".join(map(str, broken[:_NAMED_PATHS])) + (", ..." if len(broken) > _NAMED_PATHS else "")
        warnings.warn(
            f"{len(broken)} of {len(images) + len(broken)} images are missing or broken and left out: {named}",
            RuntimeWarning,
            stacklevel=2,
        )
    examples = PathfinderExamples(np.stack(images), np.array(labels, np.uint8))
    val, test = len(examples) * 8 // 10, len(examples) * 9 // 10
    return cut(examples, {"train": val, "val": test - val, "test": len(examples) - test})


def _file_name(drawing: PathfinderDrawing, seed: int, sizes: dict[str, int]) -> str:
    """Every setting that is not the benchmark's is part of the name."""
    settings, usual = asdict(drawing), asdict(_BENCHMARK)
    drawn = [f"len{settings.pop('contour_len')}"]
    drawn += [f"{name.replace('_', '')}{value}" for name, value in settings.items() if value != usual[name]]
    return f"pathfinder-{'-'.join(drawn)}-seed{seed}-{'-'.join(map(str, sizes.values()))}.npz"


def _folder_with_metadata(folder: Path) -> Path:
    for candidate in (folder, folder / _HARD):
        if _metadata(candidate):
            return candidate
    raise FileNotFoundError(
        f"{folder} must be a published folder such as {_HARD}, got no metadata/<k>.npy in it; {_LAYOUT}; name it or "
        "generate examples with `lineara data pathfinder`"
    )


def _metadata(folder: Path) -> list[Path]:
    """In the order of their numbers."""
    files = [path for path in (folder / "metadata").glob("[!.]*.npy") if path.stem.isdecimal()]
    return sorted(files, key=lambda path: int(path.stem))


def _listed(folder: Path) -> list[tuple[Path, int]]:
    """Path and label of every image."""
    listed = list[tuple[Path, int]]()
    for file in _metadata(folder):
        for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
            columns = line.split()
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                raise ValueError(
                    f"{file}, line {number}: must be `imgs/<k> sample_<i>.png <i> <label> ...` with the label 0 or 1, "
                    f"got {line[:80]!r}"
                )
            listed.append((folder / columns[0] / columns[1], int(columns[3])))
    return listed


def _read_png(path: Path) -> npt.NDArray[np.uint8] | None:
    """Pixels, or None where there is no whole image."""
    try:
        with Image.open(path) as file:
            image = file.convert("L")
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError):  # what the library raises for damaged content
        return None
    if image.size != (SIZE, SIZE):
        raise ValueError(f"{path} must be an image of {SIZE} x {SIZE} pixels, got {image.width} x {image.height}")
    return np.array(image)
