"""Disparities without learning: semi-global matching of blocks, by OpenCV."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Pixels on a side of a block; OpenCV's own proposals for the two penalties follow from it.
_BLOCK = 5
_CHANNELS = 3
# OpenCV counts disparities in sixteenths of a pixel.
_FRACTIONS = 16


def block_matching(left: Tensor, right: Tensor, *, max_disparity: int = 64) -> Tensor:
    """Disparities of the left view, whole numbers of sixteenths of a pixel.

    Where the views do not agree, and in the first `max_disparity` columns, the method has no answer. There the smaller
    one of the next answers at the left and the right is taken, since what is hidden lies further back.

    Args:
        left, right: (3, height, width) uint8, colours.
        max_disparity: a multiple of 16, in pixels; smaller ones are looked for.

    Returns:
        (height, width) float32, in pixels.

    Raises:
        ImportError: OpenCV is not installed.
        ValueError: for another max_disparity.

    Source: Hirschmueller, 2008, "Stereo Processing by Semiglobal Matching and Mutual Information", as in OpenCV, which
        compares blocks, not mutual information.
    """
    if max_disparity < _FRACTIONS or max_disparity % _FRACTIONS:
        raise ValueError(f"max_disparity must be a multiple of 16, got {max_disparity}")
    try:
        from cv2 import STEREO_SGBM_MODE_HH, StereoSGBM
    except ImportError as error:
        raise ImportError(
            "block matching needs opencv-python-headless, which is not installed; install it with: "
            "pip install 'lineara[train,vision]'"
        ) from error
    matcher: Any = StereoSGBM.create(
        minDisparity=0,
        numDisparities=max_disparity,
        blockSize=_BLOCK,
        P1=8 * _CHANNELS * _BLOCK**2,
        P2=32 * _CHANNELS * _BLOCK**2,
        disp12MaxDiff=1,
        uniquenessRatio=5,
        speckleWindowSize=100,
        speckleRange=2,
        mode=STEREO_SGBM_MODE_HH,
    )
    blue_first = [np.ascontiguousarray(view.permute(1, 2, 0).numpy()[..., ::-1]) for view in (left, right)]
    found = matcher.compute(*blue_first).astype(np.float32) / _FRACTIONS
    return torch.from_numpy(_filled(found))


def _filled(disparity: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Answers below 0, which are none, replaced by the smaller one of their row's next ones; 0 in a row without."""
    none = disparity < 0
    columns = np.arange(disparity.shape[1])
    before = np.maximum.accumulate(np.where(none, -1, columns), axis=1)
    after = np.minimum.accumulate(np.where(none, len(columns), columns)[:, ::-1], axis=1)[:, ::-1]
    rows = np.arange(len(disparity))[:, None]
    at_left = np.where(before < 0, np.inf, disparity[rows, np.maximum(before, 0)])
    at_right = np.where(after == len(columns), np.inf, disparity[rows, np.minimum(after, len(columns) - 1)])
    nearest = np.minimum(at_left, at_right)
    nearest[~np.isfinite(nearest)] = 0
    return np.where(none, nearest, disparity).astype(np.float32)
