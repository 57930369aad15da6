"""Levels of a pyramid, each by the module of its name."""

import torch
import torchvision
from torch import nn

from lineara.models.pyramid import AttentivePyramid, backbone_with_pyramid


class Adding(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


def test_each_level_goes_through_its_module_and_the_last_is_subsampled():
    pyramid = AttentivePyramid(("a", "b", "c"), {"b": Adding(10), "c": Adding(100)})
    first, second = torch.randn(1, 2, 5, 7), torch.randn(1, 2, 3, 5)
    levels, names = pyramid([first, second], [], ["0", "1"])
    assert names == ["0", "1", "pool"]
    assert torch.equal(levels[0], first)
    assert torch.equal(levels[1], second + 10)
    torch.testing.assert_close(levels[2], second[:, :, ::2, ::2] + 110)


def test_inputs_are_left_as_they_are():
    level, names = torch.randn(1, 2, 3, 5), ["0"]
    results, kept = [level], level.clone()
    AttentivePyramid(("a", "b"), {"a": Adding(1)})(results, [], names)
    assert names == ["0"]
    assert len(results) == 1
    assert torch.equal(results[0], kept)


def test_a_backbone_has_the_channels_of_its_resnet():
    for name, channels in (("resnet18", 64), ("resnet50", 256)):
        body = torchvision.models.get_model(name, weights=None)
        backbone = backbone_with_pyramid(body, AttentivePyramid("abcde", {}), norm_layer=None)
        found = [block[0].in_channels for block in backbone.fpn.inner_blocks]
        assert found == [channels, 2 * channels, 4 * channels, 8 * channels]
        assert backbone.out_channels == 256
