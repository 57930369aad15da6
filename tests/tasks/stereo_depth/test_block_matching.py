"""Block matching finds known shifts, and fills what it cannot know."""

import sys

import numpy as np
import pytest
import torch

from lineara.tasks.stereo_depth.block_matching import _filled, block_matching


def views(shifts, height=120, width=220):
    """Bands of rows of a texture, each shifted by its own number of columns."""
    pytest.importorskip("cv2")
    texture = np.random.default_rng(0).integers(0, 256, (3, height, width + 80)).astype(np.uint8)
    left, right = texture[..., :width].copy(), texture[..., :width].copy()
    band = height // len(shifts)
    for number, shift in enumerate(shifts):
        rows = slice(number * band, (number + 1) * band)
        right[:, rows] = texture[:, rows, shift : shift + width]
    return torch.from_numpy(left), torch.from_numpy(right)


def test_shifts_are_found():
    found = block_matching(*views([7, 30]), max_disparity=48)
    assert found.shape == (120, 220)
    assert found.dtype == torch.float32
    assert (found[8:52] - 7).abs().mean() < 0.1
    assert (found[68:112] - 30).abs().mean() < 0.1  # the first columns too, which are filled
    assert torch.isfinite(found).all()
    assert found.min() >= 0


def test_the_views_are_not_interchangeable():
    left, right = views([20])
    assert (block_matching(right, left) - 20).abs().mean() > 5


def test_gaps_take_the_smaller_one_of_their_neighbours():
    gap = -1 / 16
    rows = np.array([[gap, gap, 5, gap, 3, gap], [2, gap, gap, 7, gap, 9], [gap] * 6], np.float32)
    assert _filled(rows).tolist() == [[5, 5, 5, 3, 3, 3], [2, 2, 2, 7, 7, 9], [0] * 6]


@pytest.mark.parametrize("wrong", [0, 15, 40, -16])
def test_the_range_must_be_a_multiple_of_16(wrong):
    view = torch.zeros(3, 5, 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"^max_disparity must be a multiple of 16, got {wrong}$"):
        block_matching(view, view, max_disparity=wrong)


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    view = torch.zeros(3, 5, 7, dtype=torch.uint8)
    with pytest.raises(ImportError, match=r"needs opencv-python-headless, .*: pip install 'lineara\[train,vision\]'$"):
        block_matching(view, view)
