"""What predictions leave behind: maps, pictures and depths."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from lineara.tasks.stereo_depth.calibration import Calibration, depth
from lineara.tasks.stereo_depth.pfm import read_pfm
from lineara.tasks.stereo_depth.predictions import PredictionFolder

HEIGHT, WIDTH = 7, 11


def a_map(seed=0):
    return torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) * 60


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_pair_gets_its_disparities_and_their_picture(tmp_path):
    path = PredictionFolder(tmp_path / "predictions").add(a_map().double().requires_grad_(), name="street")
    assert path == tmp_path / "predictions/street.pfm"
    assert names_in(path.parent) == ["street.pfm", "street.png"]
    np.testing.assert_array_equal(read_pfm(path), a_map().numpy())
    with Image.open(path.with_suffix(".png")) as picture:
        assert min(picture.size) > 100


def test_depths_are_written_where_the_cameras_are_known(tmp_path):
    PredictionFolder(tmp_path).add(a_map(), name="street", calibration=Calibration(994.978, 0.193001, 31.086))
    ends = [".pfm", ".ply", ".png", "_depth.pfm", "_depth.png"]
    assert names_in(tmp_path) == [f"street{end}" for end in ends]
    expected = 994.978 * 0.193001 / (a_map().double().numpy() + 31.086)
    np.testing.assert_allclose(read_pfm(tmp_path / "street_depth.pfm"), expected, rtol=1e-6)
    with Image.open(tmp_path / "street_depth.png") as picture:
        np.testing.assert_array_equal(np.array(picture), np.round(expected.astype(np.float32) * 1000))


def test_what_a_depth_of_16_bits_cannot_hold_is_0(tmp_path):
    disparity = torch.tensor([[10.0, 0.001, 0.0, -5.0, math.nan, math.inf]])
    PredictionFolder(tmp_path).add(disparity, name="a", calibration=Calibration(1000.0, 0.5))
    with Image.open(tmp_path / "a_depth.png") as picture:
        assert np.array(picture).tolist() == [[50_000, 0, 0, 0, 0, 0]]


def test_points_carry_the_colours_of_the_left_view(tmp_path):
    disparity, left = torch.full((2, 3), 10.0), torch.rand(3, 2, 3)
    disparity[0, 1] = 0.0  # which is at no depth
    PredictionFolder(tmp_path).add(disparity, name="a", left=left, calibration=Calibration(100.0, 0.5))
    header, body = (tmp_path / "a.ply").read_bytes().split(b"end_header\n")
    assert header.decode().splitlines()[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 5"]
    rows = np.frombuffer(body, dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    expected = [[x * 0.05, y * 0.05, 5.0] for y in (-0.5, 0.5) for x in (-1, 0, 1) if (x, y) != (0, -0.5)]
    np.testing.assert_allclose(rows["xyz"], expected, rtol=1e-6)
    kept = torch.ones(2, 3, dtype=torch.bool)
    kept[0, 1] = False
    assert rows["rgb"].tolist() == (left.permute(1, 2, 0)[kept] * 255).round().int().tolist()


def test_kittis_server_gets_its_own_files(tmp_path):
    PredictionFolder(tmp_path, kitti=True).add(torch.tensor([[1.5, 100.25, 300.0]]), name="000007_10")
    with Image.open(tmp_path / "kitti/000007_10.png") as picture:
        assert np.array(picture).tolist() == [[384, 25_664, 0]]
    assert names_in(tmp_path) == ["000007_10.pfm", "000007_10.png", "kitti"]


def test_a_depth_of_an_earlier_run_does_not_stay_beside_other_disparities(tmp_path):
    for calibration in (Calibration(1000.0, 0.5), None):
        PredictionFolder(tmp_path).add(a_map(), name="street", calibration=calibration)
    assert names_in(tmp_path) == ["street.pfm", "street.png"]


def test_a_folder_without_maps_is_refused(tmp_path):
    folder = PredictionFolder(tmp_path)
    with pytest.raises(ValueError, match=r"^predict must be given a pair that can be read, got none; see the warnings"):
        folder.check_not_empty()
    folder.add(a_map(), name="street")
    folder.check_not_empty()


def test_depths_by_hand():
    disparity = torch.tensor([[20.0, 10.0, 0.0, -1.0, math.nan, math.inf]])
    metres = depth(disparity, Calibration(focal_length=1000.0, baseline=0.5))
    assert metres.dtype == torch.float32
    assert metres[0, :4].tolist() == [25.0, 50.0, math.inf, math.inf]
    assert math.isnan(metres[0, 4])
    assert metres[0, 5] == 0.0
    # The principal points lie apart: parallel rays have the disparity -30.
    shifted = depth(torch.tensor([20.0, 0.0, -29.0, -30.0, -31.0]), Calibration(1000.0, 0.5, doffs=30.0))
    assert shifted.tolist() == pytest.approx([10.0, 500 / 30, 500.0, math.inf, math.inf])


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_cameras_that_cannot_be_are_refused(value):
    for name in ("focal_length", "baseline"):
        numbers = {"focal_length": 1000.0, "baseline": 0.5, name: value}
        with pytest.raises(ValueError, match=rf"^{name} must be a number above 0, got .*; mend the calibration$"):
            Calibration(**numbers)
    if not math.isfinite(value):
        with pytest.raises(ValueError, match=r"^doffs must be a finite number of pixels, got "):
            Calibration(1000.0, 0.5, value)


def test_pairs_of_one_name_do_not_overwrite_each_other(tmp_path):
    folder = PredictionFolder(tmp_path)
    names = ["a", "a", "A", "b/0006", "c/0006", "/etc/../d", ""]
    paths = [folder.add(a_map(seed), name=name) for seed, name in enumerate(names)]
    assert [path.stem for path in paths] == ["a", "a-2", "A-3", "b_0006", "c_0006", "etc_d", "pair"]
    assert all(path.parent == tmp_path for path in paths)
    assert len(names_in(tmp_path)) == 14
    for seed, path in enumerate(paths):
        np.testing.assert_array_equal(read_pfm(path), a_map(seed).numpy())


@pytest.mark.parametrize("names", [["a", "a_depth"], ["a_depth", "a"], ["A_DEPTH", "a"]], ids=str)
def test_a_pair_named_like_the_depth_of_another_does_not_overwrite_it(tmp_path, names):
    folder = PredictionFolder(tmp_path)
    calibration = Calibration(1000.0, 0.5)
    for seed, name in enumerate(names):
        path = folder.add(a_map(seed), name=name, calibration=calibration)
        written = read_pfm(path.with_name(f"{path.stem}_depth.pfm"))
        np.testing.assert_array_equal(written, depth(a_map(seed), calibration))
    assert len({name.casefold() for name in names_in(tmp_path)}) == 10


def test_a_later_run_writes_over_the_files_of_an_earlier_one(tmp_path):
    for seed in range(2):
        path = PredictionFolder(tmp_path).add(a_map(seed), name="a")
    assert names_in(tmp_path) == ["a.pfm", "a.png"]
    np.testing.assert_array_equal(read_pfm(path), a_map(1).numpy())
