"""KITTI: truths of 16 bits, both years' folders, and a split that is always the same."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import Kitti2012Stereo, Kitti2015Stereo

from lineara.tasks.stereo_depth import KittiData
from lineara.tasks.stereo_depth.kitti_data import read_kitti_truth
from lineara.tasks.stereo_depth.transforms import Augmentation

FOLDERS = {2012: ("colored_0", "colored_1", "disp_occ"), 2015: ("image_2", "image_3", "disp_occ_0")}


def data(root, year=2015, **options):
    settings = {"num_train": 5, "augmentation": Augmentation(7, 11), "batch_size": 2, "num_workers": 0}
    return KittiData(str(root), year, **settings | options)


def test_values_are_divided_by_256_and_0_is_none(tmp_path):
    path = tmp_path / "truth.png"
    Image.fromarray(np.array([[0, 1, 256], [300, 65535, 0]], np.uint16)).save(path)
    found = read_kitti_truth(str(path))
    assert found.dtype == np.float32
    expected = [[np.nan, 1 / 256, 1], [300 / 256, 65535 / 256, np.nan]]
    assert np.array_equal(found, np.array(expected, np.float32), equal_nan=True)


@pytest.mark.parametrize("year", FOLDERS)
def test_torchvision_reads_the_same(tmp_path, make, year):
    root = make.write_kitti(tmp_path / f"Kitti{year}", year)
    theirs = {2012: Kitti2012Stereo, 2015: Kitti2015Stereo}[year](str(tmp_path))
    # Of 2012, torchvision takes the truths of visible pixels; of 2015, its pattern takes both times' images.
    module = data(root, year, pixels="visible" if year == 2012 else "all")
    frames = [module.frames(split).read(i) for split in ("train", "val") for i in range(len(module.frames(split)))]
    assert len(frames) == 7
    for number, frame in enumerate(frames):
        if year == 2012:
            left, right, truth = theirs[number][:3]
        else:
            left, right = (theirs._read_img(theirs._images[2 * number][place]) for place in (0, 1))
            truth, _ = theirs._read_disparity(f"{root}/training/disp_occ_0/{number:06}_10.png")
        assert np.array_equal(make.plain(frame.left), np.array(left))
        assert np.array_equal(make.plain(frame.right), np.array(right))
        assert np.array_equal(frame.valid.numpy(), truth[0] > 0)
        assert np.array_equal(frame.disparity.numpy()[truth[0] > 0], truth[0][truth[0] > 0].astype(np.float32))
        assert not frame.valid[:, ::3].any()
        assert frame.valid[:, 1::3].all()


@pytest.mark.parametrize("year", FOLDERS)
def test_the_first_frames_train_and_the_others_are_scored(tmp_path, make, year):
    module = data(make.write_kitti(tmp_path, year), year)
    assert module.frames("train").names == [f"{number:06}_10" for number in range(5)]
    assert module.frames("val").names == module.frames("test").names == ["000005_10", "000006_10"]
    module.setup("fit")
    assert len(list(module.train_dataloader())) == 2


def test_visible_pixels_have_their_own_truths(tmp_path, make):
    root = make.write_kitti(tmp_path)
    whole, visible = (data(root, pixels=pixels).frames("train").read(0).disparity for pixels in ("all", "visible"))
    assert not torch.equal(whole, visible)


def test_views_change_places_in_2015_only(tmp_path, make):
    mirror = {"augmentation": Augmentation(23, 31, swap_views=1.0), "batch_size": 1}
    module = data(make.write_kitti(tmp_path / "2015"), **mirror)
    module.setup("fit")
    batch = next(iter(module.train_dataloader()))
    truth = read_kitti_truth(f"{tmp_path}/2015/training/disp_occ_1/{batch['name'][0]}.png")[:, ::-1]
    assert np.array_equal(batch["disparity"][0].numpy(), truth, equal_nan=True)
    with pytest.raises(ValueError, match=r"^swap_views must be 0 without disparities of the right view"):
        data(make.write_kitti(tmp_path / "2012", 2012), 2012, **mirror).setup("fit")


def test_the_folder_follows_from_the_year():
    assert (KittiData().data_root, KittiData(year=2012).data_root) == ("data/kitti2015", "data/kitti2012")


@pytest.mark.parametrize("year", FOLDERS)
def test_what_is_missing_is_named(tmp_path, make, year):
    root = make.write_kitti(tmp_path, year)
    left, right, truth = FOLDERS[year]
    for folder, title in ((truth, "disparity"), (right, "right view"), (left, "left view")):
        path = root / "training" / folder / "000003_10.png"
        content = path.read_bytes()
        path.unlink()
        sentence = (
            rf"^{re.escape(str(path))} must be the {title} of frame 000003_10, got no such file \(1 missing in all\)"
        )
        with pytest.raises(FileNotFoundError, match=sentence):
            data(root, year).setup("fit")
        path.write_bytes(content)
    with pytest.raises(
        FileNotFoundError, match=rf"must be a folder of KITTI {4027 - year}, got no such folder; unpack the set"
    ):
        data(root, 4027 - year).setup("fit")


@pytest.mark.parametrize("pixels", [np.zeros((23, 31), np.uint8), np.zeros((23, 31, 3), np.uint8)])
def test_a_truth_of_other_bits_or_channels_is_refused(tmp_path, make, pixels):
    root = make.write_kitti(tmp_path)
    path = root / "training" / "disp_occ_0" / "000000_10.png"
    make.write_image(path, pixels)
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(path))} must be a grey image of 16 bits, got mode (L|RGB); get the"
    ):
        data(root).frames("train").read(0)


def test_a_damaged_truth_is_refused(tmp_path, make):
    root = make.write_kitti(tmp_path)
    path = root / "training" / "disp_occ_0" / "000000_10.png"
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"text", b""):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(path))} must be an image that can be read, got \S[^\n]*$"
        ):
            data(root).frames("train").read(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"_10\.png must be an image of disparities, got no such file$"):
        read_kitti_truth(str(path))
    make.write_image(path, np.ones((23, 29), np.uint16))
    with pytest.raises(ValueError, match=r"_10\.png must have the size of its image, got 23 x 29 but 23 x 31 pixels$"):
        data(root).frames("train").read(0)


def test_a_truth_that_is_damaged_in_other_ways_is_refused(opens_damaged):
    opens_damaged()
    with pytest.raises(ValueError, match=r"^truth\.png must be an image that can be read, got damage$"):
        read_kitti_truth("truth.png")


def test_options_that_cannot_be_are_refused(tmp_path, make):
    for wrong, sentence in (
        ({"year": 2013}, "year must be 2012 or 2015, got 2013"),
        ({"pixels": "some"}, "pixels must be all or visible, got some"),
        ({"num_train": 0}, "num_train must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            KittiData(**wrong)
    root = make.write_kitti(tmp_path)
    with pytest.raises(
        ValueError, match=rf"^num_train must leave one of the 7 frames of {re.escape(str(root))} to .*, got 7;"
    ):
        data(root, num_train=7).setup("fit")
