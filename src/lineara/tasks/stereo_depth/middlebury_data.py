"""Middlebury 2014 and ETH3D: rooms and buildings, measured; large and few, so they serve to test more than to train."""

from abc import abstractmethod
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from lineara.tasks.image_files import DAMAGE, BrokenImageError
from lineara.tasks.stereo_depth.calibration import Unit
from lineara.tasks.stereo_depth.data import CROPPED, StereoData
from lineara.tasks.stereo_depth.frames import FileFrames, FrameFiles, read_float_truth
from lineara.tasks.stereo_depth.transforms import Augmentation

_VISIBLE = 255  # in masks: 128 is hidden in the right view, 0 has no truth


class _SceneData(StereoData):
    """Sets of one folder per scene: every `val_every`-th scene validates and tests, the others are trained on."""

    def __init__(
        self,
        data_root: str,
        pixels: Literal["all", "visible"],
        val_every: int,
        predict_left: str | None,
        predict_right: str | None,
        predict_calibration: str | None,
        predict_unit: Unit | None,
        augmentation: Augmentation,
        batch_size: int,
        num_workers: int,
        shuffle_seed: int,
    ) -> None:
        super().__init__(
            data_root=data_root,
            predict_left=predict_left,
            predict_right=predict_right,
            predict_calibration=predict_calibration,
            predict_unit=predict_unit,
            augmentation=augmentation,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle_seed=shuffle_seed,
        )
        if pixels not in ("all", "visible"):
            raise ValueError(f"pixels must be all or visible, got {pixels}")
        if val_every < 1:
            raise ValueError(f"val_every must be at least 1, got {val_every}")
        self.pixels = pixels
        self.val_every = val_every
        self._scenes: list[FrameFiles] | None = None

    @abstractmethod
    def list_scenes(self) -> list[FrameFiles]:
        """All scenes that have a truth, sorted."""

    def read(self, split: str) -> FileFrames:
        """List the frames of a split.

        Raises:
            FileNotFoundError: the set, or a file of a scene, is missing.
        """
        if self._scenes is None:
            self._scenes = self.list_scenes()
        validates = [number % self.val_every == 0 for number in range(len(self._scenes))]
        chosen = [files for files, held_out in zip(self._scenes, validates) if held_out != (split == "train")]
        return FileFrames(
            chosen, read_truth=read_float_truth, read_mask=_read_mask if self.pixels == "visible" else None
        )

    def scenes_of(self, folder: Path, layout: str) -> list[Path]:
        """The folders that hold a left view."""
        scenes = sorted(path.parent for path in folder.glob("[!.]*/im0.png")) if folder.is_dir() else []
        if not scenes:
            raise FileNotFoundError(
                f"{folder} must hold a folder per scene with its im0.png, got none; {layout}, or set --data.data_root"
            )
        return scenes


