"""Errors of a disparity, by one of the protocols that papers follow. Their numbers are not comparable with each other.

protocol   frames                                     truths that count       mean over
default    whole                                      0 < truth < maximum     pixels, and images
psmnet     zeros at top and right, to multiples of 16 truth < maximum         pixels of 8 images, then such groups
gwcnet     the lower right 512 x 960 pixels           0 < truth < maximum     images
raft       edges repeated, to multiples of 32         |truth| < maximum       images
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric

# What is summed of each image; see `StereoScores`.
_MEASURES = ("epe", "over_1px", "over_3px", "d1")
_GROUP = 8

Mean = Literal["pixels_and_images", "images", "groups"]


@dataclass(frozen=True)
class Protocol:
    """How one line of papers evaluates.

    Args:
        name: of the protocol.
        in_range: which truths (height, width) in pixels count, given the largest disparity of the network.
        mean: what the scores are means over: all pixels, and besides each image's mean; images; or the pixels of 8
            consecutive images and then such groups.
        crop: height and width of the lower right part that is evaluated; None takes the whole frame. Of a smaller
            frame, the whole.
        multiple: frames are padded for the network to multiples of so many pixels; 1 leaves them.
        padding: zeros at the top and the right, or the edges repeated on all sides alike.
        least_share: an image is left out where less than this share of its positive truths count.
    """

    name: str
    in_range: Callable[[Tensor, float], Tensor]
    mean: Mean
    crop: tuple[int, int] | None = None
    multiple: int = 1
    padding: Literal["zeros", "edges"] = "zeros"
    least_share: float = 0.0

    def counted(self, disparity: Tensor, valid: Tensor, *, max_disparity: float = 192) -> Tensor:
        """Which pixels count.

        Args:
            disparity: (..., height, width) float, the truth in pixels.
            valid: likewise, bool: whether there is a truth.
            max_disparity: truths of so many pixels or more do not count.

        Returns:
            (..., height, width) bool.
        """
        return valid & torch.isfinite(disparity) & self.in_range(disparity, max_disparity)

    def cut(self, frames: Tensor) -> Tensor:
        """The part (..., height, width) of frames that is evaluated; for images, truths and predictions alike."""
        if self.crop is None:
            return frames
        height, width = self.crop
        return frames[..., -height:, -width:]

    def predict(self, network: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor) -> Tensor:
        """What a network says of frames, padded as the protocol demands.

        Args:
            network: gives a disparity (B, height, width) for two views.
            left, right: (B, 3, height, width), already cut.

        Returns:
            (B, height, width), of the frames without their padding.
        """
        height, width = left.shape[-2:]
        rows, columns = -height % self.multiple, -width % self.multiple
        if self.padding == "zeros":
            top, first, mode = rows, 0, "constant"
        else:
            top, first, mode = rows // 2, columns // 2, "replicate"
        sides = (first, columns - first, top, rows - top)  # left, right, top, bottom
        disparity = network(*(pad(view, sides, mode=mode) for view in (left, right)))
        return disparity[..., top : top + height, first : first + width]


def _positive(truth: Tensor, maximum: float) -> Tensor:
    return (truth > 0) & (truth < maximum)


def _below(truth: Tensor, maximum: float) -> Tensor:
    return truth < maximum


def _small(truth: Tensor, maximum: float) -> Tensor:
    return truth.abs() < maximum


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("default", _positive, "pixels_and_images"),
        Protocol("psmnet", _below, "groups", multiple=16),
        Protocol("gwcnet", _positive, "images", crop=(512, 960), least_share=0.1),
        Protocol("raft", _small, "images", multiple=32, padding="edges"),
    )
}


def protocol_named(name: str) -> Protocol:
    """The protocol of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return PROTOCOLS[name]


