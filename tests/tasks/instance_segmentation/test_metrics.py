"""COCO's statistics: equal to pycocotools', to what one can work out by hand, and quiet."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools import mask as oracle_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lineara.tasks.instance_segmentation.metrics import STATISTICS, as_results, evaluate

HEIGHT, WIDTH = 151, 173
CATEGORIES = (1, 4, 7, 9)  # nothing is annotated as 7, and nothing is found as 9
NAMES = [f"{kind}_{name}" for kind in ("box", "mask") for name in STATISTICS]


def blob(random, size):
    """A mask of a bent rectangle, of whatever size."""
    height, width = random.integers(4, size, 2)
    top, left = random.integers(0, HEIGHT - height), random.integers(0, WIDTH - width)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[top : top + height, left : left + width] = 1
    mask[top : top + height // 2, left + width // 2 : left + width] = 0
    return mask


def entry(mask, image_id, category_id, **more):
    encoded = oracle_mask.encode(mask)
    box = oracle_mask.toBbox(encoded).tolist()
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "segmentation": segmentation, **more}


def shaken(random, mask, shift):
    return np.asfortranarray(np.roll(mask, random.integers(-shift, shift + 1, 2), (0, 1)))


def random_set(seed, *, images=13, results_per_object=2.0):
    """Objects of all sizes in some images, and results near them and elsewhere, many with the same score."""
    random = np.random.default_rng(seed)
    truth = {
        "images": [{"id": 100 + i, "height": HEIGHT, "width": WIDTH, "file_name": str(i)} for i in range(images)],
        "categories": [{"id": i, "name": f"kind {i}"} for i in reversed(CATEGORIES)],
        "annotations": [],
    }
    results = []
    for image in truth["images"][::2]:
        for _ in range(random.integers(1, 9)):
            mask = blob(random, random.choice([14, 60, 150]))
            category = int(random.choice([1, 4, 9]))
            crowd = int(random.random() < 0.2)
            area = float(mask.sum())
            truth["annotations"].append(entry(mask, image["id"], category, iscrowd=crowd, area=area))
            for _ in range(random.poisson(results_per_object)):
                found = {1: 1, 4: 4, 9: 7}[category] if random.random() < 0.9 else 4
                score = round(float(random.random()), 1)
                results.append(entry(shaken(random, mask, 5), image["id"], found, score=score))
    for image in truth["images"][::3]:
        for _ in range(random.integers(0, 5)):
            results.append(entry(blob(random, 70), image["id"], 1, score=round(float(random.random()), 1)))
    for number, annotation in enumerate(truth["annotations"], start=1):
        annotation["id"] = number
    return truth, results


def by_pycocotools(truth, results, image_ids=None, categories=None):
    """The same names and numbers by COCO's own tools, which write into what they are given and print."""
    statistics = {}
    for kind, iou_type, left_out in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        with contextlib.redirect_stdout(io.StringIO()):
            expected = COCO()
            expected.dataset = copy.deepcopy({"info": {}, **truth})
            expected.createIndex()
            given = [{k: v for k, v in copy.deepcopy(result).items() if k != left_out} for result in results]
            evaluation = COCOeval(expected, expected.loadRes(given), iou_type)
            if image_ids is not None:
                evaluation.params.imgIds = list(image_ids)
            if categories is not None:
                evaluation.params.catIds = list(categories)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = [math.nan if value < 0 else float(value) for value in evaluation.stats]
        statistics |= {f"{kind}_{name}": value for name, value in zip(STATISTICS, values)}
    return statistics


def same(ours, theirs):
    return ours == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("seed", range(6))
def test_the_statistics_are_those_of_pycocotools(seed):
    truth, results = random_set(seed, results_per_object=0.5 + seed / 2)
    ours = evaluate(truth, results).statistics
    assert list(ours) == NAMES
    assert same(ours, by_pycocotools(truth, results))
    assert len({value for value in ours.values() if not math.isnan(value)}) > 12  # the sets are not too simple


def test_more_than_a_hundred_results_of_an_image_are_cut_as_by_pycocotools():
    truth, results = random_set(1)
    random = np.random.default_rng(0)
    image = truth["annotations"][0]["image_id"]
    results += [entry(blob(random, 90), image, 1, score=round(float(random.random()), 2)) for _ in range(130)]
    assert same(evaluate(truth, results).statistics, by_pycocotools(truth, results))


