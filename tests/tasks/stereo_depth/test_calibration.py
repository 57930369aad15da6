"""Calibrations of Middlebury, KITTI and OpenCV, and the depths and points that they give."""

import re

import cv2
import numpy as np
import pytest
import torch

from lineara.tasks.stereo_depth.calibration import Calibration, depth, points, read_calibration

# Middlebury's own of Adirondack-perfect.
ADIRONDACK = """\
cam0=[4161.221 0 1445.577; 0 4161.221 984.686; 0 0 1]
cam1=[4161.221 0 1654.636; 0 4161.221 984.686; 0 0 1]
doffs=209.059
baseline=176.252
width=2880
height=1988
ndisp=280
"""


def test_middleburys_calibration(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text(ADIRONDACK)
    expected = {"focal_length": 4161.221, "baseline": 0.176252, "doffs": 209.059, "center_x": 1445.577}
    expected |= {"center_y": 984.686, "width": 2880, "height": 1988}
    assert read_calibration(path) == pytest.approx(expected)
    path.write_text(ADIRONDACK.replace("\n", "\r\n").replace("=", " = ").replace("doffs", "ignored"))
    assert read_calibration(str(path)) == pytest.approx(expected | {"doffs": 0})
    path.write_text(ADIRONDACK, encoding="utf-8-sig")
    assert read_calibration(path) == pytest.approx(expected)
    path.write_text("cam0=[1.5e3 0 3 ; 0 1 4; 0 0 1]\nbaseline=5e1\ndoffs=-3\n")
    assert read_calibration(path) == pytest.approx(
        {"focal_length": 1500, "center_x": 3, "center_y": 4, "baseline": 0.05, "doffs": -3}
    )


@pytest.mark.parametrize(
    ("line", "instead", "sentence"),
    [
        ("cam0=", "cam2=", r"must have a line cam0=\[f 0 x; .* in pixels, .*got no such line"),
        ("[4161.221 0 1445.577;", "4161.221", r"must have a line cam0=\[f 0 x; .* in pixels, .*got 4161\.221 .*"),
        ("[4161.221 0 1445", "[0 0 1445", r"must have a number above 0 for cam0, got 0"),
        ("baseline=176.252", "", r"must have a number above 0 for baseline, got no such line"),
        ("baseline=176.252", "baseline=wide", r"must have a number above 0 for baseline, got wide"),
        ("baseline=176.252", "baseline=-1", r"must have a number above 0 for baseline, got -1"),
        ("baseline=176.252", "baseline=1e999", r"must have a number above 0 for baseline, got 1e999"),
        ("doffs=209.059", "doffs=", r"must have a number for doffs, got "),
    ],
)
def test_a_calibration_that_is_not_whole_is_refused(tmp_path, line, instead, sentence):
    path = tmp_path / "calib.txt"
    path.write_text(ADIRONDACK.replace(line, instead, 1))
    with pytest.raises(ValueError, match=rf"^\S*calib\.txt {sentence}$"):
        read_calibration(path)


def test_files_that_are_no_calibration_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no.txt must be a calibration file, got no such file; name another one$"
    ):
        read_calibration(tmp_path / "no.txt")
    with pytest.raises(OSError, match=r"must be a file that can be read, got Is a directory$"):
        read_calibration(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary must be a text file, got one that is not"):
        read_calibration(tmp_path / "binary")


# The same cameras, as others write them.
FOCAL, CENTER, BASELINE, DOFFS, SIZE = 700.0, (310.0, 250.0), 0.12, 3.0, (640, 480)
LEFT = np.array([[FOCAL, 0, CENTER[0], 0], [0, FOCAL, CENTER[1], 0], [0, 0, 1, 0]])
RIGHT = LEFT + np.array([[0, 0, DOFFS, -FOCAL * BASELINE], [0] * 4, [0] * 4])


def kitti_line(name, matrix):
    return f"{name}: " + " ".join(f"{number:.12e}" for number in np.ravel(matrix))


KITTI = {
    "object": [kitti_line("P0", LEFT * 2), kitti_line("P1", LEFT * 2), kitti_line("P2", LEFT), kitti_line("P3", RIGHT)],
    "raw": [
        *("calib_time: 09-Jan-2012 13:57:47", "S_rect_02: 6.40e+02 4.80e+02"),
        *(kitti_line("P_rect_02", LEFT), kitti_line("P_rect_03", RIGHT), kitti_line("R_rect_02", np.eye(3))),
    ],
    "grey": [kitti_line("P0", LEFT), kitti_line("P1", RIGHT)],
}


def check(found, *, has_size):
    expected = {"focal_length": FOCAL, "center_x": CENTER[0], "center_y": CENTER[1], "baseline": BASELINE}
    expected |= {"doffs": DOFFS} | (dict(zip(("width", "height"), SIZE)) if has_size else {})
    assert found == pytest.approx(expected)
    Calibration(**found)


@pytest.mark.parametrize("kind", KITTI)
def test_kittis_files_are_read(tmp_path, kind):
    path = tmp_path / "calib.txt"
    path.write_text("\n".join(KITTI[kind]) + "\n")
    check(read_calibration(path), has_size=kind == "raw")


def test_a_broken_file_of_kitti_is_named(tmp_path):
    path = tmp_path / "calib.txt"
    path.write_text(KITTI["object"][0])
    with pytest.raises(ValueError, match=r"must have the lines P2 and P3.*got P0$"):
        read_calibration(path)
    path.write_text("P2: 1 2 3\nP3: 1 2 3\n")
    with pytest.raises(ValueError, match="12 numbers for P2, got 3"):
        read_calibration(path)


@pytest.mark.parametrize("suffix", [".yml", ".xml", ".json"])
@pytest.mark.parametrize("kind", ["P", "Q"])
@pytest.mark.parametrize(("unit", "metres"), [("mm", 0.001), ("cm", 0.01), ("m", 1.0)])
def test_files_of_opencv_are_read(tmp_path, suffix, kind, unit, metres):
    path = tmp_path / f"stereo{suffix}"
    translation = -BASELINE / metres
    file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    if kind == "P":
        file.write("P1", LEFT)
        file.write("P2", LEFT + np.array([[0, 0, DOFFS, FOCAL * translation], [0] * 4, [0] * 4]))
        file.write("image_width", SIZE[0])
        file.write("image_height", SIZE[1])
    else:
        last = [0, 0, -1 / translation, -DOFFS / translation]
        file.write("Q", np.array([[1, 0, 0, -CENTER[0]], [0, 1, 0, -CENTER[1]], [0, 0, 0, FOCAL], last]))
    file.release()
    check(read_calibration(path, unit), has_size=kind == "P")
    with pytest.raises(ValueError, match=r"predict_unit must be one of mm, cm, m .*, got None; set"):
        read_calibration(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "stereo.yml"
    with pytest.raises(FileNotFoundError, match=r"stereo\.yml must be a calibration file"):
        read_calibration(path, "m")
    path.write_text("{ not: [yaml")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_calibration(path, "m")
    file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    file.write("M1", np.eye(3))
    file.release()
    with pytest.raises(ValueError, match=r"must hold the matrices P1 and P2, or Q, .* got none of them"):
        read_calibration(path, "m")


def test_another_size_is_refused():
    calibration = Calibration(700, 0.1, width=741, height=500)
    calibration.check_size("a pair", 500, 741)
    Calibration(700, 0.1).check_size("a pair", 200, 320)
    with pytest.raises(ValueError, match=r"of 320 x 200 pixels \(width x height\), as a pair has, got one of 741 x 5"):
        calibration.check_size("a pair", 200, 320)


def test_points_are_projected_back_to_their_pixels():
    calibration = Calibration(FOCAL, BASELINE, DOFFS, *CENTER)
    disparity = torch.rand(13, 17, dtype=torch.float64) * 50 + 5
    where = points(depth(disparity, calibration), calibration).double()
    for matrix, shift in ((LEFT, 0), (RIGHT, disparity)):
        seen = where @ torch.tensor(matrix[:, :3]).mT + torch.tensor(matrix[:, 3])
        columns, rows = seen[..., 0] / seen[..., 2], seen[..., 1] / seen[..., 2]
        expected = (torch.arange(17.0) - shift).double().expand(13, 17)
        torch.testing.assert_close(columns, expected, atol=1e-3, rtol=0)
        torch.testing.assert_close(rows, torch.arange(13.0).double()[:, None].expand(13, 17), atol=1e-3, rtol=0)
