"""Global attention maps on a photograph, by classifiers and by detectors."""

import re
import runpy
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.transforms.v2.functional import resize

from lineara.models import mask_rcnn
from lineara.nn import EfficientAttention2d, SoftmaxAttention
from lineara.tasks import photograph_maps as module
from lineara.tasks.image_classification import DigitsData, ImageClassification, ImageFolderData
from lineara.tasks.photograph_maps import photograph_maps

WIDTH, HEIGHT = 90, 70


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photograph.png"
    noise = np.random.default_rng(0).integers(256, size=(HEIGHT // 10, WIDTH // 10, 3), dtype=np.uint8)
    Image.fromarray(noise.repeat(10, axis=0).repeat(10, axis=1)).save(path)
    return path


@pytest.fixture
def drawn(monkeypatch):
    """What is drawn, in place of a drawing."""
    calls: list[Any] = []
    monkeypatch.setattr(module, "map_grid", lambda maps, **options: calls.append((maps, options)))
    return calls


class Classifier(nn.Module):
    """Two layers of attention, of 2 heads and of 1, on maps of half the image's size."""

    def __init__(self, **options):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.first = EfficientAttention2d(8, 2, key_dim=6, **options)
        self.second = EfficientAttention2d(8, key_dim=5)

    def forward(self, images):
        return self.second(self.first(self.stem(images))).mean(dim=(2, 3))


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return ImageClassification(Classifier(), num_classes=8).eval()


DATA = ImageFolderData(image_size=32, resize_size=35)


class Detector(FasterRCNN):
    """torchvision's with a small ResNet; attention behind a stage, and in a head, where it counts for nothing."""

    def __init__(self):
        backbone = resnet18()
        backbone.layer2.add_module("attention", EfficientAttention2d(128, key_dim=3))
        pyramid = _resnet_fpn_extractor(backbone, 5)
        super().__init__(pyramid, 3, min_size=77, max_size=1000)
        self.roi_heads.add_module("attention", EfficientAttention2d(4))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Detector().eval()


def softmax_of_keys(layer, x, head=0):
    """(channels of the head, height, width), computed from the weights."""
    channels = layer.key_dim // layer.num_heads
    weight, bias = layer.keys.weight[:, :, 0, 0], layer.keys.bias
    keys = torch.einsum("chw,kc->khw", x, weight) + bias[:, None, None]
    keys = keys[head * channels : (head + 1) * channels]
    return (keys.exp() / keys.exp().sum(dim=(1, 2), keepdim=True)).detach()


def test_the_maps_of_a_classifier_lie_over_the_part_of_the_photograph_that_it_is_given(photograph, classifier, drawn):
    photograph_maps(classifier, DATA, photograph, head=1, max_maps=7)
    [(maps, options)] = drawn
    image, shown = DATA.photograph(Image.open(photograph))
    network = classifier.network
    expected = softmax_of_keys(network.first, network.stem(image[None])[0], head=1)
    assert maps.shape == (3, 16, 16)
    torch.testing.assert_close(maps, expected)
    np.testing.assert_array_equal(options["image"], shown)
    assert options["max_maps"] == 7
    assert options["title"] == "Global attention maps of first, 16 x 16 positions, head 1"


@pytest.mark.parametrize("layer", ["second", 1, "1"])
def test_a_layer_is_chosen_by_name_or_number(photograph, classifier, drawn, layer):
    photograph_maps(classifier, DATA, photograph, layer=layer)
    [(maps, options)] = drawn
    assert maps.shape == (5, 16, 16)
    assert options["title"] == "Global attention maps of second, 16 x 16 positions"


def test_a_name_that_is_a_number_is_the_name(photograph, drawn):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Identity(), EfficientAttention2d(4), EfficientAttention2d(4))
    for layer, name in (("2", "2"), ("3", "3"), (1, "3"), ("0", "2"), (None, "2")):
        photograph_maps(network.eval(), DATA, photograph, layer=layer)
        assert f" of {name}," in drawn.pop()[1]["title"]


def test_the_padding_of_a_detector_is_cut_off_its_maps(photograph, detector, drawn):
    photograph_maps(detector, None, photograph)
    [(maps, options)] = drawn
    # By hand: 70 x 90 is resized to 77 x 99 and padded to 96 x 128, whose stage of stride 8 has 12 x 16 positions; the
    # photograph fills 77 / 8 = 9.6 of the rows and 99 / 8 = 12.4 of the columns.
    pixels = torch.from_numpy(np.array(Image.open(photograph))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    resized = resize((pixels - mean) / std, [77, 99], antialias=False)
    padded = torch.zeros(1, 3, 96, 128)
    padded[0, :, :77, :99] = resized
    body = detector.backbone.body
    x = body.layer1(body.maxpool(body.relu(body.bn1(body.conv1(padded)))))
    x = body.layer2[1](body.layer2[0](x))
    whole = softmax_of_keys(body.layer2.attention, x[0])
    assert whole.shape == (3, 12, 16)
    part = whole[:, :10, :13]
    assert maps.shape == (3, 10, 13)
    # Relative to a uniform map over all 12 x 16 positions, not over those that are left.
    torch.testing.assert_close(maps * 130, part * 192, rtol=1e-3, atol=1e-4)
    assert float(maps[0].sum()) != pytest.approx(1)
    assert options["title"] == "Global attention maps of backbone.body.layer2.attention, 10 x 13 positions"
    np.testing.assert_array_equal(options["image"], np.array(Image.open(photograph)))


def test_a_photograph_that_needs_no_padding_is_not_cut(tmp_path, detector, drawn, monkeypatch):
    monkeypatch.setattr(detector.transform, "min_size", (96,))
    Image.new("RGB", (128, 96)).save(tmp_path / "a.png")
    photograph_maps(detector, None, tmp_path / "a.png")
    [(maps, _)] = drawn
    assert maps.shape == (3, 12, 16)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))