class StereoScores(Metric):
    """Mean errors of predicted disparities, over the images that `update` has been given.

    epe is the mean of |prediction - truth| in pixels; over_1px and over_3px the shares of pixels where that is above 1
    and 3; d1 the share where it is above both 3 pixels and 5 % of the truth. Where the protocol prints the mean over
    pixels and the one over images, the latter have names that end in _per_image. An image without a pixel that counts
    is counted but adds to no mean.

    Of several processes each forms its own groups of 8, and what is left over in them is one group: the protocol
    "psmnet" as it is published needs one process.

    Args:
        protocol: "default", "psmnet", "gwcnet" or "raft"; see `PROTOCOLS`.
        max_disparity: truths of so many pixels or more do not count.
    """

    full_state_update = False
    higher_is_better = False

    # Of the measures, sums over pixels or images, or over groups; the last two are of the group that is not yet full.
    pixel_sums: Tensor
    image_sums: Tensor
    group_sums: Tensor
    open_sums: Tensor
    counts: Tensor
    truths: Tensor

    def __init__(self, protocol: str = "default", max_disparity: int = 192) -> None:
        super().__init__()
        self.protocol = protocol_named(protocol)
        if max_disparity < 1:
            raise ValueError(f"max_disparity must be at least 1 pixel, got {max_disparity}")
        self.max_disparity = max_disparity
        for name in ("pixel_sums", "image_sums", "group_sums", "open_sums"):
            self.add_state(name, torch.zeros(len(_MEASURES), dtype=torch.float64), dist_reduce_fx="sum")
        # Truths above 0, and those of them that max_disparity leaves out.
        self.add_state("truths", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        # Pixels, images, groups that count; pixels and images of the open group; images in all.
        self.add_state("counts", torch.zeros(6, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, disparity: Tensor, valid: Tensor, names: Sequence[str]) -> None:
        """Add images, cut and without padding.

        Args:
            prediction: (B, height, width) float, in pixels.
            disparity: likewise, the truth, of any value where it is not valid.
            valid: likewise, bool.
            names: of the images, for errors.

        Raises:
            ValueError: shapes differ, or a prediction is not finite.
        """
        if not (prediction.shape == disparity.shape == valid.shape) or prediction.ndim != 3:
            raise ValueError(
                "prediction, disparity and valid must be (images, height, width) alike, got "
                f"{tuple(prediction.shape)}, {tuple(disparity.shape)} and {tuple(valid.shape)}"
            )
        if len(names) != len(prediction):
            raise ValueError(f"names must be as many as the {len(prediction)} images, got {len(names)}")
        counted = self.protocol.counted(disparity, valid, max_disparity=self.max_disparity)
        for image in range(len(names)):
            truth = disparity[image][counted[image]].double()  # (n,)
            is_positive = valid[image] & torch.isfinite(disparity[image]) & (disparity[image] > 0)
            positive = int(is_positive.sum())
            beyond = int((is_positive & (disparity[image] >= self.max_disparity)).sum())
            self.truths += torch.tensor([positive, beyond], device=self.truths.device)
            if len(truth) < self.protocol.least_share * positive:
                truth = truth[:0]
            error = (prediction[image][counted[image]].double()[: len(truth)] - truth).abs()
            if not error.isfinite().all():
                raise ValueError(
                    f"a predicted disparity must be finite, got one of {names[image]} that is not; has the training "
                    "diverged?"
                )
            self._add(error, truth)

    def compute(self) -> dict[str, float]:
        """The means, frames (all of them), frames_without_valid_pixels (those in no mean), and beyond_max_disparity.

        The last is the share of truths that max_disparity leaves out.

        Where no pixel of any image counts, the means are NaN.
        """
        pixels, images, groups, open_pixels, open_images, frames = self.counts.tolist()
        if self.protocol.mean == "groups":
            sums, number = self.group_sums, groups
            if open_images and open_pixels:
                sums, number = sums + self.open_sums / open_pixels, groups + 1
            scores = _means(sums, number)
        elif self.protocol.mean == "images":
            scores = _means(self.image_sums, images)
        else:
            of_images = _means(self.image_sums, images)
            scores = _means(self.pixel_sums, pixels) | {f"{name}_per_image": of_images[name] for name in of_images}
        truths, beyond = self.truths.tolist()
        scores["beyond_max_disparity"] = beyond / truths if truths else nan
        return scores | {"frames": float(frames), "frames_without_valid_pixels": float(frames - images)}

    def _add(self, error: Tensor, truth: Tensor) -> None:
        wrong = error > 3
        sums = torch.stack(
            [error.sum(), (error > 1).sum(), wrong.sum(), (wrong & (error > 0.05 * truth.abs())).sum()]
        ).to(self.pixel_sums)
        number = len(error)
        self.counts[5] += 1
        self.pixel_sums += sums
        self.counts[0] += number
        if number:
            self.image_sums += sums / number
            self.counts[1] += 1
        self.open_sums += sums
        self.counts[3] += number
        self.counts[4] += 1
        if self.counts[4] == _GROUP:
            if self.counts[3]:
                self.group_sums += self.open_sums / self.counts[3]
                self.counts[2] += 1
            self.open_sums = torch.zeros_like(self.open_sums)
            self.counts[3:5] = 0


def _means(sums: Tensor, number: int) -> dict[str, float]:
    values = (sums / number).tolist() if number else [nan] * len(_MEASURES)
    return dict(zip(_MEASURES, values))
