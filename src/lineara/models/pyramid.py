"""Attention on the levels of torchvision's feature pyramid."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d
from torchvision.models import ResNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock


class AttentivePyramid(ExtraFPNBlock):
    """One module per level, then the usual subsampling of the last level, then the module of that one.

    Args:
        names: of all levels, the subsampled one last.
        levels: the modules, by the name of their level.
    """

    def __init__(self, names: Sequence[str], levels: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name, module in levels.items():
            self.add_module(name, module)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        *before, last = self.names
        results = [self._attend(name, level) for name, level in zip(before, results, strict=True)]
        subsampled = max_pool2d(results[-1], kernel_size=1, stride=2)
        return [*results, self._attend(last, subsampled)], [*names, "pool"]

    def _attend(self, name: str, level: Tensor) -> Tensor:
        module = self._modules.get(name)
        return level if module is None else module(level)


def backbone_with_pyramid(
    body: ResNet, extra_blocks: ExtraFPNBlock, *, norm_layer: Callable[..., nn.Module] | None
) -> BackboneWithFPN:
    """All four stages of a ResNet under a pyramid of 256 channels, as torchvision's detectors have it."""
    channels = [body.fc.in_features // 8 * 2**stage for stage in range(4)]
    return_layers = {f"layer{stage + 1}": str(stage) for stage in range(4)}
    return BackboneWithFPN(body, return_layers, channels, 256, extra_blocks=extra_blocks, norm_layer=norm_layer)
