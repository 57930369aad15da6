"""What makes the attention of a network: a class or a function; anything else is refused in one sentence."""

from functools import partial

import numpy as np
import pytest
from torch import nn

from lineara.models import PSMNet, SequenceClassifier, mask_rcnn, resnet
from lineara.nn import EfficientAttention, EfficientAttention2d, EfficientAttention3d

SMALL = {"channels": 8, "num_blocks": (1, 1, 1, 1)}
NETWORKS = {
    "SequenceClassifier": (partial(SequenceClassifier, 11, 5, 23), EfficientAttention),
    "resnet": (partial(resnet, "resnet18"), EfficientAttention2d),
    "mask_rcnn": (partial(mask_rcnn, "resnet18"), EfficientAttention2d),
    "PSMNet": (partial(PSMNet, 16, **SMALL), EfficientAttention3d),
}
EVERY_NETWORK = pytest.mark.parametrize("name", NETWORKS)


@EVERY_NETWORK
def test_a_layer_or_its_name_in_place_of_a_class_is_refused(name):
    make, kind = NETWORKS[name]
    for wrong, sentence in (
        (
            kind(64),
            rf"attention must be a class or a function that makes layers, got a layer, {kind.__name__}; pass the ",
        ),
        ("softmax", "attention must be a class or a function that makes layers, got 'softmax'; pass a class such as "),
        (lambda dim: "softmax", r"attention must make a torch\.nn\.Module, got str from attention\(\d+\)$"),
    ):
        with pytest.raises(TypeError, match=f"^{sentence}"):
            make(attention=wrong)


def test_numbers_of_numpy_are_numbers():
    number = np.int64
    network = resnet("resnet18", num_classes=number(7), places=number(1), attention=EfficientAttention2d)
    assert network.fc.out_features == 7
    assert sum(isinstance(module, EfficientAttention2d) for module in network.modules()) == 1
    network = mask_rcnn("resnet18", num_classes=number(3), min_size=number(64), max_size=number(128), places=number(0))
    assert network.transform.min_size == (64,)
    network = PSMNet(number(16), **{**SMALL, "channels": number(8)})
    assert isinstance(network, nn.Module)
    network = SequenceClassifier(
        number(11), number(5), number(23), attention=EfficientAttention, dim=number(6), num_layers=number(1)
    )
    assert network.positions.shape == (23, 6)
    for make in (partial(resnet, "resnet18"), partial(mask_rcnn, "resnet18")):
        with pytest.raises(TypeError, match=r"^places must be an integer, got True$"):
            make(places=True)


@pytest.mark.parametrize(
    ("name", "options", "error", "sentence"),
    [
        ("resnet", {"places": None}, ValueError, "places must be a list of some of res2, .*, each once, got None$"),
        ("mask_rcnn", {"places": None}, ValueError, "places must be a list of some of res2, .*, each once, got None$"),
        ("mask_rcnn", {"trainable_stages": 2.0}, TypeError, "trainable_stages must be an integer, got 2.0$"),
        ("mask_rcnn", {"anchor_sizes": None}, TypeError, "anchor_sizes must be a sequence of integers, got None$"),
        (
            "mask_rcnn",
            {"min_size": None},
            TypeError,
            "min_size must be a sequence of integers or an integer, got None$",
        ),
        ("mask_rcnn", {"batch_norm_eps": "x"}, TypeError, "batch_norm_eps must be a number, got str$"),
        ("mask_rcnn", {"batch_norm_eps": -1.0}, ValueError, "batch_norm_eps must be at least 0, got -1.0$"),
        ("mask_rcnn", {"version": "1"}, ValueError, "version must be 1 or 2, got '1'$"),
        ("PSMNet", {"places": None}, ValueError, "places must be a list of some of entry, .*, each once, got None$"),
        ("PSMNet", {"num_blocks": 3}, TypeError, "num_blocks must be a sequence of integers, got 3$"),
        ("SequenceClassifier", {"num_sequences": "1"}, ValueError, "num_sequences must be 1 or 2, got '1'$"),
    ],
)
def test_arguments_of_another_kind_are_refused_in_one_sentence(name, options, error, sentence):
    make, kind = NETWORKS[name]
    with pytest.raises(error, match=f"^{sentence}"):
        make(**{"attention": kind, **options})
