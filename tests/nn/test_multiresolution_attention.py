"""Multiresolution attention as layers: for sequences, and for feature maps."""

import copy

import pytest
import torch

from lineara.nn import (
    AdaMRA,
    EfficientAttention,
    EfficientAttention2d,
    EfficientAttention3d,
    MultiresolutionAttention,
    MultiresolutionAttention2d,
)
from lineara.nn.multiresolution_attention import MultiresolutionAttention3d

SIZES = {"key_dim": 15, "value_dim": 33, "dtype": torch.float64}  # 3 heads of 5 key and 11 value channels


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def made(**options):
    return MultiresolutionAttention(7, 3, **SIZES, **options)


def made_2d(**options):
    return MultiresolutionAttention2d(7, 3, **SIZES, **options)


def sequence(positions=17, batch=2):
    return torch.randn(batch, positions, 7, dtype=torch.float64)


def test_the_papers_name_is_the_same_layer():
    assert AdaMRA is MultiresolutionAttention


def test_one_head_is_efficient_attention_with_the_same_weights():
    layer = MultiresolutionAttention(7, 1, **SIZES)
    efficient = EfficientAttention(7, 1, **SIZES)
    efficient.load_state_dict(layer.state_dict())
    x, context = sequence(), sequence(19)
    assert torch.equal(layer(x, context), efficient(x, context))