def test_sizes_at_the_limits_between_small_medium_and_large_are_those_of_pycocotools():
    truth, _ = random_set(0, images=1)
    truth["annotations"], results = [], []
    for number, area in enumerate((32 * 32 - 1, 32 * 32, 32 * 32 + 1, 96 * 96, 96 * 96 + 1), start=1):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        mask.T.reshape(-1)[:area] = 1
        assert mask.sum() == area
        truth["annotations"].append(entry(mask, 100, 1, id=number, iscrowd=0, area=area))
        results.append(entry(mask, 100, 1, score=number / 10))
    assert same(evaluate(truth, results).statistics, by_pycocotools(truth, results))


def test_only_the_images_asked_for_count():
    truth, results = random_set(2)
    some = [image["id"] for image in truth["images"][:5]]
    ours = evaluate(truth, results, image_ids=some)
    assert same(ours.statistics, by_pycocotools(truth, results, image_ids=some))
    assert ours.statistics["box_ap"] != evaluate(truth, results).statistics["box_ap"]
    assert all(math.isnan(value) for value in evaluate(truth, results, image_ids=[]).statistics.values())


def test_a_class_has_what_it_has_alone():
    truth, results = random_set(3)
    rows = evaluate(truth, results).per_class
    assert [row["category"] for row in rows] == ["kind 1", "kind 4", "kind 7", "kind 9"]
    for row, category in zip(rows, CATEGORIES):
        alone = by_pycocotools(truth, results, categories=[category])
        names = ["box_ap", "box_ap50", "mask_ap", "mask_ap50"]
        assert list(row) == ["category", *names]
        assert same([row[name] for name in names], [alone[name] for name in names])
    assert all(math.isnan(rows[2][name]) for name in names)  # nothing to be found
    assert [rows[3][name] for name in names] == [0.0] * 4  # nothing found


def test_a_case_worked_out_by_hand():
    """Two objects of 20 x 20 = 400 pixels. The surest result covers the first but for 5 columns: IoU 15 / 20 = 0.75,
    right at the 6 thresholds from 0.5 to 0.75. The second covers nothing. The third is the second object.

    At the 6 thresholds, right, wrong, right: precision is 1 up to recall 0.5, and 2/3 beyond; of the 101 recalls from
    0 to 1, 51 are at most 0.5. At the other 4, wrong, wrong, right: precision is 1/3 up to recall 0.5, then 0.
    """

    def rectangle(left, width):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        mask[40:60, left : left + width] = 1
        return mask

    truth, _ = random_set(0, images=1)
    truth["annotations"] = [entry(rectangle(left, 20), 100, 1, id=left, iscrowd=0, area=400) for left in (10, 70)]
    results = [
        entry(rectangle(left, width), 100, 1, score=score)
        for left, width, score in ((10, 15, 0.9), (120, 20, 0.8), (70, 20, 0.7))
    ]
    low, high = (51 * 1 + 50 * 2 / 3) / 101, 51 / 3 / 101
    expected = {
        **{"ap": (6 * low + 4 * high) / 10, "ap50": low, "ap75": low},
        **{"ap_small": (6 * low + 4 * high) / 10, "ap_medium": math.nan, "ap_large": math.nan},
        # One result an image: the first object at 6 thresholds. Ten: both at 6, the second at 4.
        **{"ar1": 0.5 * 6 / 10, "ar10": (1.0 * 6 + 0.5 * 4) / 10, "ar100": (1.0 * 6 + 0.5 * 4) / 10},
        **{"ar_small": (1.0 * 6 + 0.5 * 4) / 10, "ar_medium": math.nan, "ar_large": math.nan},
    }
    statistics = evaluate(truth, results).statistics
    for kind in ("box", "mask"):
        assert same([statistics[f"{kind}_{name}"] for name in STATISTICS], list(expected.values()))


def test_the_size_of_a_found_mask_is_its_own_not_that_of_its_box():
    truth, _ = random_set(0, images=1)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[3:43, 3:8] = mask[38:43, 3:43] = 1  # an angle: 375 pixels in a box of 1,600
    wrong = np.asfortranarray(np.roll(mask, 80, 1))
    truth["annotations"] = [entry(mask, 100, 1, id=1, iscrowd=0, area=375)]
    results = [entry(wrong, 100, 1, score=0.9), entry(mask, 100, 1, score=0.5)]
    # As a small object the wrong one counts. By its box it would not be small, and would not count.
    assert evaluate(truth, results).statistics["mask_ap_small"] == pytest.approx(0.5)


def test_nothing_found_scores_0_where_there_is_something_and_nan_elsewhere():
    truth, _ = random_set(4)
    truth["annotations"] = [annotation for annotation in truth["annotations"] if annotation["area"] < 1000]
    statistics = evaluate(truth, []).statistics
    nothing = {name for name in NAMES if name.endswith(("medium", "large"))}
    assert all(math.isnan(statistics[name]) == (name in nothing) for name in NAMES)
    assert {statistics[name] for name in NAMES if name not in nothing} == {0.0}


