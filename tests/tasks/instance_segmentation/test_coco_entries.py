"""What can be wrong with one entry of a COCO file, and the masks that segmentations describe."""

import numpy as np
import pytest
from pycocotools import mask as oracle

from lineara.tasks.instance_segmentation.coco_entries import (
    annotation_reason,
    category_reason,
    decode,
    encode,
    image_reason,
    mask_area,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # the oracle's own

IMAGES = {7: {"id": 7, "file_name": "a.jpg", "height": 13, "width": 17}}
CATEGORIES = {3: {"id": 3, "name": "boat"}}


def annotation(**changes):
    good = {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]}
    return {key: value for key, value in (good | changes).items() if value is not ...}


def masks():
    random = np.random.default_rng(0)
    yield np.zeros((13, 17), np.uint8)
    yield np.ones((13, 17), np.uint8)
    for share in (0.02, 0.3, 0.5, 0.9):
        yield (random.random((13, 17)) < share).astype(np.uint8)
    large = np.zeros((997, 1009), np.uint8)  # run lengths of several characters, and large steps between them
    large[3:500, 40:41] = large[990:, 500:1000] = large[0, 2] = 1
    yield large


@pytest.mark.parametrize("mask", list(masks()), ids=lambda mask: f"{mask.sum()}-of-{mask.size}")
def test_a_mask_survives_encoding_and_its_text_is_accepted(mask):
    height, width = mask.shape
    segmentation = encode(mask)
    theirs = oracle.encode(np.asfortranarray(mask))
    assert segmentation == {"size": [height, width], "counts": theirs["counts"].decode()}
    assert np.array_equal(decode(segmentation, height, width), mask)
    assert mask_area(segmentation, height, width) == mask.sum()
    images = {7: {"height": height, "width": width}}
    reason = annotation_reason(annotation(segmentation=segmentation), images, CATEGORIES)
    assert (reason is None) == mask.any()
    assert mask.any() or reason.startswith("its run lengths must have a pixel of the object, got none in ")


@pytest.mark.parametrize(
    "segmentation",
    [
        [[1, 2, 4, 2, 4, 6]],
        [[1.5, 2.25, 14, 2, 4, 11.5], [0, 0, 3, 0, 3, 3, 0, 3]],
        {"size": [13, 17], "counts": [30, 5, 100, 7, 79]},
        {"size": [13, 17], "counts": [0, 221]},
    ],
)
def test_polygons_and_lists_of_run_lengths_are_masks_as_by_pycocotools(segmentation):
    expected = oracle.frPyObjects(segmentation, 13, 17)
    expected = oracle.decode(oracle.merge(expected) if isinstance(expected, list) else expected)
    assert annotation_reason(annotation(segmentation=segmentation), IMAGES, CATEGORIES) is None
    assert np.array_equal(decode(segmentation, 13, 17), expected)
    assert mask_area(segmentation, 13, 17) == expected.sum() > 0


def runs(counts):
    return {"size": [13, 17], "counts": counts}


