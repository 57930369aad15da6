"""PSMNet: stereo depth from a volume of matching costs, with attention over the whole volume."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad

from lineara.models.psmnet_parts import Convolution2d, Convolution3d, Hourglass, block2d, block3d, residual_blocks
from lineara.models.resnet import choose_places
from lineara.nn.checks import check_attention_maker, made_by, sequence_of
from lineara.ops.checks import check_integer

PLACES = ("entry", "volume", "hourglass1", "hourglass2", "hourglass3")
# The features are a quarter of the input, and the hourglasses a quarter of those.
_MULTIPLE = 16
_NUM_HOURGLASSES = 3


class PSMNet(nn.Module):
    """Pyramid stereo matching network; with `attention`, EA-PSMNet.

        features = pyramid(image),    volume_d = [left features, right features shifted by d],
        cost = hourglasses(volume),   disparity = sum_d d softmax_d(-cost)

    The cost that the last convolutions give is already negative. The volume has a quarter of the disparities, height
    and width; attention modules see it with `channels` channels:

        entry                    behind the first two convolutions of the volume
        volume                   behind the residual block that follows, before the hourglasses
        hourglass1, 2 and 3      behind each of them

    Which of these the paper used is not known; `volume` is our choice.

    Args:
        max_disparity: bound of the answers, in pixels; largest shift that the volume holds, rounded up to 16.
        attention: makes one module: called as attention(dim). A class, a function, or in a recipe a class path with its
            further arguments; None is the plain network. With `zero_init` the extended network starts as the plain one.
        places: where modules stand, some of the above.
        channels: of the volume; all others are in proportion. 32 is the published network.
        num_blocks: residual blocks of the four groups of the feature pyramid; 3, 16, 3, 3 is the published network.

    Weights of the modules are named `attention.<place>.`; all others are those of the plain network.

    Source: Chang and Chen, "Pyramid Stereo Matching Network", CVPR 2018, arXiv 1803.08669; Shen et al., WACV 2021,
    arXiv 1812.01243. We differ in that inputs may have any size: they are padded with zeros at the top and on the right
    to multiples of 16, and windows of the pyramid that exceed its features are as large as those.

    Example:
        >>> network = PSMNet(192, attention=lambda dim: EfficientAttention3d(dim, zero_init=True))
    """

    def __init__(
        self,
        max_disparity: int = 192,
        attention: Callable[[int], nn.Module] | None = None,
        *,
        places: Sequence[str] = ("volume",),
        channels: int = 32,
        num_blocks: Sequence[int] = (3, 16, 3, 3),
    ) -> None:
        super().__init__()
        check_attention_maker(attention)
        self.max_disparity = check_integer("max_disparity", max_disparity)
        channels = check_integer("channels", channels)
        num_blocks = sequence_of("num_blocks", num_blocks, partial(check_integer, least=None))
        if len(num_blocks) != 4 or min(num_blocks) < 1:
            raise ValueError(f"num_blocks must be 4 numbers of at least 1, got {num_blocks}")
        chosen = choose_places(places, {}, PLACES)
        self.features = FeaturePyramid(channels, num_blocks)
        self.entry = nn.Sequential(*block3d(2 * channels, channels), nn.ReLU(), *block3d(channels, channels), nn.ReLU())
        self.residual = nn.Sequential(*block3d(channels, channels), nn.ReLU(), *block3d(channels, channels))
        self.hourglasses = nn.ModuleList(Hourglass(channels) for _ in range(_NUM_HOURGLASSES))
        self.heads = nn.ModuleList(
            nn.Sequential(*block3d(channels, channels), nn.ReLU(), Convolution3d(channels, 1, 3, padding=1, bias=False))
            for _ in range(_NUM_HOURGLASSES)
        )
        self.attention = nn.ModuleDict()
        if attention is not None:
            self.attention.update({place: made_by(attention, channels) for place in chosen})

    def forward(self, left: Tensor, right: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Disparities of the left view: a point at column x there is at x - disparity in the right view.

        Args:
            left: (batch, 3, height, width), normalised colours, rectified.
            right: of the same shape.

        Returns:
            (batch, height, width), float32, in pixels, from 0 to max_disparity - 1; in training three of these, the
            last one the best.

        Raises:
            ValueError: for inputs of another shape, or of two; in training for a single pair that is too small.
        """
        if left.dim() != 4 or left.shape[1] != 3 or left.shape != right.shape:
            raise ValueError(
                "left and right must both have the shape (batch, 3, height, width), got "
                f"{tuple(left.shape)} and {tuple(right.shape)}"
            )
        height, width = left.shape[2:]
        above, beside = -height % _MULTIPLE, -width % _MULTIPLE
        self.features.check_normalisable(len(left), height + above, width + beside)
        left, right = (pad(view, (0, beside, above, 0)) for view in (left, right))
        levels = _MULTIPLE // 4 * math.ceil(self.max_disparity / _MULTIPLE)
        volume = cost_volume(self.features(left), self.features(right), levels)
        costs = self._costs(volume)
        answers = [self._disparity(cost)[:, above:, :width] for cost in (costs if self.training else costs[-1:])]
        return tuple(answers) if self.training else answers[0]

    def _costs(self, volume: Tensor) -> list[Tensor]:
        """(B, 2C, D / 4, height / 4, width / 4) to the costs (B, 1, ...) behind each hourglass."""
        x = self._attend("entry", self.entry(volume))  # (B, C, ...)
        x = first = self._attend("volume", x + self.residual(x))
        costs: list[Tensor] = []
        before: Tensor | None = None  # what the first hourglass holds on its way down
        after: Tensor | None = None  # what the previous one holds on its way up
        for number, (hourglass, head) in enumerate(zip(self.hourglasses, self.heads), start=1):
            x, down, after = hourglass(x, before, after)
            before = down if before is None else before
            x = self._attend(f"hourglass{number}", x + first)
            cost = head(x)
            costs.append(cost + costs[-1] if costs else cost)
        return costs

    def _attend(self, place: str, x: Tensor) -> Tensor:
        return self.attention[place](x) if place in self.attention else x

    def _disparity(self, cost: Tensor) -> Tensor:
        # In float32 under autocast too: half precision cannot tell neighbouring disparities apart.
        size = [4 * length for length in cost.shape[2:]]
        full = interpolate(cost.float(), size=size, mode="trilinear", align_corners=False)[:, 0]
        return expected_disparity(full[:, : self.max_disparity])


