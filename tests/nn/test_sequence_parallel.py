"""Layers on two processes that hold parts of the positions give what one process gives."""

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lineara.models import SequenceClassifier
from lineara.nn import (
    EfficientAttention,
    EfficientAttention2d,
    EncoderBlock,
    MultiresolutionAttention,
    SoftmaxAttention,
)
from lineara.nn.multiresolution_heads import MultiresolutionHeads
from lineara.nn.non_local_attention import NonLocalAttention2d
from lineara.nn.sequence_attention import ShardedPositions
from lineara.nn.sequence_parallel import shard_positions

sys.path.insert(0, str(Path(__file__).parent))
import sharded_layers
from sharded_layers import LAYERS

sys.path.pop(0)


@pytest.fixture(scope="module")
def given(started_ranks):
    """What each of the two ranks found."""
    return started_ranks(sharded_layers.__file__, 2)


def assert_equal(name, shards):
    """What shards have side by side, and the sum of their shares of the gradients of weights."""
    expected = sharded_layers.results(sharded_layers.layer_of(name), name)
    axis = LAYERS[name][2]
    assert set(shards[0]) == set(expected)
    for key, whole in expected.items():
        parts = [shard[key] for shard in shards]
        joined = torch.cat(parts, axis) if key in ("output", "x", "context") else sum(parts)
        torch.testing.assert_close(joined, whole, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", LAYERS)
def test_shards_give_what_one_process_gives(name, given):
    assert_equal(name, [rank[name] for rank in given])


def test_a_copy_talks_to_the_same_ranks(given):
    assert_equal("encoder", [rank["copy"] for rank in given])


def test_compiled_in_one_graph(given):
    assert_equal("encoder", [rank["compiled"] for rank in given])


@pytest.mark.parametrize("how", ["replicated", "sharded weights"])
def test_under_data_parallel_wrappers_all_ranks_get_the_mean_of_all_shares(how, given):
    # Each of the two has the mean of both shares: together that is the whole.
    assert_equal("encoder", [rank[how] for rank in given])


@pytest.fixture
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_every_attention_layer_inside_gets_the_group_and_loses_it(world_of_one):
    module = nn.Sequential(EncoderBlock(8, EfficientAttention(8)), MultiresolutionAttention(8, 2))
    layers = [layer for layer in module.modules() if isinstance(layer, ShardedPositions)]
    assert [type(layer) for layer in layers] == [EfficientAttention, MultiresolutionHeads]
    assert [layer.group for layer in layers] == [None, None]
    assert shard_positions(module, world_of_one) is module
    assert all(layer.group is world_of_one for layer in layers)
    assert all(layer.group is world_of_one for layer in copy.deepcopy(module).modules() if hasattr(layer, "group"))
    assert not any("group" in key or "held" in key for key in module.state_dict())
    shard_positions(module, None)
    assert [layer.group for layer in layers] == [None, None]


def test_a_pickle_has_all_positions_again(world_of_one, tmp_path):
    network = SequenceClassifier(11, 5, 23, attention=lambda dim: EfficientAttention(dim), dim=6)
    for module in (
        EfficientAttention(8),
        EfficientAttention2d(8),
        MultiresolutionAttention(8, 2),
        EncoderBlock(8, EfficientAttention(8)),
        network.shard_positions(world_of_one),
    ):
        shard_positions(module, world_of_one)
        torch.save(module, tmp_path / "layer.pt")
        for other in (
            torch.load(tmp_path / "layer.pt", weights_only=False),
            pickle.loads(pickle.dumps(module)),
        ):
            groups = [layer.group for layer in other.modules() if isinstance(layer, ShardedPositions)]
            assert groups
            assert not any(groups)
        held = [layer.group for layer in module.modules() if isinstance(layer, ShardedPositions)]
        assert all(group is world_of_one for group in held)
    tokens = torch.randint(1, 11, (2, 17))
    other = copy.deepcopy(network)
    assert other._part is network._part is not None
    other = pickle.loads(pickle.dumps(network))
    assert other._part is None
    torch.testing.assert_close(other.eval()(tokens), network.eval()(tokens))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (SoftmaxAttention(8), "got SoftmaxAttention at 1; use"),
        (NonLocalAttention2d(8), "got NonLocalAttention2d at 1; use"),
        (nn.TransformerEncoderLayer(8, 2), "got MultiheadAttention at 1.self_attn; use"),
    ],
)
def test_softmax_attention_is_refused_and_nothing_is_changed(other, said, world_of_one):
    module = nn.Sequential(EfficientAttention(8), other)
    with pytest.raises(ValueError, match=f"must not contain softmax attention, .*{said}"):
        shard_positions(module, world_of_one)
    assert module[0].group is None
    with pytest.raises(ValueError, match="got SoftmaxAttention; use EfficientAttention"):
        shard_positions(SoftmaxAttention(8), world_of_one)


def test_a_module_without_attention_is_refused():
    with pytest.raises(ValueError, match=r"must contain an attention layer of lineara\.nn, got Linear without one"):
        shard_positions(nn.Linear(3, 5), None)


def test_a_wrong_group_is_refused():
    with pytest.raises(ValueError, match=r"group must be None until torch\.distributed is initialized"):
        shard_positions(EfficientAttention(8), object())


def test_what_is_no_module_is_refused_in_one_sentence():
    with pytest.raises(TypeError, match=r"^module must be a torch\.nn\.Module, got int; pass a network or a layer$"):
        shard_positions(3, None)