ID = "its id must be a whole number from 0 to 2**63 - 1, got"
OUTSIDE = "bbox must overlap its image of 17 x 13 pixels (width x height), got"
AREA = "area must be a finite number of at least 0, got"
FAR = (
    "a polygon must not go further than one image size beyond its image of 17 x 13 pixels (width x height), got x from"
)
UNSEEN = (
    "segmentation must cover some of its image of 17 x 13 pixels (width x height), got polygons that are flat or "
    "outside,"
)
KEYS = "it must have id, image_id, category_id, bbox, segmentation, got"
BOX = "bbox must be 4 finite numbers with a width and a height above 0, got"
POLYGON = "a polygon must be at least 3 points [x, y, x, y, x, y] of finite numbers, got"
SEGMENTATION = "segmentation must be polygons, or size and counts of run lengths, got"
RUNS = "its run lengths must be a list of numbers or COCO's text, got"
SUM = "its run lengths must be at least 0 and sum to 13 x 17 = 221, got"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("segmentation", ..., f"{KEYS} no segmentation"),
        ("bbox", ..., f"{KEYS} no bbox"),
        ("id", "5", f"{ID} '5'"),
        ("id", True, f"{ID} True"),
        ("id", -1, f"{ID} -1"),
        ("id", 2**63, f"{ID} {2**63}"),
        ("image_id", 8, "image_id must be that of a listed image, got 8"),
        ("image_id", [7], "image_id must be that of a listed image, got [7]"),
        ("category_id", 4, "category_id must be that of a listed category, got 4"),
        ("iscrowd", 2, "iscrowd must be 0 or 1, got 2"),
        ("iscrowd", True, "iscrowd must be 0 or 1, got True"),
        ("iscrowd", 1.0, "iscrowd must be 0 or 1, got 1.0"),
        ("iscrowd", [0], "iscrowd must be 0 or 1, got [0]"),
        ("area", float("nan"), f"{AREA} nan"),
        ("area", None, f"{AREA} None"),
        ("area", -0.5, f"{AREA} -0.5"),
        ("area", True, f"{AREA} True"),
        ("bbox", [17, 2, 3, 4], f"{OUTSIDE} [17, 2, 3, 4]"),
        ("bbox", [1, 13, 3, 4], f"{OUTSIDE} [1, 13, 3, 4]"),
        ("bbox", [-3, 2, 3, 4], f"{OUTSIDE} [-3, 2, 3, 4]"),
        ("bbox", [1, -4, 3, 4], f"{OUTSIDE} [1, -4, 3, 4]"),
        ("bbox", [True, 2, 3, 4], f"{BOX} [True, 2, 3, 4]"),
        ("bbox", [1, 2, 0, 4], f"{BOX} [1, 2, 0, 4]"),
        ("bbox", [1, 2, 3, -4.5], f"{BOX} [1, 2, 3, -4.5]"),
        ("bbox", [1, 2, 3], f"{BOX} [1, 2, 3]"),
        ("bbox", [1, float("inf"), 3, 4], f"{BOX} [1, inf, 3, 4]"),
        ("bbox", [1, 2, 3, "4"], f"{BOX} [1, 2, 3, '4']"),
        ("bbox", None, f"{BOX} None"),
        ("segmentation", [], "segmentation must be at least one polygon, got none"),
        ("segmentation", "x", f"{SEGMENTATION} 'x'"),
        ("segmentation", {"counts": [1]}, f"{SEGMENTATION} {{'counts': [1]}}"),
        ("segmentation", [[1, 2, 3, 4]], f"{POLYGON} [1, 2, 3, 4]"),
        ("segmentation", [[1, 2, 4, 2, 4, 6], [1] * 7], f"{POLYGON} [1, 1, 1, 1, 1, 1, 1]"),
        ("segmentation", [[1, 2, 4, 2, 4, None]], f"{POLYGON} [1, 2, 4, 2, 4, None]"),
        ("segmentation", [5], f"{POLYGON} 5"),
        ("segmentation", [[1, 2, True, 2, 4, 6]], f"{POLYGON} [1, 2, True, 2, 4, 6]"),
        ("segmentation", [[1, 2, 1e12, 2, 4, 6]], f"{FAR} 1 to 1e+12 and y from 2 to 6"),
        ("segmentation", [[1, 2, 4, 2, 4, 6], [1, 2, 4, -1e7, 4, 6]], f"{FAR} 1 to 4 and y from -1e+07 to 6"),
        ("segmentation", [[-18, 2, 4, 2, 4, 6]], f"{FAR} -18 to 4 and y from 2 to 6"),
        ("segmentation", [[1, 2, 4, 2, 4, 27]], f"{FAR} 1 to 4 and y from 2 to 27"),
        ("segmentation", [[17, 2, 20, 2, 20, 6]], f"{UNSEEN} [[17, 2, 20, 2, 20, 6]]"),
        ("segmentation", [[1, -4, 4, -4, 4, 0]], f"{UNSEEN} [[1, -4, 4, -4, 4, 0]]"),
        ("segmentation", [[4, 2, 4, 5, 4, 6]], f"{UNSEEN} [[4, 2, 4, 5, 4, 6]]"),
        ("segmentation", [[1, 2, 3, 2, 4, 2], [1, 1] * 3], f"{UNSEEN} [[1, 2, 3, 2, 4, 2], [1, 1, 1, 1, 1, 1]]"),
        (
            "segmentation",
            {"size": [13.0, 17], "counts": [0, 221]},
            "the size of its run lengths must be the image's [13, 17], got [13.0, 17]",
        ),
        (
            "segmentation",
            runs([221, 0, 0]),
            "its run lengths must have a pixel of the object, got none in [221, 0, 0]",
        ),
        (
            "segmentation",
            {"size": [17, 13], "counts": [221]},
            "the size of its run lengths must be the image's [13, 17], got [17, 13]",
        ),
        ("segmentation", runs([30, 5, 100, 7, 78]), f"{SUM} 220"),
        ("segmentation", runs([231, -10]), f"{SUM} [231, -10]"),
        ("segmentation", runs([220.5, 0.5]), f"{SUM} [220.5, 0.5]"),
        ("segmentation", runs("5"), f"{SUM} 5"),
        ("segmentation", runs(7), f"{RUNS} 7"),
        ("segmentation", runs("zz"), f"{RUNS} 'zz'"),
        ("segmentation", runs("\u00e4"), f"{RUNS} '\u00e4'"),
        ("segmentation", runs("m"), f"{RUNS} 'm'"),
    ],
)
def test_a_broken_annotation_is_complained_about(key, value, reason):
    assert annotation_reason(annotation(), IMAGES, CATEGORIES) is None
    assert annotation_reason(annotation(**{key: value}), IMAGES, CATEGORIES) == reason


