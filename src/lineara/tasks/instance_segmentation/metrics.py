"""From predictions to COCO's results, and from these to COCO's 12 statistics of boxes and 12 of masks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from lineara.tasks.instance_segmentation.coco_entries import encode

# In the order of COCO's own summary.
STATISTICS = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large"),
)
_KINDS: dict[str, Literal["bbox", "segm"]] = {"box": "bbox", "mask": "segm"}
_ALL_AREAS, _HUNDRED_DETECTIONS = 0, -1

Result = dict[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """COCO's scores, from 0 to 1, NaN where there is nothing to be found.

    Args:
        statistics: "box_ap", "box_ap50", ..., "mask_ar_large": "box_" and "mask_" before each of `STATISTICS`.
        per_class: of each category, in the order of ids: category (its name), box_ap, box_ap50, mask_ap, mask_ap50.
    """

    statistics: dict[str, float]
    per_class: list[dict[str, Any]] = field(default_factory=list)


def as_results(image_id: int, prediction: dict[str, Tensor], *, mask_threshold: float = 0.5) -> list[Result]:
    """What a detector found in one image, in COCO's format of results.

    Args:
        image_id: of the image.
        prediction: boxes (n, 4), left, top, right and bottom in pixels; labels (n,), category ids; scores (n,); masks
            (n, 1, height, width) or (n, height, width), probabilities from 0 to 1, or booleans.
        mask_threshold: a pixel is the object's where its probability is above it.

    Returns:
        For each object image_id, category_id, bbox (left, top, width and height in pixels), score, and segmentation, a
        run-length encoding of its mask as text.

    Raises:
        ValueError: for tensors of different numbers of objects, or of other shapes.
    """
    boxes, labels, scores, masks = (prediction[name].detach() for name in ("boxes", "labels", "scores", "masks"))
    if masks.ndim == 4:
        masks = masks.flatten(0, 1)  # (n, height, width)
    number = len(scores)
    if boxes.shape != (number, 4) or labels.shape != (number,) or masks.ndim != 3 or len(masks) != number:
        raise ValueError(
            "a prediction must hold boxes (n, 4), labels (n,), scores (n,) and masks (n, 1, height, width), got "
            f"{', '.join(f'{name} {tuple(prediction[name].shape)}' for name in ('boxes', 'labels', 'scores', 'masks'))}"
        )
    boxes = boxes.double()
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).cpu().tolist()  # left, top, width, height
    binary = (masks if masks.dtype == torch.bool else masks > mask_threshold).to("cpu", torch.uint8)
    return [
        {
            "image_id": int(image_id),
            "category_id": label,
            "bbox": corner,
            "score": score,
            "segmentation": encode(mask.numpy()),
        }
        for corner, label, score, mask in zip(corners, labels.tolist(), scores.double().tolist(), binary)
    ]


def evaluate(
    annotations: dict[str, Any], results: Sequence[Result], *, image_ids: Sequence[int] | None = None
) -> Evaluation:
    """COCO's statistics of results.

    At most 100 results of an image count for a category. Objects are small below an area of 32 x 32 pixels and large
    above 96 x 96. Results of categories that are not annotated do not count.

    Args:
        annotations: a COCO set with its images, annotations and categories, as `CocoData.annotations` gives it.
        results: as `as_results` gives them.
        image_ids: evaluate these images alone.

    Returns:
        The statistics of all categories together, and a few of each.

    Raises:
        ValueError: for a result or an id in `image_ids` of an image that is not annotated.

    Source: pycocotools' COCOeval, whose numbers these are, by way of faster-coco-eval. We differ in one point, as
        detectron2 does: whether a found mask is small, medium or large depends on its own area, not on its box's.
    """
    known = {image["id"] for image in annotations["images"]}
    wanted = known if image_ids is None else {int(image_id) for image_id in image_ids}
    unknown = (wanted | {result["image_id"] for result in results}) - known
    if unknown:
        raise ValueError(
            f"results must be of images that are annotated, got image {min(unknown)}, which is not; evaluate them "
            "against the annotations of the split that they were made from"
        )
    truth = _truth(annotations, wanted)
    found = [result for result in results if result["image_id"] in wanted]
    statistics = dict[str, float]()
    per_class = [{"category": category["name"]} for category in truth["categories"]]
    for kind, iou_type in _KINDS.items():
        overall, of_classes = _scores(truth, found, iou_type)
        statistics |= {f"{kind}_{name}": value for name, value in zip(STATISTICS, overall)}
        for row, (ap, ap50) in zip(per_class, of_classes):
            row |= {f"{kind}_ap": ap, f"{kind}_ap50": ap50}
    return Evaluation(statistics, per_class)


def _truth(annotations: dict[str, Any], image_ids: set[int]) -> dict[str, Any]:
    """The part of the set that is evaluated; copies, because the library writes into what it is given."""
    of_images = [dict(annotation) for annotation in annotations["annotations"] if annotation["image_id"] in image_ids]
    for number, annotation in enumerate(of_images, start=1):
        annotation["id"] = number  # an id of 0 would count as not found
    return {
        "images": [dict(image) for image in annotations["images"] if image["id"] in image_ids],
        "annotations": of_images,
        "categories": sorted(map(dict, annotations["categories"]), key=lambda category: category["id"]),
    }


def _scores(
    truth: dict[str, Any], results: Sequence[Result], iou_type: Literal["bbox", "segm"]
) -> tuple[list[float], list[tuple[float, float]]]:
    """The 12 statistics, and AP and AP50 of each category."""
    if not truth["images"] or not truth["categories"]:
        return [nan] * len(STATISTICS), [(nan, nan)] * len(truth["categories"])
    # Without a box, the library takes a mask's area from the mask.
    left_out = {"bbox": "segmentation", "segm": "bbox"}[iou_type]
    given = [{key: value for key, value in result.items() if key != left_out} for result in results]
    expected = COCO(truth)
    evaluation = COCOeval_faster(expected, expected.loadRes(given), iou_type, print_function=_say_nothing)
    evaluation.run()
    precision = np.asarray(evaluation.eval["precision"])[..., _ALL_AREAS, _HUNDRED_DETECTIONS]
    # (IoU thresholds, recall thresholds, categories); -1 where a category has no object
    ap50 = precision[np.isclose(evaluation.params.iouThrs, 0.5)]
    classes = range(precision.shape[2])
    overall = [_score(value) for value in evaluation.stats[: len(STATISTICS)]]
    return overall, [(_mean(precision[..., k]), _mean(ap50[..., k])) for k in classes]


def _score(value: float) -> float:
    return nan if value < 0 else float(value)


def _mean(precision: npt.NDArray[np.float64]) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else nan


def _say_nothing(*_: object, **__: object) -> None:
    pass
