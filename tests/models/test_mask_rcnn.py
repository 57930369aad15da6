"""Mask R-CNN with attention, against torchvision's own; small ResNets where the size does not matter."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, KeypointRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d

from lineara.models import mask_rcnn
from lineara.models.mask_rcnn import feature_pyramid
from lineara.models.thin_images import TransformOfAnyShape
from lineara.nn import EfficientAttention2d, MultiresolutionAttention2d
from lineara.nn.non_local_attention import NonLocalAttention2d

TORCHVISIONS = {1: maskrcnn_resnet50_fpn, 2: maskrcnn_resnet50_fpn_v2}
STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32, "fpn1": 4, "fpn2": 8, "fpn3": 16, "fpn4": 32, "fpn5": 64}
SEVEN = ["res3", "res4", "fpn1", "fpn2", "fpn3", "fpn4", "fpn5"]


def starting_as_identity(kind):
    return lambda dim: kind(dim, key_dim=8, zero_init=True)


def small(**options):
    return mask_rcnn("resnet18", num_classes=3, min_size=64, max_size=128, **options)


def example(num_boxes=2):
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0], [20.0, 20.0, 60.0, 63.0]])[:num_boxes]
    masks = torch.zeros(num_boxes, 64, 71, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])[:num_boxes], "masks": masks}
    return torch.rand(3, 64, 71), target


@pytest.mark.parametrize("version", [1, 2])
def test_plain_it_is_torchvisions(version):
    ours, theirs = mask_rcnn(version=version), TORCHVISIONS[version](weights=None, weights_backbone=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert {type(module) for module in ours.modules()} - {type(module) for module in theirs.modules()} == {
        type(ours.backbone.fpn.extra_blocks),
        TransformOfAnyShape,
    }
    made = ("min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size")
    assert all(getattr(ours.transform, name) == getattr(theirs.transform, name) for name in made)
    ours.load_state_dict(theirs.state_dict())
    image = [torch.rand(3, 64, 65)]
    for network in (ours, theirs):
        network.transform.min_size, network.transform.max_size = (64,), 64
        network.eval()
    with torch.no_grad():
        expected, found = theirs(image)[0], ours(image)[0]
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        (1, EfficientAttention2d),
        (1, NonLocalAttention2d),
        (1, MultiresolutionAttention2d),
        (2, EfficientAttention2d),
    ],
)
def test_with_modules_that_start_at_zero_it_is_the_plain_network(version, kind):
    options = {"version": version, "batch_norm": "frozen"}
    plain, network = small(**options).eval(), small(attention=starting_as_identity(kind), **options).eval()
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    own = ("backbone.body.layer2.attention.", "backbone.body.layer3.attention.")
    own += tuple(f"backbone.fpn.extra_blocks.fpn{level}." for level in range(1, 6))
    assert all(key.startswith(own) for key in missing)
    assert {key.rpartition(kind_part(key))[0] for key in missing} == {prefix.rstrip(".") for prefix in own}
    image, target = example()
    with torch.no_grad():
        expected, found = plain([image])[0], network([image])[0]
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    torch.manual_seed(3)
    before = plain.train()([image], [target])
    torch.manual_seed(3)
    after = network.train()([image], [target])
    assert {key: value.item() for key, value in before.items()} == {key: value.item() for key, value in after.items()}


def kind_part(key):
    return next(f".{part}." for part in ("queries", "keys", "values", "reprojection", "heads") if f".{part}." in key)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (0, []),
        (1, ["res3"]),
        (5, ["res3", "res4", "fpn3", "fpn4", "fpn5"]),
        (7, SEVEN),
        (["fpn5", "res5", "res2"], ["res2", "res5", "fpn5"]),
    ],
)
def test_modules_see_the_maps_of_their_places(places, expected):
    seen = []

    class Looking(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.dim = dim

        def forward(self, x):
            assert x.shape[1] == self.dim
            seen.append((self, 128 // x.shape[-1]))
            return x

    network = small(attention=Looking, places=places).eval()
    with torch.no_grad():
        network.backbone(torch.rand(1, 3, 128, 128))
    body, pyramid = network.backbone.body, network.backbone.fpn.extra_blocks
    names = {getattr(body[f"layer{depth}"], "attention", None): f"res{depth + 1}" for depth in range(1, 5)}
    names |= {getattr(pyramid, f"fpn{level}", None): f"fpn{level}" for level in range(1, 6)}
    assert [names[module] for module, _ in seen] == expected
    assert [stride for _, stride in seen] == [STRIDES[place] for place in expected]


def test_attention_on_a_level_is_what_the_heads_see_and_the_last_level_comes_from_the_one_before():
    class Doubling(nn.Module):
        def forward(self, x):
            return 2 * x

    plain = small().eval()
    network = small(attention=lambda dim: Doubling(), places=["fpn2", "fpn4", "fpn5"]).eval()
    network.load_state_dict(plain.state_dict())
    image = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        before, after = plain.backbone(image), network.backbone(image)
    assert list(after) == list(before) == ["0", "1", "2", "3", "pool"]
    for factor, level in zip((1, 2, 1, 2, 4), before):
        torch.testing.assert_close(after[level], factor * before[level])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("attention", [None, starting_as_identity(EfficientAttention2d)], ids=["plain", "efficient"])
def test_arms_freeze_and_normalise_the_same(version, attention):
    network = small(version=version, attention=attention, batch_norm="frozen", trainable_stages=3)
    learns = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    body = "backbone.body."
    assert not any(name.startswith((f"{body}conv1", f"{body}bn1", f"{body}layer1")) for name in learns)
    assert all(any(name.startswith(f"{body}layer{stage}.") for name in learns) for stage in (2, 3, 4))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert any(isinstance(module, FrozenBatchNorm2d) for module in network.modules())
    if attention is not None:
        assert all(f"{body}layer{stage}.attention.keys.weight" in learns for stage in (2, 3))


def test_a_module_behind_a_frozen_stage_learns():
    network = small(attention=EfficientAttention2d, places=["res2"], trainable_stages=0, batch_norm="frozen")
    learning = [name for name, p in network.backbone.body.named_parameters() if p.requires_grad]
    assert learning
    assert all(name.startswith("layer1.attention.") for name in learning)


@pytest.mark.parametrize("trainable_stages", range(6))
def test_the_stages_that_learn_are_torchvisions(trainable_stages):
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    theirs = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=trainable_stages
    )
    ours = small(trainable_stages=trainable_stages).backbone
    for (name, expected), (_, found) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
        assert found.requires_grad == expected.requires_grad, name


def test_normalisation_takes_its_eps_everywhere():
    for batch_norm, kind in (("train", nn.BatchNorm2d), ("frozen", FrozenBatchNorm2d)):
        network = small(version=2, batch_norm=batch_norm, batch_norm_eps=0.25)
        layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d)]
        assert {(type(layer), layer.eps) for layer in layers} == {(kind, 0.25)}


def test_every_weight_of_every_module_learns_even_from_an_image_without_objects():
    network = small(attention=lambda dim: EfficientAttention2d(dim, key_dim=8))
    (image, target), (_, empty) = example(), example(0)
    losses = network([image, image], [target, empty])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    sum(losses.values()).backward()
    modules = [module for module in network.modules() if isinstance(module, EfficientAttention2d)]
    assert len(modules) == 7
    for module in modules:
        for name, parameter in module.named_parameters():
            # A key's bias shifts all positions alike, which their softmax does not see.
            assert name == "keys.bias" or parameter.grad.abs().max() > 0, name


def test_the_backbone_serves_torchvisions_other_detectors():
    for detector, options in ((FasterRCNN, {}), (KeypointRCNN, {"num_keypoints": 5})):
        backbone = feature_pyramid(
            "resnet18",
            attention=starting_as_identity(EfficientAttention2d),
            places=("res3", "fpn5"),
            norm_layer=nn.BatchNorm2d,
            norm_in_pyramid=False,
            trainable_stages=5,
        )
        network = detector(backbone, num_classes=2, min_size=64, max_size=64, **options).eval()
        with torch.no_grad():
            assert set(network([torch.rand(3, 64, 64)])[0]) >= {"boxes", "labels", "scores"}


def test_options_reach_torchvision():
    network = small(anchor_sizes=(8, 16, 24, 48, 96), options={"box_detections_per_img": 7})
    assert network.roi_heads.detections_per_img == 7
    assert network.rpn.anchor_generator.sizes == ((8,), (16,), (24,), (48,), (96,))
    assert network.transform.min_size == (64,)
    assert mask_rcnn("resnet18", min_size=[64, 96]).transform.min_size == (64, 96)


@pytest.mark.parametrize("size", [(1, 300), (300, 1)], ids=str)
def test_a_very_thin_image_is_trained_on_and_searched(size):
    """torchvision would resize it to a side of nothing."""
    image, masks = torch.rand(3, *size), torch.zeros(1, *size, dtype=torch.uint8)
    masks[0, : min(size[0], 90), : min(size[1], 90)] = 1
    boxes = torch.tensor([[0.0, 0.0, min(size[1], 90), min(size[0], 90)]])
    network = small(attention=starting_as_identity(EfficientAttention2d), batch_norm="frozen")
    losses = network([image], [{"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}])
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        [found] = network.eval()([image])
    assert len(found["boxes"]) > 0
    assert found["boxes"][:, 2].max() <= size[1]
    assert found["boxes"][:, 3].max() <= size[0]
    assert found["masks"].shape[1:] == (1, *size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": 3}, "^version must be 1 or 2, got 3$"),
        ({"batch_norm": "sync"}, "^batch_norm must be 'train' or 'frozen', got 'sync'$"),
        ({"trainable_stages": 6}, "^trainable_stages must be from 0 to 5, got 6$"),
        ({"anchor_sizes": (8, 16)}, r"^anchor_sizes must be 5 numbers, one per level, got \(8, 16\)$"),
        (
            {"anchor_sizes": (8, 16, 0, 64, 128)},
            r"^anchor_sizes must be at least 1 pixel each, got \(8, 16, 0, 64, 128\)$",
        ),
        ({"min_size": 0}, "^min_size must be at least 1 pixel, got 0$"),
        ({"min_size": (64, -1)}, "^min_size must be at least 1 pixel, got 64, -1$"),
        ({"min_size": ()}, "^min_size must be at least 1 pixel, got none$"),
        ({"min_size": (64, 96), "max_size": 95}, "^max_size must be at least min_size, got 95 and 96$"),
        ({"num_classes": 1}, "^num_classes must be at least 2, the background and one more, got 1$"),
        ({"places": 6}, "one of the numbers 0, 1, 5, 7, got 6$"),
        ({"places": ["fpn6"]}, "some of res2, .*, fpn5, each once, got"),
        ({"options": {"box_detections": 7}}, "^options must be further arguments of torchvision's MaskRCNN, got box"),
        ({"options": {"min_size": 7}}, "got min_size$"),
        ({"backbone": "resnet20"}, "got 'resnet20'$"),
    ],
)
def test_what_does_not_exist_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mask_rcnn(**{"backbone": "resnet18"} | options)
