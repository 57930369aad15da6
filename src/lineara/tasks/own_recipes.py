"""Recipes for data of one's own: what fits the files is written, the rest is what a small set needs."""

import json
from pathlib import Path
from typing import Any

import yaml

_TRAINER = {"max_epochs": 20, "num_sanity_val_steps": 0, "log_every_n_steps": 5}
_ATTENTION = {"class_path": "lineara.nn.EfficientAttention2d", "init_args": {"key_dim": 64, "zero_init": True}}


def recipe_for(kind: str, images: Path, annotations: Path | None = None) -> str:
    """The text of a recipe.

    Args:
        kind: "detection", or "classification".
        images: folder of images; for classification, of a folder of images per class, or of such in train and val.
        annotations: a COCO export, for detection.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file is no COCO export, or a folder has no classes.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"images must be a folder, got {images}, where there is none; name another one")
    if kind == "detection":
        if annotations is None:
            raise ValueError("annotations must be a COCO export for detection, got none; add --annotations FILE")
        settings = _detection(images, annotations)
    else:
        settings = _classification(images)
    head = f"# {kind.capitalize()} on {images}. A fifth of the images validates unless there is another folder.\n"
    return head + yaml.safe_dump({"seed_everything": 0, "run_dir": f"runs/{images.name}", **settings}, sort_keys=False)


def _detection(images: Path, annotations: Path) -> dict[str, Any]:
    from lineara.tasks.instance_segmentation.coco_files import read_annotations

    content = read_annotations(annotations)
    num_classes = len(content["categories"]) + 1
    data = {
        **{"data_root": ".", "train_images": str(images), "train_annotations": str(annotations), "val_share": 0.2},
        **{"num_classes": num_classes, "batch_size": 2, "num_workers": 2},
    }
    if all(annotation["iscrowd"] for annotation in content["annotations"] or ()):
        data["train_on_crowds"] = True  # as CVAT exports masks
    network = {"backbone": "resnet50", "num_classes": num_classes, "places": 7, "attention": _ATTENTION}
    task = {"num_classes": num_classes, "base_lr": 0.005, "reference_batch": 2, "warmup_steps": 0}
    return {
        "model": {
            "class_path": "lineara.tasks.instance_segmentation.InstanceSegmentation",
            "init_args": {
                **task,
                "milestones": [14, 18],
                "network": {"class_path": "lineara.models.mask_rcnn", "init_args": network},
            },
        },
        "data": {"class_path": "lineara.tasks.instance_segmentation.CocoData", "init_args": data},
        "trainer": dict(_TRAINER),
        "checkpoint": {"monitor": "val/mask_ap"},
    }


def _classification(images: Path) -> dict[str, Any]:
    is_split = (images / "train").is_dir() and (images / "val").is_dir()
    classes = sorted(
        path.name
        for path in (images / "train" if is_split else images).iterdir()
        if path.is_dir() and not path.name.startswith(".")
    )
    if len(classes) < 2:
        raise ValueError(
            f"{images} must hold a folder of images for each of at least 2 classes, got {json.dumps(classes)}; name "
            "another one"
        )
    data: dict[str, Any] = {"data_root": str(images), "batch_size": 32, "num_workers": 2}
    data |= {} if is_split else {"train_folder": ".", "val_share": 0.2}
    network = {"name": "resnet50", "num_classes": len(classes), "places": 1, "attention": _ATTENTION}
    return {
        "model": {
            "class_path": "lineara.tasks.image_classification.ImageClassification",
            "init_args": {
                "num_classes": len(classes),
                "network": {"class_path": "lineara.models.resnet", "init_args": network},
            },
        },
        "data": {"class_path": "lineara.tasks.image_classification.ImageFolderData", "init_args": data},
        "trainer": dict(_TRAINER),
    }
