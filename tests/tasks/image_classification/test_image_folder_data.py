"""Sets with a folder of images per class."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from lineara.tasks.image_classification import ImageFolderData

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def root(write_set, tmp_path_factory):
    return write_set(
        tmp_path_factory.mktemp("set"),
        train={"n03": 7, "n01": 3, "n02": 5},
        val={"n01": 2, "n02": 3, "n03": 2},
        extra={"n01": 1, "n02": 1, "n03": 1},
    )


def make(root, **options):
    settings = {"image_size": 8, "resize_size": 9, "batch_size": 5, "num_workers": 0}
    return ImageFolderData(str(root), **(settings | options))


def normalised(pixels):
    """(height, width, 3) in 0..255 to (3, height, width)."""
    return torch.tensor((pixels / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)


def test_classes_are_the_folders_by_name_and_every_image_has_its_label(root):
    data = make(root)
    data.setup("fit")
    assert data.classes == ["n01", "n02", "n03"]
    assert [data.split(name).targets for name in ("train", "val")] == [
        [0] * 3 + [1] * 5 + [2] * 7,
        [0] * 2 + [1] * 3 + [2] * 2,
    ]
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (5, 3, 8, 8)
    assert batch["label"].tolist() == [0, 0, 1, 1, 1]


def test_an_image_to_evaluate_is_resized_on_its_short_side_and_cropped_in_the_centre(root):
    data = make(root)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    # n01_0 is 9 pixels high, so that only the crop is left: rows 0 to 7 of a margin of 1, columns 2 to 9 of 3.
    pixels = np.array(Image.open(root / "val/n01/n01_0.png"))
    top = round((9 - 8) / 2)
    torch.testing.assert_close(batch["image"][0], normalised(pixels[top : top + 8, 2:10]))
    # n01_1 is 10 high and 11 wide: its short side becomes 9.
    image = Image.open(root / "val/n01/n01_1.png")
    resized = np.array(image.resize((int(11 * 9 / 10), 9), Image.Resampling.BILINEAR))
    torch.testing.assert_close(batch["image"][1], normalised(resized[top : top + 8, :8]))


def ramp(folder, count=64):
    """Images whose red grows to the right and green downwards; by them one can tell where a crop was taken."""
    for split in ("train", "val"):
        (folder / split / "only").mkdir(parents=True)
        x, y = np.meshgrid(np.arange(0, 240, 2), np.arange(0, 240, 2))
        pixels = np.stack([x, y, 0 * x], axis=2).astype(np.uint8)  # (120, 120, 3)
        for index in range(count):
            Image.fromarray(pixels).save(folder / split / "only" / f"{index}.png")
    return folder


def test_a_training_image_is_a_random_crop_and_flipped_in_half_of_the_cases(tmp_path):
    data = make(ramp(tmp_path), batch_size=64, image_size=20, resize_size=20)
    data.setup("fit")
    [batch] = data.train_dataloader()
    pixels = batch["image"] * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    # In pixels of the photograph: (64, 20) columns, (64, 20) rows.
    red, green = pixels[:, 0].mean(dim=1) * 255 / 2, pixels[:, 1].mean(dim=2) * 255 / 2
    assert pixels[:, 2].abs().max() < 1e-6
    flipped = red[:, 0] > red[:, -1]
    assert 0.3 < flipped.float().mean() < 0.7
    assert (green[:, 0] < green[:, -1]).all()  # never upside down
    width, height = ((edge[:, -1] - edge[:, 0]).abs() * 20 / 19 for edge in (red, green))
    area, ratio = width * height / 120**2, width / height
    assert 0.06 < area.min() < 0.2
    assert 0.8 < area.max() < 1.1
    assert 0.7 < ratio.min() < 0.85
    assert 1.2 < ratio.max() < 1.45


@pytest.mark.parametrize(("share", "flips"), [(0.0, {False}), (1.0, {True})])
def test_the_share_of_flipped_images_can_be_set(tmp_path, share, flips):
    data = make(ramp(tmp_path, 9), batch_size=9, horizontal_flip=share)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert set((batch["image"][:, 0, 3, 0] > batch["image"][:, 0, 3, -1]).tolist()) == flips


def test_the_test_split_is_the_validation_split_unless_named(root):
    for folder, labels in ((None, [0, 0, 1, 1, 1, 2, 2]), ("extra", [0, 1, 2])):
        data = make(root, test_folder=folder)
        data.setup("test")
        assert data.split("test").targets == labels


def test_the_summary_counts(root):
    assert list(make(root, test_folder="extra").summary()) == [
        str(root),
        "train: 15 images, 3 classes of 3 to 7 images",
        "val: 7 images, 3 classes of 2 to 3 images",
        "test: 3 images, 3 classes of 1 to 1 images",
    ]


def test_a_broken_image_is_named(write_set, tmp_path):
    write_set(tmp_path, train={"a": 3, "b": 3}, val={"a": 1, "b": 1})
    broken = tmp_path / "val" / "b" / "b_0.png"
    broken.write_bytes(broken.read_bytes()[:70])
    data = make(tmp_path)
    data.setup("validate")
    [batch] = data.val_dataloader()
    assert batch["label"].tolist() == [0]
    [sentence] = batch["broken"]
    assert re.match(rf"{re.escape(str(broken))} must be an image that can be read, got \S", sentence)


def test_hidden_folders_and_other_files_are_no_classes(write_set, tmp_path):
    write_set(tmp_path, train={"a": 3, "b": 3, ".cache": 2}, val={"a": 1, "b": 1})
    (tmp_path / "train" / "list.txt").touch()
    (tmp_path / "train" / "a" / "notes.txt").touch()
    (tmp_path / "train" / "a" / "._0.png").touch()
    data = make(tmp_path)
    data.setup("fit")
    assert data.classes == ["a", "b"]
    assert len(data.split("train")) == 6


def test_a_missing_set_is_described(tmp_path):
    sentence = (
        rf"^{re.escape(str(tmp_path / 'train'))} must be the train split, got no such folder; a split is a folder with "
        r"one folder of images per class, such as train/n01440764/n01440764_18\.JPEG; set --data\.data_root$"
    )
    with pytest.raises(FileNotFoundError, match=sentence):
        make(tmp_path).setup("fit")


def test_a_split_without_folders_of_classes_is_refused(write_set, tmp_path):
    write_set(tmp_path, train={"a": 5})
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").touch()  # as ImageNet's come
    with pytest.raises(FileNotFoundError, match=r"val must hold one folder per class, got none; a split is "):
        make(tmp_path).setup("fit")


def test_an_empty_class_is_refused(write_set, tmp_path):
    write_set(tmp_path, train={"a": 5, "b": 0, "c": 1, "d": 0}, val={"a": 1, "b": 1, "c": 1, "d": 1})
    with pytest.raises(
        ValueError, match=r"train/b must hold at least one image, got none \(2 such classes\); fill or re"
    ):
        make(tmp_path).setup("fit")


@pytest.mark.parametrize(("split", "sentence"), [("train", "b in .*val"), ("val", "c in .*train")])
def test_classes_of_the_splits_must_agree(write_set, tmp_path, split, sentence):
    both = {"a": 5, "d": 1}
    write_set(
        tmp_path, train=both | ({"b": 1} if split == "train" else {}), val=both | ({"c": 1} if split == "val" else {})
    )
    sentence = rf"val must have the class folders of .*train, got no {sentence} \(1 differences\)$"
    with pytest.raises(ValueError, match=sentence):
        make(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"image_size": 10}, "image_size must be at least 1 and at most resize_size, got 10 and 9"),
        ({"image_size": 0}, "image_size must be at least 1 and at most resize_size, got 0 and 9"),
        ({"horizontal_flip": 1.5}, "horizontal_flip must be a share from 0 to 1, got 1.5"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path, wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make(tmp_path, **wrong)
