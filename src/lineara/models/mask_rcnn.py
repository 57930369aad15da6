"""Mask R-CNN of torchvision with attention behind stages of its ResNet and levels of its feature pyramid."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, SupportsIndex

from torch import nn

from lineara.models.resnet import STAGES, choose_places, insert_into_stages, plain_resnet, torchvision_models
from lineara.nn.checks import check_attention_maker, made_by, sequence_of
from lineara.ops.checks import check_integer, check_number

LEVELS = ("fpn1", "fpn2", "fpn3", "fpn4", "fpn5")
# Modules by number. The paper says 1, 5 and 7, and "res3-4 + FPN1-5"; what 1 and 5 are is inferred.
_PLACES: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("res3",),
    5: ("res3", "res4", "fpn3", "fpn4", "fpn5"),
    7: ("res3", "res4", *LEVELS),
}


def mask_rcnn(
    backbone: str = "resnet50",
    *,
    version: int = 1,
    num_classes: int = 91,
    attention: Callable[[int], nn.Module] | None = None,
    places: int | Sequence[str] = 7,
    batch_norm: str = "train",
    batch_norm_eps: float = 1e-5,
    trainable_stages: int = 5,
    min_size: int | Sequence[int] = 800,
    max_size: int = 1333,
    anchor_sizes: Sequence[int] = (32, 64, 128, 256, 512),
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A Mask R-CNN of torchvision, with attention modules in its backbone.

    Attention acts behind stages of the ResNet (res2 to res5: strides 4, 8, 16, 32) and on levels of the feature pyramid
    (fpn1 to fpn5, the usual P2 to P6: strides 4 to 64). fpn5 is the subsampled fpn4, with the attention of both.

    Names of weights are torchvision's; those of the modules begin with `backbone.body.layer<n>.attention.` and
    `backbone.fpn.extra_blocks.fpn<n>.`, so that a plain state dict fits all but the modules
    (`lineara.models.pretrained.load_plain_weights`). Two networks that differ in `attention` alone freeze and normalise
    the same.

    Args:
        backbone: a ResNet, as `name` of `resnet`.
        version: 1 is the network of torchvision's maskrcnn_resnet50_fpn; 2 that of its maskrcnn_resnet50_fpn_v2: two
            convolutions in the proposal network, four in the box head, batch normalisation in pyramid and heads.
        num_classes: number of classes, the background, which is class 0, included.
        attention: makes one module: called as attention(dim) for a place with `dim` channels (256 in the pyramid). A
            class, a function, or in a recipe a class path with its further arguments; None is the plain network. With
            `zero_init` the extended network starts as the plain one.
        places: where modules stand, some of res2, res3, res4, res5, fpn1, fpn2, fpn3, fpn4 and fpn5; or their number as
            in the paper: 1 is res3; 5 are res3, res4 and fpn3 to fpn5; 7 are res3, res4 and fpn1 to fpn5.
        batch_norm: `"train"` keeps statistics and weights of all batch normalisation learning, which training from
            scratch needs; `"frozen"` keeps both as loaded, usual for small batches from pretrained weights.
        batch_norm_eps: added to the variances; torchvision's published version 1 on COCO was trained with 0.
        trainable_stages: stages of the ResNet, from the last, that learn: 5 all of it, 3 the usual for pretrained
            weights, 0 none. Attention modules always learn.
        min_size: length of the images' short side, in pixels; of several one is drawn for each training image.
        max_size: bound of the long side, in pixels. An image so thin that nothing of its short side would be left keeps
            one pixel of it, which torchvision's own network refuses.
        anchor_sizes: side of the anchors on each of the five levels of the pyramid, in pixels of the resized image.
        options: further arguments of torchvision's MaskRCNN, such as `box_detections_per_img`.

    Returns:
        The network. In training, network(images, targets) gives a dict of losses; else network(images) a dict of boxes,
        labels, scores and masks per image, in torchvision's formats.

    Raises:
        ValueError: for names, places or numbers that do not exist.
        ImportError: without torchvision.

    Source: He et al., ICCV 2017, arXiv 1703.06870, as in torchvision; Shen et al., WACV 2021, arXiv 1812.01243.

    Example:
        >>> network = mask_rcnn(attention=lambda dim: EfficientAttention2d(dim, key_dim=64, zero_init=True))
    """
    check_attention_maker(attention)
    integer = partial(check_integer, least=None)
    trainable_stages = integer("trainable_stages", trainable_stages)
    anchor_sizes = sequence_of("anchor_sizes", anchor_sizes, integer)
    _check(version, trainable_stages, anchor_sizes)
    min_sizes = (
        (integer("min_size", min_size),)
        if isinstance(min_size, SupportsIndex)
        else sequence_of("min_size", min_size, integer, otherwise=" or an integer")
    )
    num_classes, max_size = integer("num_classes", num_classes), integer("max_size", max_size)
    _check_numbers(num_classes, min_sizes, max_size, anchor_sizes)
    chosen = choose_places(places, _PLACES, (*STAGES, *LEVELS))
    norm_layer = _normalization(batch_norm, batch_norm_eps)
    pyramid = feature_pyramid(
        backbone,
        attention=attention,
        places=chosen,
        norm_layer=norm_layer,
        norm_in_pyramid=version == 2,
        trainable_stages=trainable_stages,
    )
    arguments = _heads(pyramid.out_channels, version, anchor_sizes, norm_layer)
    arguments |= {"min_size": min_sizes, "max_size": max_size}
    detection = torchvision_models().detection
    network = detection.MaskRCNN(pyramid, num_classes=num_classes, **arguments, **_checked(options, arguments))
    from lineara.models.thin_images import TransformOfAnyShape

    made = network.transform
    network.transform = TransformOfAnyShape(made.min_size, made.max_size, made.image_mean, made.image_std)
    return network


