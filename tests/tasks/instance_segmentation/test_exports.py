"""Files as label tools write them: what pycocotools reads is read, with its scores and the file's own ids."""

import contextlib
import copy
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from lineara.tasks.instance_segmentation import CocoData
from lineara.tasks.instance_segmentation.coco_entries import decode, encode
from lineara.tasks.instance_segmentation.metrics import as_results, evaluate

HEIGHT, WIDTH = 40, 60
# pycocotools' own code.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")


def polygon(left, top, width, height):
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def plain():
    boxes = [(1, 1, [5, 5, 20, 10]), (1, 2, [30, 20, 12, 15]), (2, 2, [10, 8, 25, 20])]  # image, category, box
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2)],
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in ((1, "cup"), (2, "spoon"))],
        "annotations": [
            {
                **{"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0},
                **{"segmentation": [polygon(*box)], "area": box[2] * box[3]},
            }
            for number, (image, category, box) in enumerate(boxes, start=1)
        ],
    }


def count_categories_from_0(content):  # Label Studio, FiftyOne
    for entry in content["categories"]:
        entry["id"] -= 1
    for entry in content["annotations"]:
        entry["category_id"] -= 1


def name_folders_as_windows_does(content):  # Label Studio
    for entry in content["images"]:
        entry["file_name"] = f"images\\{entry['file_name']}"


def add_an_unused_category_0(content):  # Roboflow
    for entry in content["categories"]:
        entry["supercategory"] = "kitchen"
    content["categories"].insert(0, {"id": 0, "name": "kitchen", "supercategory": "none"})


def write_booleans(content):  # coco-annotator, VIA
    for entry in content["annotations"]:
        entry["iscrowd"] = False


def write_floats(content):  # what has gone through pandas
    for entry in [*content["images"], *content["categories"], *content["annotations"]]:
        entry |= {key: float(value) for key, value in entry.items() if type(value) is int}


def leave_a_stray_point(content):  # labelme
    content["annotations"][0]["segmentation"].append([7.5, 8.5])
    content["annotations"][2]["segmentation"].insert(0, [7.5, 8.5, 9.5, 10.5])


def repeat_ids(content):  # CVAT's projects, joined
    for entry in content["annotations"]:
        entry["id"] = 1


def number_categories_high(content):
    for entry in content["categories"]:
        entry["id"] += 1000
    for entry in content["annotations"]:
        entry["category_id"] += 1000


def leave_out_what_may_be_missing(content):
    for entry in content["annotations"]:
        del entry["iscrowd"]


@pytest.fixture
def written(tmp_path):
    """Write a file and its images; the data module that reads them as all of its splits."""
    (tmp_path / "images").mkdir()
    for number in (1, 2):
        for path in (tmp_path / f"{number}.png", tmp_path / "images" / f"{number}.png"):
            Image.fromarray(np.full((HEIGHT, WIDTH, 3), 40 * number, np.uint8)).save(path)

    def write(content, **options):
        (tmp_path / "all.json").write_text(json.dumps(content))
        places = {f"{split}_{kind}": name for split in ("train", "val") for kind, name in KINDS.items()}
        return CocoData(
            data_root=str(tmp_path), num_workers=0, horizontal_flip=0.0, **{"num_classes": 3, **places, **options}
        )

    return write


KINDS = {"images": ".", "annotations": "all.json"}


