"""KITTI 2012 and 2015: streets, with truths of a laser scanner for a part of the pixels."""

from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from lineara.tasks.image_files import DAMAGE, BrokenImageError
from lineara.tasks.stereo_depth.calibration import Unit
from lineara.tasks.stereo_depth.data import CROPPED, StereoData
from lineara.tasks.stereo_depth.frames import FileFrames, Truth, matched
from lineara.tasks.stereo_depth.transforms import Augmentation

# The file's values are 256 times the disparity, and 0 where there is none.
_PER_PIXEL = 256
# Of each year, folders of the left and the right view, and of truths of all pixels and of those that are not hidden.
_FOLDERS = {
    2012: {"left": "colored_0", "right": "colored_1", "all": "disp_occ", "visible": "disp_noc"},
    2015: {"left": "image_2", "right": "image_3", "all": "disp_occ_0", "visible": "disp_noc_0"},
}
_RIGHT_TRUTHS = {"all": "disp_occ_1", "visible": "disp_noc_1"}  # of 2015


class KittiData(StereoData):
    """KITTI's training frames as they are published, unpacked so:

        <data_root>/training/
          image_2/000000_10.png, ...       the left view; of 2012, colored_0
          image_3/000000_10.png, ...       the right view; of 2012, colored_1
          disp_occ_0/000000_10.png, ...    truths; of 2012, disp_occ
          disp_noc_0/000000_10.png, ...    the same without what the right view does not see; of 2012, disp_noc

    The first `num_train` frames in the order of their numbers are trained on, the others validate and test: KITTI keeps
    the truths of its own test frames to itself. Those are predicted by predict_left=<data_root>/testing/image_2 and
    predict_right=<data_root>/testing/image_3.

    Args:
        data_root: folder of the set; None is data/kitti2015 or data/kitti2012.
        year: 2012 or 2015.
        pixels: truths of "all" pixels, or of those that are "visible" in both views.
        num_train: frames to train on, of 194 in 2012 and of 200 in 2015.
        predict_left, predict_right, predict_calibration, predict_unit: as for `StereoData`.
        augmentation: of training.
        batch_size: frames per batch of training and process.
        num_workers: processes that read frames.
        shuffle_seed: seed of the order of training frames and of their augmentation.

    Source: Geiger et al., 2012, "Are we ready for Autonomous Driving?"; Menze and Geiger, 2015, "Object Scene Flow for
    Autonomous Vehicles". PSMNet trains on 160 frames too, but on those that its file system lists first.
    """

    def __init__(
        self,
        data_root: str | None = None,
        year: Literal[2012, 2015] = 2015,
        pixels: Literal["all", "visible"] = "all",
        num_train: int = 160,
        predict_left: str | None = None,
        predict_right: str | None = None,
        predict_calibration: str | None = None,
        predict_unit: Unit | None = None,
        augmentation: Augmentation = CROPPED,
        batch_size: int = 12,
        num_workers: int = 4,
        shuffle_seed: int = 0,
    ) -> None:
        super().__init__(
            data_root=data_root or f"data/kitti{year}",
            predict_left=predict_left,
            predict_right=predict_right,
            predict_calibration=predict_calibration,
            predict_unit=predict_unit,
            augmentation=augmentation,
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle_seed=shuffle_seed,
        )
        if year not in _FOLDERS:
            raise ValueError(f"year must be 2012 or 2015, got {year}")
        if pixels not in _RIGHT_TRUTHS:
            raise ValueError(f"pixels must be all or visible, got {pixels}")
        if num_train < 1:
            raise ValueError(f"num_train must be at least 1, got {num_train}")
        self.year = year
        self.pixels = pixels
        self.num_train = num_train
        self._all: FileFrames | None = None

    def read(self, split: str) -> FileFrames:
        """List the frames of a split.

        Raises:
            FileNotFoundError: a folder is missing, or a file that belongs to another one.
            ValueError: no frame is left to validate on.
        """
        if self._all is None:
            self._all = self._list()
        files = self._all.files
        if len(files) <= self.num_train:
            raise ValueError(
                f"num_train must leave one of the {len(files)} frames of {self.data_root} to validate on, got "
                f"{self.num_train}; set --data.num_train"
            )
        chosen = files[: self.num_train] if split == "train" else files[self.num_train :]
        return FileFrames(chosen, read_truth=read_kitti_truth)

    def _list(self) -> FileFrames:
        names = _FOLDERS[self.year]
        training = Path(self.data_root) / "training"
        folders = {kind: training / names[name] for kind, name in (("left", "left"), ("right", "right"))}
        folders["disparity"] = training / names[self.pixels]
        for folder in folders.values():
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} must be a folder of KITTI {self.year}, got no such folder; unpack the set so, or set "
                    "--data.data_root or --data.year"
                )
        if self.year == 2015:
            folders["right_disparity"] = training / _RIGHT_TRUTHS[self.pixels]
        # The frames that have a truth end in _10; the others follow them in time.
        found = {
            kind: {path.stem: str(path) for path in folder.glob("*_10.png") if not path.name.startswith(".")}
            for kind, folder in folders.items()
        }
        optional = ["right_disparity"] if "right_disparity" in found else []
        files = matched(found, lambda kind, name: folders[kind] / f"{name}.png", optional=optional)
        return FileFrames(files, read_truth=read_kitti_truth)


def read_kitti_truth(path: str) -> Truth:
    """Disparities (height, width) of a PNG of 16 bits, NaN where there are none.

    Raises:
        ValueError: the file cannot be read, or is no grey image of 16 bits.
    """
    try:
        with Image.open(path) as image:
            # Pillow before its 11th version called 16 bits mode I.
            if image.mode not in ("I;16", "I;16B", "I"):
                raise BrokenImageError(
                    f"{path} must be a grey image of 16 bits, got mode {image.mode}; get the file again"
                )
            values = np.array(image).astype(np.float32)
    except BrokenImageError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be an image of disparities, got no such file") from None
    except DAMAGE as error:
        raise BrokenImageError(f"{path} must be an image that can be read, got {_words(error)}") from error
    return np.where(values > 0, values / _PER_PIXEL, np.nan).astype(np.float32)


def _words(error: Exception) -> str:
    return "no image that Pillow knows" if "identify" in str(error) else " ".join(str(error).split())
