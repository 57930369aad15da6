"""Global attention maps of trained vision networks on a photograph, for every task of images."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn

from lineara.nn import EfficientAttention2d
from lineara.tasks.image_files import read_image
from lineara.viz import global_maps, map_grid

try:
    from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
    from torchvision.transforms.v2.functional import pil_to_tensor
except ImportError as error:
    raise ImportError(
        "maps on photographs need torchvision, which is not installed; install it with: pip install 'lineara[vision]'"
    ) from error

# Of the photograph beside the maps, in pixels; figures show it smaller.
_MOST_SHOWN = 640


def photograph_maps(
    task: nn.Module,
    data: object,
    image_path: Path | str,
    *,
    layer: int | str | None = None,
    head: int = 0,
    max_maps: int = 16,
):
    """The global attention maps of one layer of a trained network on a photograph, as in the paper's Figure 3.

    A classifier is given the photograph as its data prepares images that are not for training: the part that it sees is
    drawn. A detector resizes the whole photograph itself and pads it; the padding, to which it attends as well, is cut
    off the maps, and the peaks stay relative to a uniform map over the whole input.

    Args:
        task: a task whose `network` is a classifier or one of torchvision's R-CNNs, such as `load_run` gives; or such a
            network. In evaluation mode.
        data: the data of a classifier, such as `load_run` gives; not used for a detector.
        image_path: the photograph.
        layer: an `nn.EfficientAttention2d` of the network, by its module name or its number from 0 in the order of the
            network; None is the first one.
        head: head of the layer, from 0.
        max_maps: maps at most; those of most contrast come first.

    Returns:
        A matplotlib Figure: the photograph, and a grey map per key channel.

    Raises:
        ValueError: for a photograph that cannot be read, a network in training mode or without such layers, a layer or
            head that does not exist, a layer without softmax over positions, or data that prepares no photographs.

    Source: Shen et al., WACV 2021, arXiv 1812.01243, Figure 3.
    """
    network = task.get_submodule("network") if hasattr(task, "network") else task
    if network.training:
        raise ValueError("task must be in evaluation mode, got one in training mode; call task.eval() before")
    image = read_image(image_path)
    view = _detector_view(network, image) if isinstance(network, GeneralizedRCNN) else _view(network, data, image)
    name, attention = _choose(view.layers, layer)
    maps = global_maps(attention, view.call)[0]  # (H, K, height, width)
    if not 0 <= head < len(maps):
        raise ValueError(f"head must be at least 0 and below {len(maps)}, got {head}")
    seen = _cut(maps[head], *view.share)
    title = f"Global attention maps of {name}, {seen.shape[1]} x {seen.shape[2]} positions"
    if len(maps) > 1:
        title += f", head {head}"
    return map_grid(seen, image=view.shown, max_maps=max_maps, title=title)


class _View(NamedTuple):
    """What a network makes of a photograph."""

    layers: dict[str, EfficientAttention2d]
    call: Callable[[], object]
    shown: npt.NDArray[np.uint8]  # (height, width, 3)
    share: tuple[float, float]  # of the input's height and width that the photograph fills, from its top left


def _view(network: nn.Module, data: object, image: Image.Image) -> _View:
    prepare: Any = getattr(data, "photograph", None)
    if prepare is None:
        raise ValueError(
            f"data must be that of an image classifier unless the network is an R-CNN, got {type(data).__name__} and "
            f"{type(network).__name__}"
        )
    pixels, shown = prepare(image)
    batch = pixels[None].to(_device(network))  # (1, 3, height, width)
    return _View(_layers(network), lambda: network(batch), shown, (1.0, 1.0))


def _detector_view(network: GeneralizedRCNN, image: Image.Image) -> _View:
    pixels = pil_to_tensor(image).to(_device(network)) / 255  # (3, height, width)
    images, _ = network.transform([pixels])
    [(height, width)] = images.image_sizes
    padded_height, padded_width = images.tensors.shape[2:]
    image.thumbnail((_MOST_SHOWN, _MOST_SHOWN))
    # Where proposals are looked at, attention would not be over the photograph: the backbone is all there is to see.
    layers = {name: layer for name, layer in _layers(network).items() if name.startswith("backbone.")}
    return _View(
        layers,
        lambda: network.backbone(images.tensors),
        np.array(image),
        (height / padded_height, width / padded_width),
    )


def _layers(network: nn.Module) -> dict[str, EfficientAttention2d]:
    return {name: module for name, module in network.named_modules() if isinstance(module, EfficientAttention2d)}


def _choose(layers: dict[str, EfficientAttention2d], layer: int | str | None) -> tuple[str, EfficientAttention2d]:
    names = list(layers)
    if not names:
        raise ValueError(
            "the network must have efficient attention over its feature maps, got none; train one with "
            "lineara.nn.EfficientAttention2d"
        )
    if layer is None:
        layer = 0
    if layer in layers:
        return str(layer), layers[str(layer)]
    number = int(layer) if str(layer).isdecimal() else -1  # a command line gives numbers as text
    if not 0 <= number < len(names):
        raise ValueError(f"layer must be one of {', '.join(names)}, or below {len(names)}, got {layer}")
    return names[number], layers[names[number]]


def _cut(maps: Tensor, height_share: float, width_share: float) -> Tensor:
    """The photograph's part of (channels, height, width), with weights so that 1 / its positions stays uniform."""
    height, width = (
        max(math.ceil(share * size - 1e-6), 1) for share, size in zip((height_share, width_share), maps.shape[1:])
    )
    part = maps[:, :height, :width]
    return part * (maps[0].numel() / part[0].numel())


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