def test_resolution_one_without_routing_is_efficient_attention_with_heads():
    layer, efficient = made(resolutions=(1, 1, 1), routing=None), EfficientAttention(7, 3, **SIZES)
    efficient.load_state_dict(layer.state_dict())
    x = sequence()
    mask = torch.rand(2, 17) > 0.3
    torch.testing.assert_close(layer(x, key_mask=mask), efficient(x, key_mask=mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("compression", ["mean", "max", "conv"])
def test_gradients_reach_every_weight(top_k, compression):
    layer = made(top_k=top_k, compression=compression)
    layer(sequence(101)).square().sum().backward()
    for name, weight in layer.named_parameters():
        reached = weight.grad is not None and (weight.grad != 0).any()
        # A softmax over positions does not see what is added to all of them.
        assert reached == (name != "key.bias") or weight.grad.abs().max() < 1e-9, name


def test_only_the_chosen_heads_of_a_query_contribute():
    layer, x = made(), sequence()
    before = layer(x)
    choice = layer.last_routing.choice[..., 0]  # (2, 17)
    with torch.no_grad():
        layer.output.weight[:, :11] += 1.0  # head 0
    changed = (layer(x) != before).any(dim=2)
    assert torch.equal(changed, choice == 0)
    assert changed.any()
    assert not changed.all()


def test_padding_changes_neither_output_nor_statistics():
    layer, x = made(top_k=2), sequence()
    padded = torch.cat([x, torch.full((2, 5, 7), torch.nan, dtype=torch.float64)], dim=1)
    expected = layer(x)
    routing = layer.last_routing
    given = layer(padded, key_mask=(torch.arange(22) < 17).expand(2, -1))
    torch.testing.assert_close(given[:, :17], expected)
    torch.testing.assert_close(layer.last_routing.load, routing.load)
    torch.testing.assert_close(layer.last_routing.load_balancing, routing.load_balancing)


def test_cross_attention_takes_windows_of_the_context_and_counts_every_query():
    layer = MultiresolutionAttention(7, 3, context_dim=13, **SIZES)
    x, context = sequence(), torch.randn(2, 19, 13, dtype=torch.float64)
    mask = torch.zeros(2, 19, dtype=torch.bool)
    mask[:, :8] = True
    given = layer(x, context, key_mask=mask)
    torch.testing.assert_close(given, layer(x, context[:, :8]))
    torch.testing.assert_close(layer.last_routing.load.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_copies_and_saved_weights_know_nothing_of_the_last_call():
    layer, x = made(compression="conv"), sequence()
    expected = layer(x)
    other = copy.deepcopy(layer)
    assert other.last_routing is None
    assert torch.equal(other(x), expected)
    assert not any("last" in name for name in layer.state_dict())
    fresh = made(compression="conv")
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)


def test_it_shows_its_settings():
    text = str(made(top_k=2, compression="max"))
    for part in ("dim=7, num_heads=3", "resolutions=(4, 2, 1), compression='max', feature_map='softmax'", "top_k=2"):
        assert part in text


# A router where it matters.


def test_a_router_learns_to_choose_by_the_query_and_does_not_collapse():
    """Targets come from a coarse head for one half of the queries, and from a fine one for the other half.

    The router starts undecided; with load balancing at its usual weight, queries of the two halves part.
    """
    teacher = MultiresolutionAttention(8, 2, resolutions=(16, 1))
    layer = MultiresolutionAttention(8, 2, resolutions=(16, 1))
    kind = torch.tensor([1.0] * 8) * 2.0
    with torch.no_grad():
        teacher.query.weight.copy_(torch.eye(8))
        teacher.heads.router.logits.weight.copy_(torch.stack([kind, -kind]))
        teacher.value.weight.mul_(4.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(300):
        x = torch.randn(16, 32, 8) + torch.where(torch.rand(16, 32, 1) > 0.5, 1.0, -1.0)
        with torch.no_grad():
            target = teacher(x)
        loss = (layer(x) - target).square().mean() + 0.01 * layer.last_routing.load_balancing
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    theirs, ours = teacher.last_routing, layer.last_routing
    assert (theirs.load > 0.3).all()
    assert (ours.load > 0.02).all()
    agreement = (theirs.choice == ours.choice).float().mean()
    assert max(agreement, 1 - agreement) > 0.85  # the heads may change places


# Feature maps.


def test_windows_of_a_map_are_squares():
    """A map constant over 4 x 4 squares loses nothing to windows of 4 x 4; shifted by a pixel, it does."""
    layer = made_2d(resolutions=(4, 4, 4), routing=None)
    fine = made_2d(resolutions=(1, 1, 1), routing=None)
    fine.load_state_dict(layer.state_dict())
    squares = torch.randn(2, 7, 3, 2, dtype=torch.float64)
    x = squares.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (2, 7, 12, 8)
    torch.testing.assert_close(layer(x), fine(x))
    assert not torch.allclose(layer(x.roll(1, 3)), fine(x.roll(1, 3)))


def test_without_routing_at_resolution_one_a_map_gets_efficient_attention():
    layer, efficient = made_2d(resolutions=(1, 1, 1), routing=None), EfficientAttention2d(7, 3, **SIZES)
    efficient.load_state_dict(layer.state_dict())
    x, context = (torch.randn(2, 7, *size, dtype=torch.float64) for size in ((5, 11), (3, 13)))
    torch.testing.assert_close(layer(x, context), efficient(x, context))


def test_a_volume_is_seen_in_cubes():
    sizes = {"num_heads": 3, **SIZES, "routing": None}
    layer = MultiresolutionAttention3d(7, resolutions=(2, 2, 2), **sizes)
    fine = MultiresolutionAttention3d(7, resolutions=(1, 1, 1), **sizes)
    fine.load_state_dict(layer.state_dict())
    efficient = EfficientAttention3d(7, 3, **SIZES)
    efficient.load_state_dict(layer.state_dict())
    cubes = torch.randn(2, 7, 2, 3, 2, dtype=torch.float64)
    x = cubes.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)  # (2, 7, 4, 6, 4)
    torch.testing.assert_close(layer(x), fine(x))
    torch.testing.assert_close(efficient(x), fine(x))
    for axis in (2, 3, 4):
        assert not torch.allclose(layer(x.roll(1, axis)), fine(x.roll(1, axis)))
    routed = MultiresolutionAttention3d(7, 3, **SIZES)
    assert routed(torch.randn(1, 7, 3, 5, 2, dtype=torch.float64)).shape == (1, 7, 3, 5, 2)
    assert routed.last_routing.choice.shape == (1, 30, 1)


@pytest.mark.parametrize("compression", ["mean", "max", "conv"])
def test_a_map_of_any_size_keeps_its_shape_and_every_pixel_routes(compression):
    layer = made_2d(compression=compression)
    x = torch.randn(2, 7, 5, 11, dtype=torch.float64)
    assert layer(x).shape == x.shape
    assert layer.last_routing.choice.shape == (2, 55, 1)
    layer(x).sum().backward()
    assert all(weight.grad is not None for weight in layer.parameters())


def test_maps_of_any_size_compile_into_one_graph():
    torch._dynamo.reset()
    layer = made_2d()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((5, 11), (7, 13)):
        x = torch.randn(2, 7, *size, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


def test_transposed_maps_give_transposed_results_for_mean_and_max():
    x = torch.randn(2, 7, 6, 9, dtype=torch.float64)
    for compression in ("mean", "max"):
        layer = made_2d(compression=compression)
        torch.testing.assert_close(layer(x.mT), layer(x).mT)