def feature_pyramid(
    backbone: str,
    *,
    attention: Callable[[int], nn.Module] | None,
    places: Sequence[str],
    norm_layer: Callable[..., nn.Module],
    norm_in_pyramid: bool,
    trainable_stages: int,
) -> Any:
    """The backbone alone: what torchvision's FasterRCNN and KeypointRCNN take as well."""
    from lineara.models.pyramid import AttentivePyramid, backbone_with_pyramid

    body = plain_resnet(backbone, norm_layer=norm_layer)
    _freeze(body, trainable_stages)
    insert_into_stages(body, attention, [place for place in places if place in STAGES])
    levels = {} if attention is None else {place: made_by(attention, 256) for place in places if place in LEVELS}
    return backbone_with_pyramid(
        body, AttentivePyramid(LEVELS, levels), norm_layer=norm_layer if norm_in_pyramid else None
    )


def _freeze(body: nn.Module, trainable_stages: int) -> None:
    stages = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")
    # The fifth is all that comes before the first stage.
    learns = stages if trainable_stages == 5 else stages[:trainable_stages]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name.startswith(learns))


def _normalization(batch_norm: str, eps: float) -> Callable[..., nn.Module]:
    if batch_norm not in ("train", "frozen"):
        raise ValueError(f"batch_norm must be 'train' or 'frozen', got {batch_norm!r}")
    eps = check_number("batch_norm_eps", eps)
    if eps < 0:
        raise ValueError(f"batch_norm_eps must be at least 0, got {eps}")
    torchvision_models()
    from torchvision.ops import FrozenBatchNorm2d

    layer = nn.BatchNorm2d if batch_norm == "train" else FrozenBatchNorm2d
    return lambda channels: layer(channels, eps=eps)


def _heads(
    channels: int, version: int, anchor_sizes: Sequence[int], norm_layer: Callable[..., nn.Module]
) -> dict[str, Any]:
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
    from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
    from torchvision.models.detection.rpn import RPNHead

    anchors = AnchorGenerator(tuple((size,) for size in anchor_sizes), ((0.5, 1.0, 2.0),) * len(anchor_sizes))
    if version == 1:
        return {"rpn_anchor_generator": anchors}
    return {
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(channels, anchors.num_anchors_per_location()[0], conv_depth=2),
        "box_head": FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [1024], norm_layer=norm_layer),
        "mask_head": MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=norm_layer),
    }


def _check(version: int, trainable_stages: int, anchor_sizes: Sequence[int]) -> None:
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version!r}")
    if trainable_stages not in range(6):
        raise ValueError(f"trainable_stages must be from 0 to 5, got {trainable_stages}")
    if len(anchor_sizes) != len(LEVELS):
        raise ValueError(f"anchor_sizes must be {len(LEVELS)} numbers, one per level, got {tuple(anchor_sizes)}")


def _check_numbers(num_classes: int, min_sizes: Sequence[int], max_size: int, anchor_sizes: Sequence[int]) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, the background and one more, got {num_classes}")
    if not min_sizes or min(min_sizes) < 1:
        raise ValueError(f"min_size must be at least 1 pixel, got {', '.join(map(str, min_sizes)) or 'none'}")
    if max_size < max(min_sizes):
        raise ValueError(f"max_size must be at least min_size, got {max_size} and {max(min_sizes)}")
    if min(anchor_sizes) < 1:
        raise ValueError(f"anchor_sizes must be at least 1 pixel each, got {tuple(anchor_sizes)}")


def _checked(options: Mapping[str, Any] | None, taken: Mapping[str, Any]) -> dict[str, Any]:
    """Raise unless torchvision knows every option, and no argument here says the same."""
    detection = torchvision_models().detection
    known = {*inspect.signature(detection.MaskRCNN).parameters, *inspect.signature(detection.FasterRCNN).parameters}
    known -= {"backbone", "num_classes", "kwargs", *taken}
    wrong = [name for name in options or {} if name not in known]
    if wrong:
        raise ValueError(f"options must be further arguments of torchvision's MaskRCNN, got {', '.join(wrong)}")
    return dict(options or {})
