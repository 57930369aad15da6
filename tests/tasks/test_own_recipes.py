"""Recipes for data of one's own are parsed, and fit their files."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lineara.cli import main, parse_recipe
from lineara.tasks.image_classification import ImageFolderData
from lineara.tasks.instance_segmentation import CocoData

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")


def write_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(path)


def written(capsys, tmp_path, *words):
    """What the command writes, which is a recipe."""
    assert main(["recipe", *map(str, words)]) == 0
    text = capsys.readouterr().out
    (tmp_path / "my.yaml").write_text(text)
    parse_recipe(tmp_path / "my.yaml")
    return yaml.safe_load(text)


@pytest.mark.parametrize("is_crowd", [0, 1])
def test_a_coco_export_gets_a_recipe(tmp_path, capsys, monkeypatch, is_crowd):
    monkeypatch.chdir(tmp_path)
    box, mask = [5, 5, 10, 10], [[5, 5, 15, 5, 15, 15, 5, 15]]
    content = {"images": [], "annotations": [], "categories": [{"id": i, "name": f"kind {i}"} for i in range(3)]}
    for number in range(10):
        write_image(Path(f"photos/{number}.png"))
        content["images"].append({"id": number, "file_name": f"{number}.png", "height": 30, "width": 40})
        entry = {"id": number, "image_id": number, "category_id": number % 3, "bbox": box, "segmentation": mask}
        content["annotations"].append({**entry, "iscrowd": is_crowd, "area": 100})
    Path("result.json").write_text(json.dumps(content))
    recipe = written(capsys, tmp_path, "detection", "--images", "photos", "--annotations", "result.json")
    assert recipe["model"]["init_args"]["num_classes"] == 4
    data = CocoData(**recipe["data"]["init_args"])
    data.setup("fit")
    ids = [{image["id"] for image in data._read(split)["images"]} for split in ("train", "val")]
    assert [len(part) for part in ids] == [8, 2]
    assert not ids[0] & ids[1]


@pytest.mark.parametrize("is_split", [False, True])
def test_a_folder_per_class_gets_a_recipe(tmp_path, capsys, is_split):
    for split in ("train", "val") if is_split else ("",):
        for name in ("cat", "dog"):
            for number in range(5):
                write_image(tmp_path / "pets" / split / name / f"{number}.png")
    recipe = written(capsys, tmp_path, "classification", "--images", tmp_path / "pets")
    assert recipe["model"]["init_args"]["num_classes"] == 2
    data = ImageFolderData(**recipe["data"]["init_args"])
    parts = [[path for path, _ in data.read(split).samples] for split in ("train", "val")]
    assert [len(part) for part in parts] == ([10, 10] if is_split else [8, 2])
    assert not set(parts[0]) & set(parts[1])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["detection", "--images", "none"], "images must be a folder, got none"),
        (
            ["detection", "--images", "."],
            "annotations must be a COCO export for detection, got none; add --annotations",
        ),
        (["classification", "--images", "."], "must hold a folder of images for each of at least 2 classes"),
    ],
)
def test_what_is_no_set_is_refused(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["recipe", *words]) == 2
    assert sentence in capsys.readouterr().err
