"""A tiny set in COCO's format, which tests write where they want it and damage as they like."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# Of each image: id, file name, height and width; two are wide, two are tall, one is square.
SIZES = ((7, "a.jpg", 31, 47), (3, "b.png", 53, 29), (11, "c.jpg", 37, 37), (5, "d.jpg", 23, 41), (2, "e.jpg", 61, 19))


def tiny_annotations():
    """Polygons, both kinds of run lengths, a crowd, and two images without an object (5, and 2 but for its crowd)."""
    images = [{"id": i, "file_name": name, "height": height, "width": width} for i, name, height, width in SIZES]
    annotations = [
        {
            "id": 4,
            "image_id": 7,
            "category_id": 3,
            "bbox": [5, 7, 20, 13],
            "segmentation": [[5, 7, 25, 7, 25, 20, 5, 20]],
        },
        {"id": 9, "image_id": 7, "category_id": 1, "bbox": [30, 2, 10, 20], "segmentation": [[30, 2, 40, 2, 35, 22]]},
        # Column by column from the top left: columns 2 to 4, rows 10 to 14.
        {
            "id": 6,
            "image_id": 3,
            "category_id": 1,
            "bbox": [2, 10, 3, 5],
            "segmentation": {"size": [53, 29], "counts": [2 * 53 + 10, 5, 48, 5, 48, 5, 38 + 24 * 53]},
        },
        {
            "id": 8,
            "image_id": 11,
            "category_id": 3,
            "bbox": [0, 0, 37, 37],
            "segmentation": [[0, 0, 37, 0, 37, 37, 0, 37]],
        },
        {
            "id": 12,
            "image_id": 2,
            "category_id": 1,
            "iscrowd": 1,
            "bbox": [0, 0, 19, 61],
            "segmentation": {"size": [61, 19], "counts": [0, 61 * 19]},
        },
    ]
    for annotation in annotations:
        annotation.setdefault("iscrowd", 0)
        annotation["area"] = float(annotation["bbox"][2] * annotation["bbox"][3])
    categories = [{"id": 3, "name": "boat", "supercategory": "vehicle"}, {"id": 1, "name": "bird"}]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def write_tiny_set(root):
    """As `CocoData` expects it, the same images and annotations for training and validation."""
    root = Path(root)
    (root / "annotations").mkdir(parents=True)
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / f"{split}2017").mkdir()
        for _, name, height, width in SIZES:
            Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
                root / f"{split}2017" / name
            )
        write_annotations(root, tiny_annotations(), split)
    return root


def write_annotations(root, content, split="val"):
    path = Path(root) / "annotations" / f"instances_{split}2017.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def annotations():
    return tiny_annotations()


@pytest.fixture
def tiny_set(tmp_path):
    return write_tiny_set(tmp_path / "coco")


@pytest.fixture
def write():
    """Write annotations over those of the tiny set: write(root, content, split)."""
    return write_annotations
