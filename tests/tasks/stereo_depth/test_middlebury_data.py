"""Middlebury 2014 and ETH3D: both editions' names, masks, and a split by scenes."""

import re

import numpy as np
import pytest
import torch
from torchvision.datasets import ETH3DStereo, Middlebury2014Stereo

from lineara.tasks.stereo_depth import ETH3DData, MiddleburyData
from lineara.tasks.stereo_depth.transforms import Augmentation

SMALL = {"augmentation": Augmentation(7, 11), "batch_size": 2, "num_workers": 0}
SCENES = ["Adirondack", "Jadeplant", "Motorcycle", "Piano", "Pipes", "Playroom"]


def middlebury(root, make, *, suffix="", **options):
    for number, name in enumerate(SCENES):
        folder = root / f"{name}{suffix}"
        make.write_scene(folder, folder, number, **options)
    return root


def eth3d(root, make):
    for number, name in enumerate(("delivery_area_1l", "electro_1s", "forest_2s")):
        truths = root / "two_view_training_gt" / name
        make.write_scene(root / "two_view_training" / name, truths, number, names=("disp0GT.pfm",), mask=True)
    return root


def all_frames(data, **options):
    return {
        name: data.frames(split).read(i, **options)
        for split in ("train", "val")
        for i, name in enumerate(data.frames(split).names)
    }


def test_torchvision_reads_the_same_of_middlebury(tmp_path, make):
    root = middlebury(tmp_path / "Middlebury2014" / "train", make, suffix="-perfect")
    theirs = Middlebury2014Stereo(str(tmp_path))
    ours = all_frames(MiddleburyData(str(root), **SMALL), both_truths=True)
    assert sorted(ours) == [f"{name}-perfect" for name in SCENES]
    for index, name in enumerate(sorted(ours)):
        left, right, truth, valid = theirs[index]
        frame = ours[name]
        assert np.array_equal(make.plain(frame.left), np.array(left))
        assert np.array_equal(make.plain(frame.right), np.array(right))
        assert np.array_equal(frame.valid.numpy(), valid)
        assert np.array_equal(frame.disparity.numpy()[valid], truth[0][valid])
        assert not valid[0].any()
        assert valid[1:].all()
        right_truth, right_valid = theirs._read_disparity(f"{root}/{name}/disp1.pfm")
        assert np.array_equal(frame.right_valid.numpy(), right_valid)
        assert np.array_equal(frame.right_disparity.numpy()[right_valid], right_truth[0][right_valid])


def test_torchvision_reads_the_same_of_eth3d(tmp_path, make):
    root = eth3d(tmp_path / "ETH3D", make)
    theirs = ETH3DStereo(str(tmp_path))
    ours = all_frames(ETH3DData(str(root), pixels="all", **SMALL))
    visible = all_frames(ETH3DData(str(root), **SMALL))
    assert sorted(ours) == ["delivery_area_1l", "electro_1s", "forest_2s"]
    for index, name in enumerate(sorted(ours)):
        left, right, truth, mask = theirs[index]
        frame = ours[name]
        assert np.array_equal(make.plain(frame.left), np.array(left))
        assert np.array_equal(make.plain(frame.right), np.array(right))
        assert np.array_equal(frame.valid.numpy(), np.isfinite(truth[0]))
        assert np.array_equal(frame.disparity.numpy(), truth[0])
        # torchvision's mask takes what is hidden (128, columns 5 to 8) for visible; and it forgets where no truth is.
        hidden = np.zeros_like(mask)
        hidden[:, 5:9] = True
        assert np.array_equal(visible[name].valid.numpy(), mask & ~hidden & np.isfinite(truth[0]))