def test_a_very_thin_photograph_has_maps(tmp_path):
    network = mask_rcnn(
        "resnet18", min_size=64, max_size=128, attention=lambda dim: EfficientAttention2d(dim, key_dim=3)
    )
    Image.new("RGB", (300, 1)).save(tmp_path / "a.png")
    figure = photograph_maps(network.eval(), None, tmp_path / "a.png")
    assert figure.axes[0].get_title() == "image"
    figure.savefig(tmp_path / "maps.png")


def test_attention_behind_the_backbone_of_a_detector_is_not_offered(photograph, detector):
    with pytest.raises(
        ValueError, match=r"^layer must be one of backbone\.body\.layer2\.attention, or below 1, got 1$"
    ):
        photograph_maps(detector, None, photograph, layer=1)


def test_the_whole_of_it_is_drawn(photograph, classifier, detector, tmp_path):
    for task, data in ((classifier, DATA), (classifier, DigitsData()), (detector, None)):
        figure = photograph_maps(task, data, photograph)
        image, *cells = figure.axes
        assert image.get_title() == "image"
        assert len(cells) == 3
        figure.savefig(tmp_path / "maps.png")


def test_the_network_is_left_as_it_was(photograph, classifier):
    before = {name: weight.clone() for name, weight in classifier.state_dict().items()}
    photograph_maps(classifier, DATA, photograph)
    assert all(torch.equal(weight, before[name]) for name, weight in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"layer": 2}, "layer must be one of first, second, or below 2, got 2"),
        ({"layer": -1}, "layer must be one of first, second, or below 2, got -1"),
        ({"layer": "third"}, "layer must be one of first, second, or below 2, got third"),
        ({"head": 2}, "head must be at least 0 and below 2, got 2"),
        ({"head": -1}, "head must be at least 0 and below 2, got -1"),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(photograph, classifier, wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        photograph_maps(classifier, DATA, photograph, **wrong)


def test_networks_without_such_maps_are_refused(photograph):
    scaling = Classifier(normalization="scaling").eval()
    with pytest.raises(ValueError, match=r"^layer must have normalization='softmax', got 'scaling'"):
        photograph_maps(scaling, DATA, photograph)
    without = nn.Sequential(nn.Conv2d(3, 4, 1), SoftmaxAttention(4)).eval()
    with pytest.raises(ValueError, match=r"^the network must have efficient attention over its feature maps, got none"):
        photograph_maps(without, DATA, photograph)


def test_a_network_in_training_is_refused(photograph, classifier):
    with pytest.raises(ValueError, match=r"^task must be in evaluation mode, got one in training mode"):
        photograph_maps(classifier.train(), DATA, photograph)


def test_a_classifier_needs_its_data(photograph, classifier):
    with pytest.raises(ValueError, match=r"^data must be that of an image classifier .*, got NoneType and Classifier$"):
        photograph_maps(classifier, None, photograph)


def test_a_photograph_that_cannot_be_read_is_named(tmp_path, classifier):
    path = tmp_path / "a.jpg"
    for content in (None, b"text"):
        if content:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(str(path))} must be an image that can be read, got "):
            photograph_maps(classifier, DATA, path)


def test_without_torchvision_it_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ImportError, match=r"^maps on photographs need torchvision, .*: pip install 'lineara\[vision\]'$"
    ):
        runpy.run_path(module.__file__)
