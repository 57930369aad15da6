"""Sizes and sums of PSMNet's parts."""

import torch
from torch import nn

from lineara.models.psmnet_parts import Hourglass, ResidualBlock, residual_blocks


def test_a_block_adds_its_input_and_can_be_negative():
    block = ResidualBlock(5, 5).eval()
    x = torch.randn(2, 5, 7, 11)
    torch.testing.assert_close(block(x), block.body(x) + x)
    assert (block(x) < 0).any()
    with torch.no_grad():
        block.body[0].weight.zero_()
    torch.testing.assert_close(block(x), x)


def test_the_first_block_of_a_group_changes_channels_and_size():
    group = residual_blocks(5, 7, 3, stride=2)
    assert group(torch.randn(2, 5, 13, 11)).shape == (2, 7, 7, 6)
    assert not isinstance(group[0].skip, nn.Identity)
    assert all(isinstance(block.skip, nn.Identity) for block in group[1:])
    assert residual_blocks(5, 5, 1, dilation=2)(torch.randn(2, 5, 13, 11)).shape == (2, 5, 13, 11)


def test_an_hourglass_keeps_the_size_and_shows_its_middle():
    hourglass = Hourglass(3).eval()
    x = torch.randn(2, 3, 4, 8, 12)
    result, down, up = hourglass(x, None, None)
    assert result.shape == x.shape
    assert down.shape == up.shape == (2, 6, 2, 4, 6)
    assert min(down.min(), up.min()) >= 0
    before, after = torch.randn(2, 2, 6, 2, 4, 6).unbind()
    middle = hourglass.middle(hourglass.down1(x))
    _, down, up = hourglass(x, before, after)
    torch.testing.assert_close(down, torch.relu(middle + after))
    torch.testing.assert_close(up, torch.relu(hourglass.up2(hourglass.down2(down)) + before))
