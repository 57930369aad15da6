"""Frames of a stereo set: the files of each, and what they hold once they are read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lineara.tasks.image_files import read_pixels
from lineara.tasks.stereo_depth.pfm import read_pfm

Truth = npt.NDArray[np.float32]


@dataclass
class Frame:
    """Two views and the truth.

    Args:
        left, right: (3, height, width) uint8, colours.
        disparity: (height, width) float32, in pixels of the left view; a pixel at column x is at x - disparity in the
            right view.
        valid: (height, width) bool: whether there is a truth.
        right_disparity, right_valid: likewise of the right view, where a pixel at x is at x + disparity in the left
            view; None unless they were asked for.
    """

    left: Tensor
    right: Tensor
    disparity: Tensor
    valid: Tensor
    right_disparity: Tensor | None = None
    right_valid: Tensor | None = None


class Frames(Protocol):
    """What the loaders need of a split. Reading a broken frame raises ValueError or OSError, of one sentence."""

    @property
    def names(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def read(self, index: int, *, both_truths: bool = False) -> Frame: ...


@dataclass(frozen=True, slots=True)
class FrameFiles:
    """Paths of one frame's files.

    Args:
        name: of the frame in its set.
        left, right: views.
        disparity: truth of the left view.
        right_disparity: truth of the right view, if the set has it.
        mask: image that says which pixels count, if the set has it.
    """

    name: str
    left: str
    right: str
    disparity: str
    right_disparity: str | None = None
    mask: str | None = None


class FileFrames:
    """Frames that are read from their files.

    Args:
        files: of each frame.
        read_truth: gives the disparities (height, width) of a file, not finite where there are none.
        read_mask: gives which pixels (height, width) count, by a mask's path.
        negated: whether truths of the left view are counted to the other side in the files.
    """

    def __init__(
        self,
        files: Sequence[FrameFiles],
        *,
        read_truth: Callable[[str], Truth],
        read_mask: Callable[[str], npt.NDArray[np.bool_]] | None = None,
        negated: bool = False,
    ) -> None:
        self.files = list(files)
        self.names = [frame.name for frame in self.files]
        self.read_truth = read_truth
        self.read_mask = read_mask
        self.negated = negated

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int, *, both_truths: bool = False) -> Frame:
        files = self.files[index]
        left, right = read_views(files.left, files.right)
        disparity, valid = self._truth(files.disparity, left, negated=self.negated)
        if files.mask is not None and self.read_mask is not None:
            mask = torch.from_numpy(self.read_mask(files.mask))
            _check_size(files.mask, mask, left)
            valid = valid & mask
        frame = Frame(left, right, disparity, valid)
        if both_truths:
            assert files.right_disparity is not None, "the data module has refused this"
            frame.right_disparity, frame.right_valid = self._truth(files.right_disparity, left, negated=False)
        return frame

    def _truth(self, path: str, view: Tensor, *, negated: bool) -> tuple[Tensor, Tensor]:
        values = -self.read_truth(path) if negated else self.read_truth(path)
        finite = np.isfinite(values)
        # A few may lie on the other side, not most of them.
        if finite.any() and np.median(values[finite]) < 0:
            found = "positive" if negated else "negative"
            raise ValueError(
                f"{path} must hold disparities that are not mostly {found}; a set that counts the left view's to the "
                "other side, as FlyingThings3D_subset does, is read by --data.left_sign negative, others by positive"
            )
        disparity = torch.from_numpy(values)
        _check_size(path, disparity, view)
        return disparity, torch.from_numpy(finite)


def read_views(left: Path | str, right: Path | str) -> tuple[Tensor, Tensor]:
    """The colours (3, height, width) of two views, uint8.

    Raises:
        ValueError: one cannot be read, or their sizes differ.
    """
    views = read_pixels(left), read_pixels(right)
    if views[0].shape != views[1].shape:
        sizes = " and ".join(f"{view.shape[1]} x {view.shape[2]}" for view in views)
        raise ValueError(f"{left} and {right} must be of the same size, got {sizes} pixels")
    return views


def read_float_truth(path: str) -> Truth:
    """Disparities of a portable float map, which are not finite where there is no truth."""
    return read_pfm(path, channels=1)


def matched(
    views: Mapping[str, Mapping[str, str]],
    expected: Callable[[str, str], Path | str],
    *,
    optional: Iterable[str] = (),
    needed: Sequence[str] = ("left", "right", "disparity"),
) -> list[FrameFiles]:
    """The frames of files by what they are ("left", "right", "disparity", ...) and by the frames' names, sorted.

    A frame is what has a left or a right view.

    Args:
        views: of each kind, paths by names.
        expected: where the file of a kind and a name should be, for errors.
        optional: kinds that a frame may lack, and then lacks in all of them.
        needed: kinds that it may not.

    Raises:
        FileNotFoundError: a frame lacks a file.
    """
    names = sorted(views["left"].keys() | views["right"].keys())
    lacking = [(kind, name) for name in names for kind in needed if name not in views[kind]]
    if lacking:
        kind, name = lacking[0]
        raise FileNotFoundError(
            f"{expected(kind, name)} must be the {_TITLES[kind]} of frame {name}, got no such file ({len(lacking)} "
            "missing in all); get the set again, or remove the other files of such frames"
        )
    whole = [kind for kind in optional if names and all(name in views[kind] for name in names)]
    return [FrameFiles(name, **{kind: views[kind][name] for kind in (*needed, *whole)}) for name in names]


_TITLES: dict[str, Any] = {
    "left": "left view",
    "right": "right view",
    "disparity": "disparity",
    "mask": "mask",
    "right_disparity": "right view's disparity",
}


def _check_size(path: str, values: Tensor, view: Tensor) -> None:
    if values.shape != view.shape[1:]:
        sizes = " but ".join(f"{size[0]} x {size[1]}" for size in (values.shape, view.shape[1:]))
        raise ValueError(f"{path} must have the size of its image, got {sizes} pixels")
