"""The files of a test and of a prediction, and the table."""

import csv
import json
import math
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from pycocotools.coco import COCO

from lineara.tasks.instance_segmentation.metrics import STATISTICS, Evaluation
from lineara.tasks.instance_segmentation.predictions import (
    PredictionFolder,
    statistics_table,
    write_evaluation,
    write_results,
)

HEIGHT, WIDTH = 503, 617
NAMES = {3: "cup", 11: "coin"}
KINDS = ("box", "mask")


def make_evaluation():
    """A number of its own for each statistic; COCO has none for the large masks."""
    values = {
        f"{kind}_{name}": (i + 1) / 64 for i, (kind, name) in enumerate((k, n) for k in KINDS for n in STATISTICS)
    }
    values |= {"mask_ap_large": math.nan, "mask_ar_large": math.nan}
    rows = [
        {"category": "cup, blue", "box_ap": 0.125, "box_ap50": 0.25, "mask_ap": 0.375, "mask_ap50": 0.5},
        {"category": "coin", "box_ap": 1 / 3, "box_ap50": 1.0, "mask_ap": math.nan, "mask_ap50": math.nan},
    ]
    return Evaluation(values, rows)


def make_prediction(*objects):
    """Rectangles given as (label, score, left, top, right, bottom), with masks that fill them."""
    boxes = torch.tensor([corners for _, _, *corners in objects]).reshape(-1, 4).float()
    masks = torch.zeros(len(objects), 1, HEIGHT, WIDTH)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[0, top:bottom, left:right] = 0.75
    labels, scores = ([given[i] for given in objects] for i in (0, 1))
    return {"boxes": boxes, "labels": torch.tensor(labels).long(), "scores": torch.tensor(scores), "masks": masks}


def read_as_annotations(path):
    """As COCO's own reader has it, which talks."""
    with redirect_stdout(StringIO()):
        return COCO(str(path))


# After a test.


def test_the_table_has_a_line_per_statistic():
    lines = statistics_table(make_evaluation().statistics, num_images=5000).splitlines()
    assert lines[0].split() == ["5,000", "images", "box", "mask"]
    numbers = [line.split()[-2:] for line in lines[1:]]
    box = [f"{(i + 1) / 64:.3f}" for i in range(12)]
    mask = [f"{(i + 13) / 64:.3f}" for i in range(12)]
    mask[STATISTICS.index("ap_large")] = mask[STATISTICS.index("ar_large")] = "-"
    assert numbers == [list(pair) for pair in zip(box, mask)]
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("average precision, IoU 0.50 to 0.95 ")
    assert lines[12].startswith("average recall, large objects ")
    assert statistics_table(make_evaluation().statistics, num_images=1).startswith("1 image ")


def test_a_test_leaves_results_statistics_and_a_table_of_classes(tmp_path):
    run_dir, evaluation = tmp_path / "run", make_evaluation()
    results = [{"image_id": 7, "category_id": 11, "bbox": [1.5, 2.0, 3.0, 4.0], "score": 0.1}]
    for _ in range(2):  # a second test replaces the first
        write_results(run_dir, results)
        write_evaluation(run_dir, evaluation, num_images=17, left_out=5)
    assert sorted(path.name for path in run_dir.iterdir()) == ["per_class.csv", "results.json", "statistics.json"]
    assert json.loads((run_dir / "results.json").read_text()) == results
    statistics = json.loads((run_dir / "statistics.json").read_text(), parse_constant=pytest.fail)
    assert (statistics.pop("images"), statistics.pop("left_out")) == (17, 5)
    assert statistics.pop("mask_ap_large") is statistics.pop("mask_ar_large") is None
    assert statistics == {name: value for name, value in evaluation.statistics.items() if not math.isnan(value)}
    assert len(statistics) == 22
    with (run_dir / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row.pop("category") for row in rows] == ["cup, blue", "coin"]
    for row, expected in zip(rows, evaluation.per_class):
        for name, value in row.items():
            assert float(value) == pytest.approx(expected[name], nan_ok=True, abs=0)