@pytest.mark.parametrize("cut", range(1, 9))
def test_text_of_run_lengths_that_lost_its_end_is_complained_about(cut):
    mask = (np.random.default_rng(0).random((13, 17)) < 0.1).astype(np.uint8)
    segmentation = runs(encode(mask)["counts"][:-cut])
    assert "run lengths" in annotation_reason(annotation(segmentation=segmentation), IMAGES, CATEGORIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": [0, 0, 17, 13]},
        {"bbox": [-5.5, -3, 100, 3.25]},  # a little of it is seen
        {"segmentation": [[-17, -13, 34, -13, 34, 26]]},  # as far as a polygon may go
        {"segmentation": [[4, 2, 4, 5, 4, 6], [20, 2, 25, 2, 25, 6], [0, 0, 3, 0, 3, 3]]},  # two parts are not seen
        {"id": 0, "area": 0, "iscrowd": 1},
        {"id": 2**63 - 1, "segmentation": runs([220, 1])},
    ],
    ids=str,
)
def test_what_is_just_possible_is_accepted(changes):
    assert annotation_reason(annotation(**changes), IMAGES, CATEGORIES) is None


def test_an_entry_that_is_no_object_is_complained_about():
    assert annotation_reason([1], IMAGES, CATEGORIES).endswith("segmentation, got [1]")
    assert image_reason("x") == "it must be an object with id, file_name, height, width, got 'x'"


def test_what_is_long_is_quoted_in_part():
    reason = annotation_reason(annotation(segmentation=[[1.5] * 1001]), IMAGES, CATEGORIES)
    assert reason.endswith("1.5, 1...")
    assert len(reason) < 200


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"file_name": ...}, "it must have id, file_name, height, width, got no file_name"),
        ({"file_name": ""}, "file_name must be a name, got ''"),
        ({"height": 0}, "height must be a whole number of pixels of at least 1, got 0"),
        ({"width": 4.5}, "width must be a whole number of pixels of at least 1, got 4.5"),
        ({"id": None}, f"{ID} None"),
        ({"id": -1}, f"{ID} -1"),
        ({"id": 2**63}, f"{ID} {2**63}"),
    ],
)
def test_a_broken_image_is_complained_about(changes, reason):
    assert image_reason(IMAGES[7]) is None
    assert image_reason({key: value for key, value in (IMAGES[7] | changes).items() if value is not ...}) == reason


@pytest.mark.parametrize(
    ("category", "reason"),
    [
        ({"id": 5, "name": None}, "name must be text, got None"),
        ({"id": 5}, "it must have id, name, got no name"),
    ],
)
def test_a_broken_category_is_complained_about(category, reason):
    assert category_reason({"id": 90, "name": "a"}) is None
    assert category_reason({"id": 500, "name": "a"}) is None
    assert category_reason(category) == reason
