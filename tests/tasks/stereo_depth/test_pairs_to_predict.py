"""Pairs of images to predict."""

import re

import pytest

from lineara.tasks.stereo_depth.pairs_to_predict import pairs_to_predict


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


def test_patterns_are_pairs_of_scenes(tmp_path, make):
    for scene in ("attic", "barn", ".trash"):
        for view in ("im0", "im1"):
            make.write_image(tmp_path / scene / f"{view}.png", make.random_image(0))
    make.write_image(tmp_path / "cellar" / "im0.png", make.random_image(0))
    with pytest.warns(RuntimeWarning, match=r"cellar/im0\.png must have a partner .*cellar/im1\.png"):
        found = pairs_to_predict(f"{tmp_path}/*/im0.png", f"{tmp_path}/*/im1.png")
    assert found == [
        (f"{scene}/im0", tmp_path / scene / "im0.png", tmp_path / scene / "im1.png") for scene in ("attic", "barn")
    ]
    assert pairs_to_predict(str(found[0][1]), str(found[0][2])) == found[:1]
    with pytest.raises(ValueError, match="must have as many"):
        pairs_to_predict(f"{tmp_path}/*/im0.png", str(found[0][2]))
    with pytest.raises(FileNotFoundError, match="got no pair"):
        pairs_to_predict(f"{tmp_path}/*/left.png", f"{tmp_path}/*/right.png")