def test_the_evaluations_names_are_read_too(tmp_path, make):
    root = middlebury(tmp_path, make, names=("disp0GT.pfm",), mask=True)
    whole, visible = (MiddleburyData(str(root), pixels=pixels, **SMALL) for pixels in ("all", "visible"))
    every, some = whole.frames("val").read(0).valid, visible.frames("val").read(0).valid
    assert every[1:].all()
    assert torch.equal(some, every & (torch.arange(31) >= 9))
    assert not whole.has_right_truths()
    with pytest.raises(ValueError, match=r"^swap_views must be 0 without disparities of the right view"):
        MiddleburyData(str(root), **SMALL | {"augmentation": Augmentation(7, 11, swap_views=0.1)}).setup("fit")


def test_every_so_manieth_scene_is_scored_and_not_trained_on(tmp_path, make):
    root = str(middlebury(tmp_path, make))
    data = MiddleburyData(root, **SMALL)
    assert data.frames("val").names == data.frames("test").names == ["Adirondack", "Playroom"]
    assert data.frames("train").names == SCENES[1:5]
    assert data.has_right_truths()
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 2
    assert len(list(data.val_dataloader())) == 2
    everything = MiddleburyData(root, val_every=1, **SMALL)
    assert everything.frames("test").names == SCENES
    with pytest.raises(ValueError, match=r"^train of .* must have at least 1 frame, got none$"):
        everything.setup("fit")


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("im1.png", r"Piano must hold the right view, im1\.png, got no such file; get the scene again or remove it"),
        ("disp0.pfm", r"Piano must hold the disparity, disp0\.pfm or disp0GT\.pfm, got no such file; get the scene .*"),
        ("mask0nocc.png", r"Piano must hold the mask of visible pixels, mask0nocc\.png, .*; or set --data\.pixels all"),
    ],
)
def test_a_missing_file_is_named(tmp_path, make, file, sentence):
    root = middlebury(tmp_path, make, mask=True)
    (root / "Piano" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(root))}/{sentence}$"):
        MiddleburyData(str(root), pixels="visible", **SMALL).setup("test")


def test_a_missing_set_is_named(tmp_path, make):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"must hold a folder per scene with its im0\.png, got none; unpack the scenes"
        ):
            MiddleburyData(str(folder), **SMALL).setup("test")
    with pytest.raises(
        FileNotFoundError, match=r"two_view_training must hold a folder per scene .*; unpack two_view_training and"
    ):
        ETH3DData(str(tmp_path), **SMALL).setup("test")
    root = eth3d(tmp_path, make)
    (root / "two_view_training_gt" / "electro_1s" / "disp0GT.pfm").unlink()
    with pytest.raises(FileNotFoundError, match="two_view_training_gt/electro_1s must hold the disparity"):
        ETH3DData(str(root), **SMALL).setup("test")


def test_a_damaged_mask_is_refused(tmp_path, make):
    root = middlebury(tmp_path, make, mask=True)
    data = MiddleburyData(str(root), pixels="visible", **SMALL)
    path = root / "Adirondack" / "mask0nocc.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must be an image that can be read, got \S[^\n]*$"):
        data.frames("val").read(0)
    make.write_image(path, make.random_image(0))
    with pytest.raises(ValueError, match=r"mask0nocc\.png must be a grey image of 8 bits, got mode RGB$"):
        data.frames("val").read(0)


def test_a_mask_that_is_damaged_in_other_ways_is_refused(tmp_path, make, opens_damaged):
    data = MiddleburyData(str(middlebury(tmp_path, make, mask=True)), pixels="visible", **SMALL)
    frames = data.frames("val")
    opens_damaged()
    with pytest.raises(ValueError, match=r"mask0nocc\.png must be an image that can be read, got damage$"):
        frames.read_mask("mask0nocc.png")


def test_options_that_cannot_be_are_refused():
    for kind in (MiddleburyData, ETH3DData):
        with pytest.raises(ValueError, match=r"^pixels must be all or visible, got some$"):
            kind(pixels="some")
        with pytest.raises(ValueError, match=r"^val_every must be at least 1, got 0$"):
            kind(val_every=0)
