"""The calibration of two rectified cameras: read from a file, and what it makes of disparities.

Read are calib.txt of Middlebury and of KITTI, and what OpenCV's FileStorage writes (.yml, .yaml, .xml, .json).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Unit = Literal["mm", "cm", "m"]
_METRES = {"mm": 0.001, "cm": 0.01, "m": 1.0}
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_CAMERA = re.compile(rf"\[\s*({_NUMBER})\s+\S+\s+({_NUMBER})\s*;\s*\S+\s+\S+\s+({_NUMBER})\s*;")
_OF_OPENCV = (".yml", ".yaml", ".xml", ".json")


@dataclass(frozen=True)
class Calibration:
    """What turns disparities into depths.

    Args:
        focal_length: in pixels, above 0.
        baseline: distance of the two cameras in metres, above 0.
        doffs: column of the right camera's principal point minus that of the left one, in pixels.
        center_x, center_y: principal point of the left camera in pixels; None takes the middle of the image.
        width, height: of the images that were calibrated, in pixels; None where it is not known.

    Raises:
        ValueError: for other numbers.
    """

    focal_length: float
    baseline: float
    doffs: float = 0.0
    center_x: float | None = None
    center_y: float | None = None
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("focal_length", self.focal_length), ("baseline", self.baseline)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0, got {value}; mend the calibration")
        if not isfinite(self.doffs):
            raise ValueError(f"doffs must be a finite number of pixels, got {self.doffs}; mend the calibration")

    def check_size(self, name: str, height: int, width: int) -> None:
        """Raise where a pair has another size than the images that were calibrated."""
        if (self.height or height, self.width or width) != (height, width):
            raise ValueError(
                f"the calibration must be of images of {width} x {height} pixels (width x height), as {name} has, got "
                f"one of {self.width} x {self.height}; give images of the calibrated size, or a calibration of theirs"
            )


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


def points(depths: Tensor, calibration: Calibration) -> Tensor:
    """Where each pixel lies in front of the left camera: x to the right, y down, z ahead, in metres.

    Args:
        depths: (height, width), in metres.
        calibration: of the cameras.

    Returns:
        (height, width, 3), not finite where a depth is not.
    """
    height, width = depths.shape
    center_x = (width - 1) / 2 if calibration.center_x is None else calibration.center_x
    center_y = (height - 1) / 2 if calibration.center_y is None else calibration.center_y
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    across, down = (columns - center_x) / calibration.focal_length, (rows - center_y) / calibration.focal_length
    return torch.stack([across * depths, down * depths, depths], dim=2)


def read_calibration(path: Path | str, unit: Unit | None = None) -> dict[str, float]:
    """The cameras of a calibration file, as keyword arguments of `Calibration`.

    Middlebury: lines cam0=[f 0 x; 0 f y; 0 0 1], baseline=mm, doffs=pixels, width and height. KITTI: lines P2 and P3,
    or P_rect_02 and P_rect_03, of 12 numbers, in metres (else those of 0 and 1). OpenCV: the matrices P1 and P2 of
    rectified cameras, or Q, and an image size where there is one; lengths are in the unit that its board was measured
    in.

    Args:
        path: the file.
        unit: of lengths in a file of OpenCV.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is missing or has no such number, or a file of OpenCV comes without a unit.
    """
    path = Path(path)
    if path.suffix.lower() in _OF_OPENCV:
        return _of_opencv(path, unit)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be a calibration file, got no such file; name another one") from None
    except OSError as error:
        raise type(error)(f"{path} must be a file that can be read, got {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be a text file, got one that is not: {error}") from error
    lines = [re.split(r"\s*[=:]\s*", line.strip(), maxsplit=1) for line in text.splitlines()]
    fields = {line[0]: line[1] for line in lines if len(line) == 2}
    if any(re.fullmatch(r"P\d|P_rect_\d\d", name) for name in fields):
        return _of_kitti(path, fields)
    camera = _CAMERA.match(fields.get("cam0", ""))
    if camera is None:
        raise ValueError(
            f"{path} must have a line cam0=[f 0 x; 0 f y; 0 0 1] with the focal length f in pixels, or KITTI's lines "
            f"P2 and P3, got {fields.get('cam0', 'no such line')}"
        )
    found = {
        "focal_length": _number(path, "cam0", camera[1], above_zero=True),
        "center_x": float(camera[2]),
        "center_y": float(camera[3]),
        "baseline": _number(path, "baseline", fields.get("baseline"), above_zero=True) / 1000,
        "doffs": _number(path, "doffs", fields.get("doffs", "0")),
    }
    sizes = [_number(path, name, fields[name], above_zero=True) for name in ("width", "height") if name in fields]
    return found | _sized(sizes)


def _of_kitti(path: Path, fields: Mapping[str, str]) -> dict[str, float]:
    for numbers in ((2, 3), (0, 1)):
        for kind in ("P_rect_{:02}", "P{}"):
            names = [kind.format(number) for number in numbers]
            if all(name in fields for name in names):
                left, right = (_matrix(path, name, fields[name]) for name in names)
                size = fields.get(f"S_rect_{numbers[0]:02}", "").split()
                return _of_projections(path, left, right, 1.0, [float(value) for value in size])
    raise ValueError(f"{path} must have the lines P2 and P3, or P_rect_02 and P_rect_03, got {', '.join(fields)}")


def _of_opencv(path: Path, unit: Unit | None) -> dict[str, float]:
    import cv2

    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a calibration file, got no such file; name another one")
    if unit not in _METRES:
        raise ValueError(
            f"predict_unit must be one of {', '.join(_METRES)} with a calibration of OpenCV, whose lengths are in the "
            f"unit that its board was measured in, got {unit}; set --data.predict_unit"
        )
    try:
        file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_READ)
        matrices: dict[str, Any] = {name: file.getNode(name).mat() for name in ("P1", "P2", "Q")}
        size = _size_in(file)
    except (cv2.error, SystemError) as error:
        raise ValueError(f"{path} must be a file of OpenCV's FileStorage, got one that it cannot read") from error
    metres = _METRES[unit]
    if matrices["P1"] is not None and matrices["P2"] is not None:
        return _of_projections(path, matrices["P1"], matrices["P2"], metres, size)
    across = matrices["Q"]
    if across is None or across.shape != (4, 4) or across[3, 2] == 0:
        raise ValueError(
            f"{path} must hold the matrices P1 and P2, or Q, of cv2.stereoRectify, got "
            f"{', '.join(name for name, matrix in matrices.items() if matrix is not None) or 'none of them'}"
        )
    return {
        "focal_length": float(across[2, 3]),
        "center_x": -float(across[0, 3]),
        "center_y": -float(across[1, 3]),
        "baseline": abs(1 / float(across[3, 2])) * metres,
        "doffs": float(across[3, 3] / across[3, 2]),
        **_sized(size),
    }


def _size_in(file: Any) -> list[float]:
    for name in ("image_size", "imageSize", "size"):
        node = file.getNode(name)
        if node.isSeq() and node.size() == 2:
            return [node.at(0).real(), node.at(1).real()]
    width, height = file.getNode("image_width"), file.getNode("image_height")
    return [] if width.empty() or height.empty() else [width.real(), height.real()]


def _of_projections(
    path: Path, left: npt.NDArray[np.float64], right: npt.NDArray[np.float64], metres: float, size: list[float]
) -> dict[str, float]:
    """From the matrices (3, 4) that project what the left camera sees into either rectified image."""
    if left.shape != (3, 4) or right.shape != (3, 4) or not left[0, 0] > 0:
        raise ValueError(
            f"{path} must hold projections of 3 x 4 numbers with a focal length above 0, got {left.shape} and "
            f"{right.shape}"
        )
    return {
        "focal_length": float(left[0, 0]),
        "center_x": float(left[0, 2]),
        "center_y": float(left[1, 2]),
        "baseline": float(left[0, 3] / left[0, 0] - right[0, 3] / right[0, 0]) * metres,
        "doffs": float(right[0, 2] - left[0, 2]),
        **_sized(size),
    }


def _sized(size: list[float]) -> dict[str, float]:
    return dict(zip(("width", "height"), map(int, size))) if len(size) == 2 else {}


def _matrix(path: Path, name: str, given: str) -> npt.NDArray[np.float64]:
    numbers = [_number(path, name, number) for number in given.split()]
    if len(numbers) != 12:
        raise ValueError(f"{path} must have 12 numbers for {name}, got {len(numbers)}")
    return np.array(numbers).reshape(3, 4)


def _number(path: Path, name: str, given: str | None, *, above_zero: bool = False) -> float:
    value = float(given) if given is not None and re.fullmatch(_NUMBER, given) else None
    if value is None or not isfinite(value) or (above_zero and value <= 0):
        wanted = "a number above 0" if above_zero else "a number"
        raise ValueError(f"{path} must have {wanted} for {name}, got {given if given is not None else 'no such line'}")
    return value
