"""Pairs of images, and the calibration of their cameras."""

import re

import pytest

from lineara.tasks.stereo_depth.pairs_to_predict import pairs_to_predict, read_calibration


@pytest.fixture
def folders(tmp_path, make):
    for place, names in (("left", "bad"), ("right", "cabd")):
        for name in names:
            make.write_image(tmp_path / place / f"{name}.png", make.random_image(0))
    return tmp_path / "left", tmp_path / "right"


def test_two_images_are_a_pair_whatever_their_names(folders):
    left, right = folders[0] / "b.png", folders[1] / "c.png"
    assert pairs_to_predict(str(left), str(right)) == [("b", left, right)]


def test_images_of_equal_names_are_pairs_and_others_are_reported(folders, make):
    left, right = folders
    make.write_image(left / "z.png", make.random_image(0))
    with pytest.warns(RuntimeWarning) as caught:
        found = pairs_to_predict(str(left), str(right))
    assert found == [(name, left / f"{name}.png", right / f"{name}.png") for name in "abd"]
    assert [str(warning.message) for warning in caught] == [
        f"left out: {left / 'z.png'} must have a partner of its name in {right}, got none",
        f"left out: {right / 'c.png'} must have a partner of its name in {left}, got none",
    ]


def test_what_is_no_pair_is_refused(folders, make, tmp_path):
    left, right = map(str, folders)
    for given in ((None, None), (left, None), (None, right)):
        with pytest.raises(
            ValueError, match=r"^predict_left and predict_right must be two images or two folders, got .*; set --"
        ):
            pairs_to_predict(*given)
    with pytest.raises(ValueError, match=r"two folders, got .*, of which one is a folder$"):
        pairs_to_predict(left, f"{right}/a.png")
    with pytest.raises(
        FileNotFoundError, match=rf"^{re.escape(left)}/no must be an image or a folder of images, got nothing"
    ):
        pairs_to_predict(f"{left}/no", right)
    make.write_image(tmp_path / "third" / "y.png", make.random_image(0))
    with (
        pytest.warns(RuntimeWarning, match="left out"),
        pytest.raises(FileNotFoundError, match=r"must hold images of equal names, got none; rename one of each pair$"),
    ):
        pairs_to_predict(left, str(tmp_path / "third"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty must hold images"):
        pairs_to_predict(str(tmp_path / "empty"), right)


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
    expected = {"focal_length": 4161.221, "baseline": 0.176252, "doffs": 209.059}
    assert read_calibration(path) == pytest.approx(expected)
    path.write_text(ADIRONDACK.replace("\n", "\r\n").replace("=", " = ").replace("doffs", "ignored"))
    assert read_calibration(str(path)) == pytest.approx(expected | {"doffs": 0})
    path.write_text(ADIRONDACK, encoding="utf-8-sig")
    assert read_calibration(path) == pytest.approx(expected)
    path.write_text("cam0=[1.5e3 0 3 ; 0 1 4; 0 0 1]\nbaseline=5e1\ndoffs=-3\n")
    assert read_calibration(path) == pytest.approx({"focal_length": 1500, "baseline": 0.05, "doffs": -3})


@pytest.mark.parametrize(
    ("line", "instead", "sentence"),
    [
        ("cam0=", "cam2=", r"must have a line cam0=\[f 0 x; .* in pixels, got no such line"),
        ("[4161.221 0 1445.577;", "4161.221", r"must have a line cam0=\[f 0 x; .* in pixels, got 4161\.221 .*"),
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
