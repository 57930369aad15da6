"""What a trained detector leaves in its run's folder: measured numbers after a test, pictures after a prediction.

After a test

    results.json       every detection, as COCO's results: what COCO's own tools read
    statistics.json    the number of images, and the 12 statistics of boxes and of masks; null where COCO has none
    per_class.csv      average precision of each category

and after a prediction

    predictions/<name>.png      each image with its detections drawn
    predictions/results.json    the detections in the form of COCO's annotations, with a score each
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from lineara.runs.files import atomic_write, write_text
from lineara.tasks.instance_segmentation.coco_entries import mask_area
from lineara.tasks.instance_segmentation.metrics import Evaluation, as_results
from lineara.viz import detections

_TITLES = {
    "ap": "average precision, IoU 0.50 to 0.95",
    "ap50": "average precision, IoU 0.50",
    "ap75": "average precision, IoU 0.75",
    "ap_small": "average precision, small objects",
    "ap_medium": "average precision, medium objects",
    "ap_large": "average precision, large objects",
    "ar1": "average recall, 1 detection per image",
    "ar10": "average recall, 10 detections per image",
    "ar100": "average recall, 100 detections per image",
    "ar_small": "average recall, small objects",
    "ar_medium": "average recall, medium objects",
    "ar_large": "average recall, large objects",
}


def statistics_table(statistics: Mapping[str, float], *, num_images: int, left_out: int = 0) -> str:
    """COCO's 12 statistics of boxes and of masks, one line each.

    Args:
        statistics: of an `Evaluation`.
        num_images: how many images were evaluated.
        left_out: how many of the split were not.
    """
    width = max(map(len, _TITLES.values()))
    measured = f"{num_images:,} image{'' if num_images == 1 else 's'}" + (
        f", {left_out:,} left out" if left_out else ""
    )
    lines = [f"{measured:{width}}     box    mask"]
    for name, title in _TITLES.items():
        box, mask = (_three_digits(statistics[f"{kind}_{name}"]) for kind in ("box", "mask"))
        lines.append(f"{title:{width}}  {box:>6}  {mask:>6}")
    return "\n".join(lines)


def write_results(run_dir: Path | str, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results.json, a list in COCO's format of results, whole or not at all."""
    _write_json(Path(run_dir) / "results.json", results)


def write_evaluation(run_dir: Path | str, evaluation: Evaluation, *, num_images: int, left_out: int = 0) -> None:
    """Write statistics.json and per_class.csv, each whole or not at all.

    Args:
        run_dir: folder of the run.
        evaluation: of its results.
        num_images: how many images were evaluated.
        left_out: how many of the split were not.
    """
    folder = Path(run_dir)
    numbers = {name: None if isnan(value) else value for name, value in evaluation.statistics.items()}
    write_text(
        folder / "statistics.json", json.dumps({"images": num_images, "left_out": left_out, **numbers}, indent=1) + "\n"
    )
    text = io.StringIO()
    table = csv.DictWriter(text, ["category", "box_ap", "box_ap50", "mask_ap", "mask_ap50"], extrasaction="ignore")
    table.writeheader()
    table.writerows(evaluation.per_class)
    write_text(folder / "per_class.csv", text.getvalue())


class PredictionFolder:
    """The detections in images without annotations, drawn and written.

    Args:
        folder: where to write; made when it is missing.
        categories: names of the labels.
        score_threshold: detections with a lower score are left out.
    """

    def __init__(self, folder: Path | str, categories: Mapping[int, str], *, score_threshold: float) -> None:
        self.folder = Path(folder)
        self.categories = categories
        self.score_threshold = score_threshold
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._taken: set[str] = set()

    def add(self, image: Tensor, prediction: dict[str, Tensor], *, file_name: str, image_id: int) -> Path:
        """Draw the detections in one image, and keep them for `finish`.

        Args:
            image: (3, height, width), in 0..1.
            prediction: what torchvision's Mask R-CNN answers: boxes, labels, scores and masks.
            file_name: of the image. The picture bears its stem, or the whole name where the stem has been taken by an
                image of another format.
            image_id: of the image.

        Returns:
            The picture's path.
        """
        sure = prediction["scores"] >= self.score_threshold
        kept = {name: values[sure].cpu() for name, values in prediction.items()}
        height, width = image.shape[1:]
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for result in as_results(image_id, kept):
            area = mask_area(result["segmentation"], height, width)
            number = len(self._annotations) + 1
            self._annotations.append({"id": number, **result, "area": area, "iscrowd": 0})
        path = self.folder / f"{self._free_name(Path(file_name))}.png"
        figure = detections(
            image, kept["boxes"], kept["labels"], kept["scores"], kept["masks"], names=self.categories, title=""
        )
        with atomic_write(path) as temporary:
            figure.savefig(temporary)
        return path

    def finish(self) -> Path:
        """Write the detections in all images, and return the file's path."""
        path = self.folder / "results.json"
        categories = [{"id": number, "name": name} for number, name in sorted(self.categories.items())]
        _write_json(path, {"images": self._images, "categories": categories, "annotations": self._annotations})
        return path

    def _free_name(self, file: Path) -> str:
        """One that no picture before bears, in any mixture of capitals: some file systems do not tell them apart."""
        name, number = file.stem, 1
        while name.casefold() in self._taken:
            name = file.name if number == 1 else f"{file.name}-{number}"
            number += 1
        self._taken.add(name.casefold())
        return name


def _write_json(path: Path, content: object) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)


def _three_digits(value: float) -> str:
    return "-" if isnan(value) else f"{value:.3f}"