def detections(data):
    """What a network would answer with labels: the truth, moved a little, and a false one."""
    results = []
    for index in range(2):
        [target] = data.images("train")[[(index, 0)]]["targets"]
        masks = torch.roll(target["masks"].float(), 2, dims=2)[:, None]
        scores = torch.linspace(0.9, 0.6, len(masks))
        prediction = {"boxes": target["boxes"] + 1, "labels": target["labels"], "scores": scores, "masks": masks}
        results += as_results(int(target["image_id"]), prediction)
    false = copy.deepcopy(results[0])
    return [*results, false | {"score": 0.3, "bbox": [0.0, 0.0, 9.0, 9.0]}]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        count_categories_from_0,
        name_folders_as_windows_does,
        add_an_unused_category_0,
        write_booleans,
        write_floats,
        leave_a_stray_point,
        repeat_ids,
        number_categories_high,
        leave_out_what_may_be_missing,
    ],
    ids=lambda change: change.__name__,
)
@pytest.mark.filterwarnings("ignore:.*polygons of fewer than 3 points are left out of 2 annotations")
def test_what_pycocotools_reads_is_read_with_its_scores_and_ids(written, change):
    content = plain()
    change(content)
    data = written(content)
    found = detections(data)  # with labels
    assert {result["category_id"] for result in found} <= {1, 2}
    annotations = data.annotations("val")
    ids = {label: number for number, label in annotations["labels"].items()}
    results = [result | {"category_id": ids[result["category_id"]]} for result in found]
    assert {result["category_id"] for result in results} == {a["category_id"] for a in content["annotations"]}
    ours = evaluate(annotations, results).statistics
    for entry in content["annotations"]:  # what their code cannot draw, or would count once
        entry["segmentation"] = [part for part in entry["segmentation"] if len(part) >= 6]
        entry.setdefault("iscrowd", 0)
    for number, entry in enumerate(content["annotations"], start=1):
        entry["id"] = number
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = content
        theirs.createIndex()
        for kind, iou_type in (("box", "bbox"), ("mask", "segm")):
            left_out = "segmentation" if iou_type == "bbox" else "bbox"
            given = [{key: value for key, value in result.items() if key != left_out} for result in results]
            evaluation = COCOeval(theirs, theirs.loadRes(given), iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert abs(evaluation.stats[0] - ours[f"{kind}_ap"]) < 1e-12
            assert 0 < ours[f"{kind}_ap"] < 1


def as_run_lengths(content):  # CVAT
    for entry in content["annotations"]:
        mask = decode(entry["segmentation"], HEIGHT, WIDTH)
        entry |= {"segmentation": encode(mask), "iscrowd": 1}


def without_annotations(content):
    content["annotations"] = []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(as_run_lengths, "got 3 with iscrowd = 1 and no other; set train_on_crowds"), (without_annotations, "got 0 with")],
)
def test_a_set_with_nothing_to_learn_is_refused(written, change, sentence):
    content = plain()
    change(content)
    with pytest.raises(ValueError, match=sentence):
        written(content).setup("fit")


def test_crowds_can_be_learnt(written):
    content = plain()
    as_run_lengths(content)
    data = written(content, train_on_crowds=True)
    data.setup("fit")
    assert len(data.images("train")[[(0, 0)]]["targets"][0]["labels"]) == 2


def test_too_many_categories_for_the_network_are_refused(written):
    with pytest.raises(ValueError, match=r"num_classes must exceed the number of categories, 2 in .*all\.json, got 2"):
        written(plain(), num_classes=2).setup("fit")


def restored(data, names):
    data.load_state_dict({"batches_done": 0, "categories": names})
    return data


def test_categories_of_another_training_are_refused_and_their_numbers_do_not_matter(written):
    data = written(plain())
    data.setup("test")
    with pytest.raises(
        ValueError, match=r"category 1: its name must be that of a category .* \(box, spoon\), got 'cup'"
    ):
        restored(data, {1: "box", 2: "spoon"})
    assert restored(data, {1: "spoon", 2: "cup"}).annotations("test")["labels"] == {1: 2, 2: 1}
    data = written(plain())
    data.setup("fit")
    with pytest.raises(ValueError, match="must have the categories that the run began with"):
        restored(data, {1: "spoon", 2: "cup"})


def test_images_without_annotations_can_be_tested(written):
    content = plain()
    del content["annotations"]
    data = written(content)
    data.setup("test")
    assert len(data.images("test")[[(0, 0), (1, 0)]]["targets"]) == 2
    with pytest.raises(ValueError, match="must hold the list annotations for val"):
        written(content).setup("validate")


def test_boxes_drawn_on_upright_images_lie_on_their_objects(written, tmp_path):
    """A portrait photograph, stored on its side."""
    upright = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    upright[8:28, 10:35] = 200
    image = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    marks = image.getexif()
    marks[0x0112] = 6
    image.save(tmp_path / "2.png", exif=marks)
    content = plain()
    content["images"][1] |= {"height": WIDTH, "width": HEIGHT}
    batch = written(content).images("train")[[(1, 0)]]
    assert (batch["images"][0][0] > 0.5).equal(batch["targets"][0]["masks"][0] > 0)
    with pytest.raises(Exception, match="with apply_exif = False; set the other one"):
        raise ValueError(str(written(content, apply_exif=False).images("train")[[(1, 0)]].sentence))
