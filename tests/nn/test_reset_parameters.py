"""Weights that are made without memory and reset later are those that a layer or network begins with."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from lineara.models import PSMNet, SequenceClassifier
from lineara.nn import (
    EfficientAttention,
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    EncoderBlock,
    MultiresolutionAttention,
    MultiresolutionAttention2d,
    SoftmaxAttention,
)
from lineara.nn.multiresolution_attention import MultiresolutionAttention3d
from lineara.nn.non_local_attention import NonLocalAttention2d, NonLocalAttention3d

MAPS = {
    kind.__name__: partial(kind, 12, 2, zero_init=True)
    for kind in (
        EfficientAttention1d,
        EfficientAttention2d,
        EfficientAttention3d,
        NonLocalAttention2d,
        NonLocalAttention3d,
        MultiresolutionAttention2d,
        MultiresolutionAttention3d,
    )
}
MADE: dict[str, Callable[[], nn.Module]] = {
    "EfficientAttention": partial(EfficientAttention, 12, 2),
    "SoftmaxAttention": partial(SoftmaxAttention, 12, 2),
    "MultiresolutionAttention": partial(MultiresolutionAttention, 12, 3, compression="conv"),
    "EncoderBlock": lambda: EncoderBlock(12, MultiresolutionAttention(12, 2)),
    "SequenceClassifier": partial(SequenceClassifier, 11, 5, 23, attention=EfficientAttention, dim=6),
    "PSMNet": partial(
        PSMNet, 16, partial(EfficientAttention3d, zero_init=True), channels=8, num_blocks=(1, 1, 1, 1), places=["entry"]
    ),
    "conv in 2d": partial(MultiresolutionAttention2d, 12, 3, key_dim=6, compression="conv", zero_init=True),
    **MAPS,
}


def reset_on_meta(make: Callable[[], nn.Module], *, children_first: bool) -> nn.Module:
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    modules = list(module.modules())
    for part in reversed(modules) if children_first else modules:
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module


@pytest.mark.parametrize("children_first", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_weights_reset_after_meta_are_as_they_begin(name, children_first):
    torch.manual_seed(0)
    expected = MADE[name]().state_dict()
    given = reset_on_meta(MADE[name], children_first=children_first).state_dict()
    assert given.keys() == expected.keys()
    for key, tensor in expected.items():
        other = given[key]
        assert not other.isnan().any(), key
        # The same constants, and random numbers of the same spread.
        if tensor.numel() > 1 and tensor.std() == 0:
            assert torch.equal(other, tensor), key
        elif tensor.numel() > 20:
            assert 1 / 3 < other.float().std() / tensor.float().std() < 3, key


def test_what_begins_at_zero_or_at_the_mean_is_exactly_that():
    for children_first in (False, True):
        layer = reset_on_meta(MADE["conv in 2d"], children_first=children_first)
        x = torch.randn(2, 12, 5, 7)
        assert torch.equal(layer(x), x)
        for weight in (layer.heads.key_weight, layer.heads.value_weight):
            for of_head, share in zip(weight, (1 / 16, 1 / 4, 1.0)):
                assert (of_head == share).all()
        network = reset_on_meta(MADE["SequenceClassifier"], children_first=children_first)
        assert (network.embedding.weight[0] == 0).all()
        for weight in (network.embedding.weight[1:], network.positions):
            assert weight.std().item() == pytest.approx(0.02, rel=0.3)


def test_zero_init_changes_no_other_weight():
    states = []
    for zero_init in (False, True):
        torch.manual_seed(0)
        layers = nn.ModuleList(EfficientAttention2d(12, zero_init=zero_init) for _ in range(2))
        states.append({key: tensor for key, tensor in layers.state_dict().items() if "reprojection" not in key})
    for key, tensor in states[0].items():
        assert torch.equal(states[1][key], tensor), key


def test_the_mean_of_a_large_window_is_no_zero_in_half_precision():
    for dtype, error in ((torch.float16, 2.0**-6), (torch.bfloat16, 2.0**-8)):
        layer = MultiresolutionAttention3d(
            4, 1, key_dim=1, value_dim=1, resolutions=[48], compression="conv", dtype=dtype
        )
        given = layer.heads.key_weight[0, 0, 0].item() * 48**3
        assert given == pytest.approx(1.0, rel=error)