def test_without_objects_everything_is_nan_whatever_is_found():
    truth, results = random_set(5)
    for part in ({"annotations": []}, {"annotations": [], "categories": []}, {"annotations": [], "images": []}):
        found = [] if "images" in part else results
        evaluation = evaluate(truth | part, found)
        assert list(evaluation.statistics) == NAMES
        assert all(math.isnan(value) for value in evaluation.statistics.values())
        assert len(evaluation.per_class) == len((truth | part)["categories"])


def test_results_of_categories_that_are_not_annotated_do_not_count():
    truth, results = random_set(0)
    more = [{**result, "category_id": 12} for result in results]
    assert same(evaluate(truth, results + more).statistics, evaluate(truth, results).statistics)


def test_an_annotation_with_the_id_0_counts_as_any_other():
    truth, results = random_set(0)
    counted_from_0 = copy.deepcopy(truth)
    for number, annotation in enumerate(counted_from_0["annotations"]):
        annotation["id"] = number
    assert same(evaluate(counted_from_0, results).statistics, evaluate(truth, results).statistics)


def test_neither_annotations_nor_results_are_changed_and_nothing_is_printed(capfd):
    truth, results = random_set(0)
    before = copy.deepcopy((truth, results))
    evaluate(truth, results)
    evaluate(truth, [])
    assert (truth, results) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("results_of", "image_ids", "named"), [([100, 55], None, 55), ([100], [100, 77], 77)])
def test_an_image_that_is_not_annotated_is_refused(results_of, image_ids, named):
    truth, _ = random_set(0)
    results = [entry(np.zeros((5, 7), np.uint8, order="F"), image, 1, score=1.0) for image in results_of]
    with pytest.raises(ValueError, match=f"^results must be of images that are annotated, got image {named}, which is"):
        evaluate(truth, results, image_ids=image_ids)


# From a detector's output to results.


@pytest.fixture
def prediction():
    masks = torch.zeros(2, 1, 7, 11)
    masks[0, 0, 2:5, 3:9] = 0.6
    masks[1, 0, 0, 0] = 0.5
    boxes = torch.tensor([[3.25, 2.0, 9.0, 5.5], [0.0, 0.0, 1.0, 1.0]])
    return {"boxes": boxes, "labels": torch.tensor([17, 3]), "scores": torch.tensor([0.75, 0.125]), "masks": masks}


def test_results_are_in_cocos_format(prediction):
    first, second = as_results(42, prediction)
    assert (first["image_id"], first["category_id"], first["bbox"], first["score"]) == (
        42,
        17,
        [3.25, 2, 5.75, 3.5],
        0.75,
    )
    assert first["segmentation"]["size"] == [7, 11]
    assert oracle_mask.area(first["segmentation"]) == 3 * 6
    assert oracle_mask.toBbox(first["segmentation"]).tolist() == [3, 2, 6, 3]
    assert oracle_mask.area(second["segmentation"]) == 0  # 0.5 is not above the threshold
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_a_mask_is_where_the_probability_is_above_the_threshold(prediction):
    areas = [oracle_mask.area(result["segmentation"]) for result in as_results(1, prediction, mask_threshold=0.45)]
    assert areas == [18, 1]
    binary = prediction | {"masks": prediction["masks"][:, 0] > 0.45}
    assert [oracle_mask.area(result["segmentation"]) for result in as_results(1, binary)] == [18, 1]


def test_no_detections_are_no_results():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    assert as_results(1, none | {"masks": torch.zeros(0, 1, 7, 11)}) == []


def test_a_perfect_prediction_scores_1(prediction):
    prediction["masks"][1, 0, 5:, :4] = 1.0
    results = as_results(100, prediction)
    truth, _ = random_set(0, images=1)
    truth["images"][0] |= {"height": 7, "width": 11}
    truth["categories"] = [{"id": 3, "name": "a"}, {"id": 17, "name": "b"}]
    truth["annotations"] = [
        {**result, "id": i, "iscrowd": 0, "area": float(oracle_mask.area(result["segmentation"]))}
        for i, result in enumerate(results)
    ]
    statistics = evaluate(truth, results).statistics
    assert (statistics["box_ap"], statistics["mask_ap"]) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    ("name", "value"), [("boxes", torch.zeros(2, 5)), ("labels", torch.zeros(3)), ("masks", torch.zeros(1, 1, 7, 11))]
)
def test_tensors_that_do_not_fit_together_are_refused(prediction, name, value):
    with pytest.raises(ValueError, match=r"^a prediction must hold boxes .*, got boxes .*, masks"):
        as_results(1, prediction | {name: value})