class MiddleburyData(_SceneData):
    """Middlebury's scenes of 2014, or those of its third evaluation (trainingF, trainingH or trainingQ):

        <data_root>/
          Adirondack-perfect/
            im0.png, im1.png         the views
            disp0.pfm                truth of the left view; disp0GT.pfm in the evaluation
            disp1.pfm                of the right view, which `swap_views` needs; disp1GT.pfm
            mask0nocc.png            which pixels the right view sees; in the evaluation
          ...

    Args:
        data_root: folder of the scenes.
        pixels: score and train on "all" pixels with a truth, or on those that are "visible" in both views.
        val_every: every so manieth scene validates and tests; 1 takes all, and leaves none to train on.
        predict_left, predict_right, predict_calibration, predict_unit: as for `StereoData`; each scene has a calib.txt.
        augmentation: of training.
        batch_size: frames per batch of training and process.
        num_workers: processes that read frames.
        shuffle_seed: seed of the order of training frames and of their augmentation.

    Source: Scharstein et al., 2014, "High-Resolution Stereo Datasets with Subpixel-Accurate Ground Truth".
    """

    def __init__(
        self,
        data_root: str = "data/middlebury2014",
        pixels: Literal["all", "visible"] = "all",
        val_every: int = 5,
        predict_left: str | None = None,
        predict_right: str | None = None,
        predict_calibration: str | None = None,
        predict_unit: Unit | None = None,
        augmentation: Augmentation = CROPPED,
        batch_size: int = 4,
        num_workers: int = 4,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(
            data_root,
            pixels,
            val_every,
            predict_left,
            predict_right,
            predict_calibration,
            predict_unit,
            augmentation,
            batch_size,
            num_workers,
            shuffle_seed,
        )

    def list_scenes(self) -> list[FrameFiles]:
        folders = self.scenes_of(Path(self.data_root), "unpack the scenes there")
        return [_scene_files(folder, folder, self.pixels) for folder in folders]


class ETH3DData(_SceneData):
    """ETH3D's grey two-view frames of low resolution, unpacked so:

        <data_root>/
          two_view_training/<scene>/im0.png, im1.png
          two_view_training_gt/<scene>/disp0GT.pfm, mask0nocc.png

    Args:
        data_root: folder of the set.
        pixels: score and train on "all" pixels with a truth, or on those that are "visible" in both views.
        val_every: every so manieth scene validates and tests; 1 takes all, and leaves none to train on.
        predict_left, predict_right, predict_calibration, predict_unit: as for `StereoData`.
        augmentation: of training.
        batch_size: frames per batch of training and process.
        num_workers: processes that read frames.
        shuffle_seed: seed of the order of training frames and of their augmentation.

    Source: Schoeps et al., 2017, "A Multi-View Stereo Benchmark with High-Resolution Images and Multi-Camera Videos".
    """

    def __init__(
        self,
        data_root: str = "data/eth3d",
        pixels: Literal["all", "visible"] = "visible",
        val_every: int = 5,
        predict_left: str | None = None,
        predict_right: str | None = None,
        predict_calibration: str | None = None,
        predict_unit: Unit | None = None,
        augmentation: Augmentation = CROPPED,
        batch_size: int = 4,
        num_workers: int = 4,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(
            data_root,
            pixels,
            val_every,
            predict_left,
            predict_right,
            predict_calibration,
            predict_unit,
            augmentation,
            batch_size,
            num_workers,
            shuffle_seed,
        )

    def list_scenes(self) -> list[FrameFiles]:
        root = Path(self.data_root)
        folders = self.scenes_of(root / "two_view_training", "unpack two_view_training and two_view_training_gt")
        return [_scene_files(folder, root / "two_view_training_gt" / folder.name, self.pixels) for folder in folders]


def _scene_files(views: Path, truths: Path, pixels: str) -> FrameFiles:
    """The files of a scene, by the names of either edition."""
    disparity, right_disparity = (
        next((path for path in (truths / f"disp{view}.pfm", truths / f"disp{view}GT.pfm") if path.is_file()), None)
        for view in (0, 1)
    )
    needed = {
        "right view": (views / "im1.png", "im1.png"),
        "disparity": (disparity, "disp0.pfm or disp0GT.pfm"),
        "mask of visible pixels": (truths / "mask0nocc.png", "mask0nocc.png"),
    }
    if pixels == "all":
        del needed["mask of visible pixels"]
    for title, (path, names) in needed.items():
        if path is None or not path.is_file():
            folder = views if title == "right view" else truths
            remedy = "; or set --data.pixels all" if title.startswith("mask") else "; get the scene again or remove it"
            raise FileNotFoundError(f"{folder} must hold the {title}, {names}, got no such file{remedy}")
    return FrameFiles(
        name=views.name,
        left=str(views / "im0.png"),
        right=str(views / "im1.png"),
        disparity=str(disparity),
        right_disparity=None if right_disparity is None else str(right_disparity),
        mask=str(truths / "mask0nocc.png") if pixels == "visible" else None,
    )


def _read_mask(path: str) -> npt.NDArray[np.bool_]:
    """Which pixels (height, width) are visible in both views."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "1", "P"):
                raise BrokenImageError(f"{path} must be a grey image of 8 bits, got mode {image.mode}")
            return np.array(image.convert("L")) == _VISIBLE
    except BrokenImageError:
        raise
    except DAMAGE as error:
        raise BrokenImageError(
            f"{path} must be an image that can be read, got {' '.join(str(error).split())}"
        ) from error
