"""The parts that PSMNet is made of: convolutions with normalisation, residual blocks, an hourglass of the volume."""

import math

from torch import Tensor, nn
from torch.nn.functional import relu


class Convolution2d(nn.Conv2d):
    """With the initial values of the published network."""

    def reset_parameters(self) -> None:
        _draw(self)


class Convolution3d(nn.Conv3d):
    """With the initial values of the published network."""

    def reset_parameters(self) -> None:
        _draw(self)


def _draw(convolution: nn.Conv2d | nn.Conv3d) -> None:
    fan_out = math.prod(convolution.kernel_size) * convolution.out_channels
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / fan_out))


def block2d(
    in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, dilation: int = 1
) -> tuple[nn.Module, nn.Module]:
    padding = dilation if kernel == 3 else 0
    return (
        Convolution2d(in_channels, out_channels, kernel, stride, padding, dilation, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def block3d(in_channels: int, out_channels: int, *, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return Convolution3d(in_channels, out_channels, 3, stride, padding=1, bias=False), nn.BatchNorm3d(out_channels)


class ResidualBlock(nn.Module):
    """Two convolutions and the input added, without an activation after the sum."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *block2d(in_channels, out_channels, stride=stride, dilation=dilation),
            nn.ReLU(),
            *block2d(out_channels, out_channels, dilation=dilation),
        )
        self.skip = (
            nn.Identity()
            if stride == 1 and in_channels == out_channels
            else nn.Sequential(*block2d(in_channels, out_channels, kernel=1, stride=stride))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


def residual_blocks(
    in_channels: int, out_channels: int, number: int, *, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """The first one changes the channels and the size."""
    return nn.Sequential(
        ResidualBlock(in_channels, out_channels, stride=stride, dilation=dilation),
        *(ResidualBlock(out_channels, out_channels, dilation=dilation) for _ in range(number - 1)),
    )


class Hourglass(nn.Module):
    """Down to a quarter of the volume's size and up again, with twice the channels between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        c = channels
        self.down1 = nn.Sequential(*block3d(c, 2 * c, stride=2), nn.ReLU())
        self.middle = nn.Sequential(*block3d(2 * c, 2 * c))
        self.down2 = nn.Sequential(*block3d(2 * c, 2 * c, stride=2), nn.ReLU(), *block3d(2 * c, 2 * c), nn.ReLU())
        self.up2 = nn.Sequential(_doubled(2 * c, 2 * c), nn.BatchNorm3d(2 * c))
        self.up1 = nn.Sequential(_doubled(2 * c, c), nn.BatchNorm3d(c))

    def forward(self, x: Tensor, before: Tensor | None, after: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The result, and what this one holds at half the size on its way down and on its way up.

        Args:
            x: (batch, channels, depth, height, width), sizes multiples of 4.
            before: what the first hourglass held on its way down, added on the way up; None is this one's own.
            after: what the previous hourglass held on its way up, added on the way down; None adds nothing.
        """
        middle = self.middle(self.down1(x))  # (B, 2C, half of each)
        down = relu(middle if after is None else middle + after)
        up = relu(self.up2(self.down2(down)) + (down if before is None else before))
        return self.up1(up), down, up


def _doubled(in_channels: int, out_channels: int) -> nn.ConvTranspose3d:
    return nn.ConvTranspose3d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False)
