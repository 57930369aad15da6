"""Scene Flow: rendered frames of flying things, of the film Monkaa and of a drive."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from lineara.tasks.stereo_depth.calibration import Unit
from lineara.tasks.stereo_depth.data import CROPPED, StereoData
from lineara.tasks.stereo_depth.frames import FileFrames, FrameFiles, matched, read_float_truth
from lineara.tasks.stereo_depth.transforms import Augmentation

_FLYING_THINGS = "FlyingThings3D"
_SETS = (_FLYING_THINGS, "Monkaa", "Driving")
_PASSES = {"clean": "frames_cleanpass", "final": "frames_finalpass"}
_IMAGES = (".webp", ".png")  # the latter where there are both
_VIEWS = ("left", "right")


class SceneFlowData(StereoData):
    """Scene Flow as it is published, unpacked so:

        <data_root>/
          FlyingThings3D/
            frames_cleanpass/TRAIN/A/0000/left/0006.png, ...    and right/; or frames_finalpass/, frames_cleanpass_webp/
            frames_cleanpass/TEST/...
            disparity/TRAIN/A/0000/left/0006.pfm, ...           and right/, which `swap_views` needs
          Monkaa/
            frames_cleanpass/<scene>/left/0048.png, ...
            disparity/<scene>/left/0048.pfm, ...
          Driving/
            frames_cleanpass/15mm_focallength/scene_backwards/fast/left/0001.png, ...
            disparity/15mm_focallength/scene_backwards/fast/left/0001.pfm, ...

    Training takes FlyingThings3D's TRAIN, Monkaa and Driving, testing all of FlyingThings3D's TEST: no frame of TEST is
    trained on. Papers watch their training on TEST itself; validation takes every `val_every`-th frame of it, to save
    time. A checkpoint that is chosen by them is chosen on frames of the test. Who wants none of that takes
    `val_part="TRAIN"`: then every `val_every`-th scene of FlyingThings3D's TRAIN validates, and is not trained on.

    Args:
        data_root: folder of the set.
        sets: which of the three are trained on, FlyingThings3D among them.
        image_pass: "clean", or "final", which has blur and haze.
        val_part: of FlyingThings3D, for validation: "TEST" or "TRAIN".
        val_every: validation takes every so manieth frame of TEST, or scene of TRAIN.
        left_sign: "negative" where the files count the left view's disparities to the other side, as
            FlyingThings3D_subset's do. Files that contradict it are refused.
        predict_left, predict_right, predict_calibration, predict_unit: as for `StereoData`.
        augmentation: of training.
        batch_size: frames per batch of training and process.
        num_workers: processes that read frames.
        shuffle_seed: seed of the order of training frames and of their augmentation.

    Source: Mayer et al., 2016, "A Large Dataset to Train Convolutional Networks for Disparity, Optical Flow, and Scene
    Flow Estimation", arXiv 1512.02134.
    """

    def __init__(
        self,
        data_root: str = "data/scene_flow",
        sets: Sequence[str] = _SETS,
        image_pass: Literal["clean", "final"] = "clean",
        val_part: Literal["TEST", "TRAIN"] = "TEST",
        val_every: int = 20,
        left_sign: Literal["positive", "negative"] = "positive",
        predict_left: str | None = None,
        predict_right: str | None = None,
        predict_calibration: str | None = None,
        predict_unit: Unit | None = None,
        augmentation: Augmentation = CROPPED,
        batch_size: int = 12,
        num_workers: int = 8,
        shuffle_seed: int = 0,
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
        _check_names(sets, image_pass, val_part, left_sign)
        least = 2 if val_part == "TRAIN" else 1
        if val_every < least:
            raise ValueError(f"val_every must be at least {least} for val_part={val_part!r}, got {val_every}")
        self.sets = [name for name in _SETS if name in sets]
        self.image_pass = image_pass
        self.val_part = val_part
        self.val_every = val_every
        self.left_sign = left_sign
        self._flying: dict[str, list[FrameFiles]] = {}

    def read(self, split: str) -> FileFrames:
        """List the frames of a split.

        Raises:
            FileNotFoundError: a folder is missing, or a file that belongs to another one.
        """
        if split == "test":
            files = self._flying_things("TEST")
        elif split == "val":
            files = self._validation()
        else:
            held_out = {files.name for files in self._validation()} if self.val_part == "TRAIN" else set[str]()
            files = [files for files in self._flying_things("TRAIN") if files.name not in held_out]
            files += [files for name in self.sets if name != _FLYING_THINGS for files in self._list(name)]
        return FileFrames(files, read_truth=read_float_truth, negated=self.left_sign == "negative")

    def _validation(self) -> list[FrameFiles]:
        files = self._flying_things(self.val_part)
        if self.val_part == "TEST":
            return files[:: self.val_every]
        scenes = sorted({_scene(frame) for frame in files})
        chosen = set(scenes[:: self.val_every])
        return [frame for frame in files if _scene(frame) in chosen]

    def _flying_things(self, part: str) -> list[FrameFiles]:
        if part not in self._flying:
            self._flying[part] = self._list(_FLYING_THINGS, part)
        return self._flying[part]

    def _list(self, name: str, part: str = "") -> list[FrameFiles]:
        """The frames of one of the three sets; names begin with it."""
        root = Path(self.data_root) / name
        passes = (_PASSES[self.image_pass], f"{_PASSES[self.image_pass]}_webp")
        frames = next((root / folder for folder in passes if (root / folder).is_dir()), root / passes[0])
        images, truths = frames / part, root / "disparity" / part
        subset = Path(self.data_root) / f"{_FLYING_THINGS}_subset"
        if name == _FLYING_THINGS and not root.is_dir() and subset.is_dir():
            raise FileNotFoundError(
                f"{root} must be the whole set with frames_cleanpass and disparity, got {subset}, which has another "
                "layout and negative disparities; link its files in this layout and set --data.left_sign negative"
            )
        for folder, title in ((images, "frames"), (truths, "disparities")):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder} must be the folder of {name}'s {title}, got no such folder; unpack the set so, or set "
                    "--data.data_root, --data.image_pass or --data.sets"
                )
        found: dict[str, dict[str, str]] = dict(zip(_VIEWS, _by_view(images, _IMAGES)))
        found |= dict(zip(("disparity", "right_disparity"), _by_view(truths, (".pfm",))))

        def expected(kind: str, frame: str) -> Path:
            folder, view, suffix = (images, kind, ".png") if kind in _VIEWS else (truths, "left", ".pfm")
            return folder / Path(frame).parent / view / f"{Path(frame).name}{suffix}"

        files = matched(found, expected, optional=["right_disparity"])
        if not files:
            raise FileNotFoundError(
                f"{images} must hold images in folders left and right, got none; unpack the set again"
            )
        return [_renamed(frame, "/".join(filter(None, (name, part, frame.name)))) for frame in files]


def _by_view(tree: Path, suffixes: Sequence[str]) -> list[dict[str, str]]:
    """Of the folders "left" and of the folders "right", paths by names such as A/0000/0006."""
    found: dict[str, dict[str, str]] = {view: {} for view in _VIEWS}
    for folder, stem, suffix, path in _files(tree):
        if folder.name not in found or suffix not in suffixes:
            continue
        view, name = found[folder.name], (folder.parent.relative_to(tree) / stem).as_posix()
        if name not in view or suffix == suffixes[-1]:
            view[name] = path
    return [found[view] for view in _VIEWS]


def _files(tree: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Folder, stem, suffix and path of each file, without the hidden ones that other programs leave."""
    for folder, _, files in os.walk(tree, followlinks=True):
        place = Path(folder)
        for file in files:
            if not file.startswith("."):
                stem, _, suffix = file.rpartition(".")
                yield place, stem, f".{suffix.lower()}", f"{folder}/{file}"


def _scene(files: FrameFiles) -> str:
    return files.name.rsplit("/", 1)[0]


def _renamed(files: FrameFiles, name: str) -> FrameFiles:
    return FrameFiles(name, files.left, files.right, files.disparity, files.right_disparity, files.mask)


def _check_names(sets: Sequence[str], image_pass: str, val_part: str, left_sign: str) -> None:
    unknown = [name for name in sets if name not in _SETS]
    if unknown or _FLYING_THINGS not in sets:
        raise ValueError(
            f"sets must be {_FLYING_THINGS}, whose TEST is tested on, and any of {', '.join(_SETS[1:])}, got "
            f"{', '.join(sets) or 'none'}"
        )
    for name, value, known in (
        ("image_pass", image_pass, tuple(_PASSES)),
        ("val_part", val_part, ("TEST", "TRAIN")),
        ("left_sign", left_sign, ("positive", "negative")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be {known[0]} or {known[1]}, got {value}")
