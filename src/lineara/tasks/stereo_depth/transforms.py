"""What is changed at random in a frame of training, and colours as networks take them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchvision.transforms import v2

from lineara.tasks.stereo_depth.frames import Frame

# Of ImageNet's colours from 0 to 1.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a frame of training. By default it is only cropped, as PSMNet's were.

    Args:
        crop_height, crop_width: size of the part that is taken, in pixels, at the same place of both views.
        vertical_flip: probability that the frame is turned upside down.
        swap_views: probability that it is mirrored, which makes the left view of the right one; the set must have
            truths of the right view.
        brightness, contrast, saturation: each is changed by a factor between 1 - value and 1 + value.
        hue: is shifted by up to this share of the circle of colours, at most 0.5.
        separate_colours: probability that the two views' colours are changed each on its own.
    """

    crop_height: int = 256
    crop_width: int = 512
    vertical_flip: float = 0.0
    swap_views: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    separate_colours: float = 0.0

    def __post_init__(self) -> None:
        if min(self.crop_height, self.crop_width) < 1:
            raise ValueError(
                f"crop_height and crop_width must be at least 1, got {self.crop_height} and {self.crop_width}"
            )
        for name in ("vertical_flip", "swap_views", "separate_colours"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a probability from 0 to 1, got {getattr(self, name)}")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be a share from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be a share from 0 to 0.5, got {self.hue}")

    def __call__(self, frame: Frame) -> Frame:
        """A new frame, by random numbers of torch.

        Raises:
            ValueError: the frame is smaller than the crop.
        """
        frame = self._crop(frame)
        if self.swap_views and torch.rand(()) < self.swap_views:
            frame = mirrored(frame)
        if self.vertical_flip and torch.rand(()) < self.vertical_flip:
            frame = _each(frame, lambda part: part.flip(-2))
        return self._colours(frame)

    def _crop(self, frame: Frame) -> Frame:
        height, width = frame.disparity.shape
        if height < self.crop_height or width < self.crop_width:
            raise ValueError(
                f"must be at least as large as the crop of {self.crop_height} x {self.crop_width} pixels, got "
                f"{height} x {width}; set a smaller crop_height or crop_width"
            )
        top = int(torch.randint(height - self.crop_height + 1, ()))
        left = int(torch.randint(width - self.crop_width + 1, ()))
        rows, columns = slice(top, top + self.crop_height), slice(left, left + self.crop_width)
        return _each(frame, lambda part: part[..., rows, columns])

    def _colours(self, frame: Frame) -> Frame:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            return frame
        jitter = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        if self.separate_colours and torch.rand(()) < self.separate_colours:
            left, right = jitter(frame.left), jitter(frame.right)
        else:
            left, right = jitter(torch.stack([frame.left, frame.right]))
        return replace(frame, left=left, right=right)


def mirrored(frame: Frame) -> Frame:
    """The frame in a mirror, where left is right: the views change places, each flipped."""
    assert frame.right_disparity is not None, "the right view's truth was not read"
    assert frame.right_valid is not None
    return _each(
        Frame(
            left=frame.right,
            right=frame.left,
            disparity=frame.right_disparity,
            valid=frame.right_valid,
            right_disparity=frame.disparity,
            right_valid=frame.valid,
        ),
        lambda part: part.flip(-1),
    )


def normalised(colours: Tensor) -> Tensor:
    """Colours (..., 3, height, width) uint8 as networks take them: float32, by ImageNet's mean and deviation."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (_MEAN, _STD))
    return (colours.float() / 255 - mean) / std


def colours(views: Tensor) -> Tensor:
    """From `normalised` (..., 3, height, width) back to colours from 0 to 1."""
    mean, std = (torch.tensor(numbers, device=views.device)[:, None, None] for numbers in (_MEAN, _STD))
    return (views * std + mean).clamp(0, 1)


def _each(frame: Frame, change: Callable[[Tensor], Tensor]) -> Frame:
    parts = {name: value for name, value in vars(frame).items() if value is not None}
    return Frame(**{name: change(value).contiguous() for name, value in parts.items()})
