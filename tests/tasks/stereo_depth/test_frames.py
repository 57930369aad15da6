"""Frames read from their files, and what is said of files that do not fit together."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lineara.tasks.stereo_depth.frames import FileFrames, FrameFiles, matched, read_float_truth, read_views


@pytest.fixture
def files(tmp_path, make):
    for place, name in enumerate(("left", "right")):
        make.write_image(tmp_path / f"{name}.png", make.random_image(place))
        truth = make.random_truth(place)
        truth[2, 3:5] = np.inf
        make.write_bytes(tmp_path / f"{name}.pfm", make.pfm_bytes(truth))
    mask = np.zeros((23, 31), bool)
    mask[:11] = True
    np.save(tmp_path / "mask.npy", mask)
    paths = (str(tmp_path / name) for name in ("left.png", "right.png", "left.pfm", "right.pfm", "mask.npy"))
    return FrameFiles("street/7", *paths)


def frames(files, **options):
    return FileFrames([files], **{"read_truth": read_float_truth, "read_mask": np.load} | options)


def test_a_frame_is_what_its_files_say(files, make):
    frame = frames(files, read_mask=None).read(0)
    assert np.array_equal(make.plain(frame.left), make.random_image(0))
    assert np.array_equal(make.plain(frame.right), make.random_image(1))
    expected = make.random_truth(0)
    finite = np.ones_like(expected, bool)
    finite[2, 3:5] = False
    assert np.array_equal(frame.valid.numpy(), finite)
    assert np.array_equal(frame.disparity.numpy()[finite], expected[finite])
    assert frame.disparity.dtype == torch.float32
    assert frame.right_disparity is frame.right_valid is None
    both = frames(files, read_mask=None).read(0, both_truths=True)
    assert np.array_equal(both.right_disparity.numpy()[finite], make.random_truth(1)[finite])
    assert np.array_equal(both.right_valid.numpy(), finite)


def test_a_mask_takes_pixels_away(files):
    whole, masked = frames(files, read_mask=None).read(0).valid, frames(files).read(0).valid
    assert torch.equal(masked[:11], whole[:11])
    assert not masked[11:].any()


def test_truths_that_lie_mostly_on_the_other_side_are_refused_unless_said_so(files, make):
    truth = make.random_truth(0)
    make.write_bytes(Path(files.disparity), make.pfm_bytes(-truth))
    with pytest.raises(
        ValueError, match=r"left\.pfm must hold disparities that are not mostly negative; .* --data\.left_sign neg"
    ):
        frames(files).read(0)
    frame = frames(files, negated=True).read(0, both_truths=True)
    assert np.array_equal(frame.disparity.numpy(), truth)
    assert frame.right_disparity.median() > 0  # those of the right view are left alone
    make.write_bytes(Path(files.disparity), make.pfm_bytes(truth))
    with pytest.raises(
        ValueError, match=r"left\.pfm must hold disparities that are not mostly positive; .* by positive$"
    ):
        frames(files, negated=True).read(0)
    # A few negative ones are what the file says.
    truth[:5] *= -1
    make.write_bytes(Path(files.disparity), make.pfm_bytes(truth))
    assert np.array_equal(frames(files, read_mask=None).read(0).disparity.numpy(), truth)


def test_a_frame_without_any_truth_is_read(files, make):
    make.write_bytes(Path(files.disparity), make.pfm_bytes(np.full((23, 31), np.inf)))
    assert not frames(files).read(0).valid.any()


def test_sizes_that_differ_are_refused_with_the_files_names(files, make, tmp_path):
    make.write_image(tmp_path / "small.png", make.random_image(0, (23, 29)))
    make.write_bytes(tmp_path / "small.pfm", make.pfm_bytes(make.random_truth(0, (19, 31))))
    small = {"image": str(tmp_path / "small.png"), "truth": str(tmp_path / "small.pfm")}
    for change, sentence in (
        (
            {"left": small["image"]},
            f"{small['image']} and {files.right} must be of the same size, got 23 x 29 and 23 x 31 pixels",
        ),
        (
            {"right": small["image"]},
            f"{files.left} and {small['image']} must be of the same size, got 23 x 31 and 23 x 29 pixels",
        ),
        (
            {"disparity": small["truth"]},
            f"{small['truth']} must have the size of its image, got 19 x 31 but 23 x 31 pixels",
        ),
        (
            {"right_disparity": small["truth"]},
            f"{small['truth']} must have the size of its image, got 19 x 31 but 23 x 31 pixels",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            frames(replace(files, **change)).read(0, both_truths=True)
    np.save(tmp_path / "mask.npy", np.ones((23, 29), bool))
    with pytest.raises(ValueError, match=r"mask\.npy must have the size of its image, got 23 x 29 but 23 x 31 pixels$"):
        frames(files).read(0)


def test_damaged_files_are_refused_with_their_names(files, make, tmp_path):
    whole = (tmp_path / "right.png").read_bytes()
    (tmp_path / "right.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"right\.png must be an image that can be read, got .*truncated"):
        frames(files).read(0)
    (tmp_path / "right.png").unlink()
    with pytest.raises(
        ValueError, match=r"right\.png must be an image that can be read, got No such file or directory$"
    ):
        read_views(files.left, files.right)
    make.write_image(tmp_path / "right.png", make.random_image(0))
    (tmp_path / "left.pfm").write_bytes((tmp_path / "left.pfm").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"left\.pfm must hold 23 x 31 values"):
        frames(files).read(0)
    values = np.zeros((23, 31, 3), "<f4").tobytes()
    (tmp_path / "left.pfm").write_bytes(b"PF\n31 23\n-1\n" + values)
    with pytest.raises(ValueError, match=r"left\.pfm must have 1 channel, got 3 channels$"):
        frames(files).read(0)


VIEWS = {
    "left": {"b": "l/b", "a": "l/a"},
    "right": {"a": "r/a", "b": "r/b"},
    "disparity": {"a": "d/a", "b": "d/b", "unused": "d/unused"},
    "right_disparity": {"a": "e/a"},
}


def expected(kind, name):
    return f"{kind}-of-{name}.png"


def test_files_are_matched_by_names_in_their_order():
    first, second = matched(VIEWS, expected, optional=["right_disparity"])
    assert first == FrameFiles("a", "l/a", "r/a", "d/a")
    assert second == FrameFiles("b", "l/b", "r/b", "d/b")
    whole = VIEWS | {"right_disparity": {"a": "e/a", "b": "e/b"}}
    assert matched(whole, expected, optional=["right_disparity"])[1].right_disparity == "e/b"
    assert matched(whole, expected)[1].right_disparity is None
    assert matched({kind: {} for kind in VIEWS}, expected, optional=["right_disparity"]) == []


@pytest.mark.parametrize(
    ("kind", "title"), [("left", "left view"), ("right", "right view"), ("disparity", "disparity")]
)
def test_a_missing_partner_is_named(kind, title):
    views = VIEWS | {kind: {"a": "there"}}
    sentence = rf"^{kind}-of-b\.png must be the {title} of frame b, got no such file \(1 missing in all\); get the set"
    with pytest.raises(FileNotFoundError, match=sentence):
        matched(views, expected)
    with pytest.raises(FileNotFoundError, match=r"of frame a, got no such file \(2 missing in all\)"):
        matched(VIEWS | {kind: {}}, expected)
