"""What a stereo network says of pairs of images without a truth, in the run's folder:

predictions/<name>.pfm          the disparity of the left view, in pixels
predictions/<name>.png          the same in colours
predictions/kitti/<name>.png    where asked for, 256 x disparity in 16 bits, as KITTI's server wants it

and where the calibration is known

predictions/<name>_depth.pfm    the depth in metres
predictions/<name>_depth.png    the same in millimetres, 16 bits; 0 where it is not known, or beyond 65.535 m
predictions/<name>.ply          the points in metres, x to the right, y down, z ahead, in the colours of the left view
"""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lineara.runs.files import atomic_write, save_figure
from lineara.tasks.stereo_depth.calibration import Calibration, depth, points
from lineara.tasks.stereo_depth.pfm import write_pfm
from lineara.viz import disparity_picture


class PredictionFolder:
    """Where the disparities of pairs are written.

    Args:
        folder: made when it is missing.
        kitti: whether to write what KITTI's server wants, too.
    """

    def __init__(self, folder: Path | str, *, kitti: bool = False) -> None:
        self.folder = Path(folder)
        self.kitti = kitti
        self._taken: set[str] = set()

    def add(
        self, disparity: Tensor, *, name: str, left: Tensor | None = None, calibration: Calibration | None = None
    ) -> Path:
        """Write one map, its picture and, where the calibration is known, depths and points.

        Args:
            disparity: (height, width), in pixels.
            name: of the pair, with or without folders; it gets a number if it has been taken.
            left: (3, height, width), the colours of the left view in 0..1; None leaves points grey.
            calibration: of the cameras.

        Returns:
            The path of the disparities.
        """
        stem = self._free_name(_joined(name))
        path = self.folder / f"{stem}.pfm"
        map_ = disparity.detach().float().cpu()
        write_pfm(path, map_.numpy())
        save_figure(disparity_picture(map_), self.folder / f"{stem}.png")
        if self.kitti:
            _write_16_bits(self.folder / "kitti" / f"{stem}.png", map_ * 256)
        depth_paths = [self.folder / f"{stem}{end}" for end in ("_depth.pfm", "_depth.png", ".ply")]
        if calibration is None:
            for old in depth_paths:  # of an earlier run: they would not belong to these disparities
                old.unlink(missing_ok=True)
            return path
        depths = depth(map_, calibration)
        write_pfm(depth_paths[0], depths.numpy())
        _write_16_bits(depth_paths[1], depths * 1000)
        _write_points(depth_paths[2], points(depths, calibration), left)
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


def _write_16_bits(path: Path, numbers: Tensor) -> None:
    """A grey image of whole numbers of 16 bits; 0 for what is not finite or does not fit."""
    fits = numbers.isfinite() & (numbers > 0) & (numbers < 65535.5)
    pixels = torch.where(fits, numbers, 0.0).round().numpy().astype(np.uint16)
    with atomic_write(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def _write_points(path: Path, where: Tensor, colours: Tensor | None) -> None:
    """A binary PLY of the points (height, width, 3) that are finite."""
    kept = where.isfinite().all(dim=2)
    shade = torch.full((3, *kept.shape), 0.5) if colours is None else colours.detach().float().cpu()
    rows = np.empty(int(kept.sum()), dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3)])
    rows["xyz"] = where[kept].numpy()
    rows["rgb"] = (255 * shade.clamp(0, 1)).round().permute(1, 2, 0)[kept].numpy()
    header = io.StringIO()
    print("ply\nformat binary_little_endian 1.0", f"element vertex {len(rows)}", sep="\n", file=header)
    print(*(f"property float {axis}" for axis in "xyz"), sep="\n", file=header)
    print(*(f"property uchar {colour}" for colour in ("red", "green", "blue")), "end_header", sep="\n", file=header)
    with atomic_write(path) as temporary:
        temporary.write_bytes(header.getvalue().encode("ascii") + rows.tobytes())
