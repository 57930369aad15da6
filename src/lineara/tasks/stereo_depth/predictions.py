"""What a stereo network says of pairs of images without a truth, in the run's folder:

predictions/<name>.pfm          the disparity of the left view, in pixels
predictions/<name>.png          the same in colours
predictions/<name>_depth.pfm    the depth in metres, where the calibration is known
"""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from lineara.runs.files import save_figure
from lineara.tasks.stereo_depth.pfm import write_pfm
from lineara.viz import disparity_picture


@dataclass(frozen=True)
class Calibration:
    """What turns disparities into depths.

    Args:
        focal_length: in pixels, above 0.
        baseline: distance of the two cameras in metres, above 0.
        doffs: column of the right camera's principal point minus that of the left one, in pixels.

    Raises:
        ValueError: for other numbers.
    """

    focal_length: float
    baseline: float
    doffs: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("focal_length", self.focal_length), ("baseline", self.baseline)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}; mend the calibration")
        if not isfinite(self.doffs):
            raise ValueError(f"doffs must be a finite number of pixels, got {self.doffs}; mend the calibration")


def depth(disparity: Tensor, calibration: Calibration) -> Tensor:
    """Depths in metres: focal length x baseline / (disparity + doffs); infinite where that sum is not above 0.

    Args:
        disparity: of any shape, in pixels.
        calibration: of the cameras.

    Returns:
        float32, of the shape of disparity.
    """
    shift = disparity.double() + calibration.doffs
    metres = calibration.focal_length * calibration.baseline / shift
    return torch.where(shift <= 0, torch.inf, metres).float()


class PredictionFolder:
    """Where the disparities of pairs are written.

    Args:
        folder: made when it is missing.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._taken: set[str] = set()

    def add(self, disparity: Tensor, *, name: str, calibration: Calibration | None = None) -> Path:
        """Write one map, its picture and, where the calibration is known, the depth.

        Args:
            disparity: (height, width), in pixels.
            name: of the pair, with or without folders; it gets a number if it has been taken.
            calibration: of the cameras.

        Returns:
            The path of the disparities.
        """
        stem = self._free_name(_joined(name))
        path = self.folder / f"{stem}.pfm"
        map_ = disparity.detach().float().cpu()
        write_pfm(path, map_.numpy())
        save_figure(disparity_picture(map_), self.folder / f"{stem}.png")
        depth_path = self.folder / f"{stem}_depth.pfm"
        if calibration is not None:
            write_pfm(depth_path, depth(map_, calibration).numpy())
        else:
            depth_path.unlink(missing_ok=True)  # of an earlier run: it would not belong to these disparities
        return path

    def check_not_empty(self) -> None:
        """Raise unless a map has been added."""
        if not self._taken:
            raise ValueError("predict must be given a pair that can be read, got none; see the warnings above")

    def _free_name(self, stem: str) -> str:
        """One whose files no pair before has, in any mixture of capitals: some file systems do not tell them apart."""
        name, number = stem, 1
        while self._taken & (files := {f"{name}{end}".casefold() for end in ("", "_depth")}):
            number += 1
            name = f"{stem}-{number}"
        self._taken |= files
        return name


def _joined(name: str) -> str:
    """The name of files for a pair: its folders joined by underscores, so that frames of two folders differ."""
    return "_".join(part for part in Path(name).parts if part not in ("/", ".", "..")) or "pair"