def test_a_disk_that_is_full_leaves_the_old_results(tmp_path, monkeypatch):
    write_evaluation(tmp_path, make_evaluation(), num_images=17)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fill_the_disk(content, file):
        file.write("[{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", fill_the_disk)
    with pytest.raises(OSError, match=r"results\.json must be writable, got No space left on device"):
        write_results(tmp_path, [{"image_id": 1}])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# After a prediction.


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of pycocotools' own code
def test_predictions_are_drawn_and_written_as_annotations_from_a_score_on(tmp_path):
    folder = PredictionFolder(tmp_path / "predictions", NAMES, score_threshold=0.5)
    image = torch.full((3, HEIGHT, WIDTH), 0.5)
    first = make_prediction((11, 0.5, 100, 200, 131, 217), (3, 0.49, 300, 300, 400, 400), (3, 0.75, 7, 400, 20, 419))
    pictures = [
        folder.add(image, first, file_name="b.jpg", image_id=5),
        folder.add(image, make_prediction(), file_name="a.jpg", image_id=2),
    ]
    results = folder.finish()
    assert pictures == [tmp_path / "predictions" / name for name in ("b.png", "a.png")]
    assert sorted(results.parent.iterdir()) == sorted([*pictures, results])

    with Image.open(pictures[0]) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert (pixels[210, 115] != 127).any()  # the coin
    assert (pixels[350, 350] == 127).all()  # the cup that is not sure enough
    with Image.open(pictures[1]) as picture:
        assert (np.asarray(picture.convert("RGB")) == 127).all()

    content = json.loads(results.read_text())
    assert content["images"] == [
        {"id": 5, "file_name": "b.jpg", "height": HEIGHT, "width": WIDTH},
        {"id": 2, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH},
    ]
    assert content["categories"] == [{"id": 3, "name": "cup"}, {"id": 11, "name": "coin"}]
    assert [entry["score"] for entry in content["annotations"]] == [0.5, 0.75]
    coco = read_as_annotations(results)
    [coin, cup] = coco.loadAnns([1, 2])
    assert (coin["image_id"], coin["category_id"], coin["bbox"]) == (5, 11, [100, 200, 31, 17])
    assert (coin["area"], cup["area"], coin["iscrowd"]) == (31 * 17, 13 * 19, 0)
    np.testing.assert_array_equal(coco.annToMask(coin), first["masks"][0, 0] > 0.5)
    assert run_lengths.area(cup["segmentation"]) == 13 * 19


def test_images_of_one_stem_have_a_picture_each(tmp_path):
    folder = PredictionFolder(tmp_path, NAMES, score_threshold=0.5)
    names = ["a.bmp", "a.jpg", "A.jpeg", "a.jpg.png", "a.tif", "deeper/a.jpg", "b.jpg"]
    shades = [torch.full((3, 500, 500), 20 * i, dtype=torch.uint8) for i in range(len(names))]
    nothing = make_prediction()
    pictures = [
        folder.add(shade, {**nothing, "masks": torch.zeros(0, 1, 500, 500)}, file_name=name, image_id=i)
        for i, (name, shade) in enumerate(zip(names, shades))
    ]
    assert len({str(path).lower() for path in pictures}) == len(names)
    assert [path.name for path in pictures[:2]] == ["a.png", "a.jpg.png"]
    assert pictures[-1].name == "b.png"
    for path, shade in zip(pictures, shades):
        assert path.parent == tmp_path
        with Image.open(path) as picture:
            assert (np.asarray(picture.convert("RGB")) == int(shade[0, 0, 0])).all()


def test_no_images_make_an_empty_file(tmp_path):
    path = PredictionFolder(tmp_path / "none" / "yet", {}, score_threshold=0.5).finish()
    assert json.loads(path.read_text()) == {"images": [], "categories": [], "annotations": []}