class FeaturePyramid(nn.Module):
    """An image to features of a quarter of its size, each with the means of four neighbourhoods.

    Args:
        channels: of the features.
        num_blocks: residual blocks of the four groups.
    """

    # Sides of the neighbourhoods, in pixels of the features.
    _WINDOWS = (64, 32, 16, 8)

    def __init__(self, channels: int, num_blocks: Sequence[int]) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Sequential(
            *(*block2d(3, c, stride=2), nn.ReLU()), *(*block2d(c, c), nn.ReLU()), *(*block2d(c, c), nn.ReLU())
        )
        self.group1 = residual_blocks(c, c, num_blocks[0])
        self.group2 = residual_blocks(c, 2 * c, num_blocks[1], stride=2)
        self.groups34 = nn.Sequential(
            residual_blocks(2 * c, 4 * c, num_blocks[2]), residual_blocks(4 * c, 4 * c, num_blocks[3], dilation=2)
        )
        self.branches = nn.ModuleList(nn.Sequential(*block2d(4 * c, c, kernel=1), nn.ReLU()) for _ in self._WINDOWS)
        self.fusion = nn.Sequential(*block2d(10 * c, 4 * c), nn.ReLU(), Convolution2d(4 * c, c, 1, bias=False))

    def check_normalisable(self, batch: int, height: int, width: int) -> None:
        """Refuse a single image of training that the largest window covers: one value has no deviation."""
        least = 2 * 4 * max(self._WINDOWS)  # pixels of the image: from there on two windows fit
        # Not of SyncBatchNorm, which other processes give more values.
        norms = [module for module in self.branches.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        if norms and batch == 1 and max(height, width) < least:
            raise ValueError(
                f"in training the batch must hold at least 2 pairs, or crops higher or wider than {least - _MULTIPLE} "
                f"pixels, got 1 pair of {height} x {width} with its padding; set a larger batch size or crop size"
            )

    def forward(self, image: Tensor) -> Tensor:
        quarter = self.group2(self.group1(self.stem(image)))  # (B, 2C, height / 4, width / 4)
        deep = self.groups34(quarter)  # (B, 4C, ...)
        size = deep.shape[2:]
        means: list[Tensor] = []
        for window, branch in zip(self._WINDOWS, self.branches):
            pooled = branch(avg_pool2d(deep, [min(window, length) for length in size]))
            means.append(interpolate(pooled, size=size, mode="bilinear", align_corners=False))
        return self.fusion(torch.cat([quarter, deep, *means], dim=1))


def cost_volume(left: Tensor, right: Tensor, levels: int) -> Tensor:
    """Features of both views side by side for every shift, zero where the right view ends.

    Args:
        left: (batch, channels, height, width).
        right: of the same shape.
        levels: number of shifts, from 0.

    Returns:
        (batch, 2 channels, levels, height, width).
    """
    batch, channels, height, width = left.shape
    volume = left.new_zeros(batch, 2 * channels, levels, height, width)
    for shift in range(min(levels, width)):
        volume[:, :channels, shift, :, shift:] = left[..., shift:]
        volume[:, channels:, shift, :, shift:] = right[..., : width - shift]
    return volume


def expected_disparity(scores: Tensor) -> Tensor:
    """Scores (batch, disparities from 0, height, width) to the mean under their softmax, (batch, height, width)."""
    disparities = torch.arange(scores.shape[1], device=scores.device, dtype=scores.dtype)
    return (scores.softmax(dim=1) * disparities[:, None, None]).sum(dim=1)
