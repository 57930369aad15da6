"""What every layer for feature maps and volumes keeps to."""

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from lineara.nn import (
    EfficientAttention1d,
    EfficientAttention2d,
    EfficientAttention3d,
    MultiresolutionAttention2d,
)
from lineara.nn.multiresolution_attention import MultiresolutionAttention3d
from lineara.nn.non_local_attention import NonLocalAttention2d, NonLocalAttention3d

DIM, HEADS = 7, 6
SIZES = {"key_dim": 30, "value_dim": 66, "dtype": torch.float64}  # heads of 5 key and 11 value channels
POSITIONS = {1: (17,), 2: (5, 11), 3: (2, 3, 5)}
OTHER_POSITIONS = {1: (13,), 2: (3, 7), 3: (5, 2, 7)}
KINDS = {
    "EfficientAttention1d": (EfficientAttention1d, 1),
    "EfficientAttention2d": (EfficientAttention2d, 2),
    "EfficientAttention3d": (EfficientAttention3d, 3),
    "NonLocalAttention2d": (NonLocalAttention2d, 2),
    "NonLocalAttention3d": (partial(NonLocalAttention3d, normalization="softmax"), 3),
    "MultiresolutionAttention2d": (partial(MultiresolutionAttention2d, resolutions=(4, 2, 3, 1, 2, 1)), 2),
    "MultiresolutionAttention3d": (partial(MultiresolutionAttention3d, resolutions=(3, 2, 3, 1, 2, 1)), 3),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(kind, **options):
    return KINDS[kind][0](DIM, HEADS, **{**SIZES, **options})


def maps(kind, positions=POSITIONS, dtype=torch.float64, batch=2):
    return torch.randn(batch, DIM, *positions[KINDS[kind][1]], dtype=dtype)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_zero_init_it_starts_as_the_identity_and_learns(kind, dtype):
    layer = make(kind, zero_init=True, dtype=dtype)
    x, context = maps(kind, dtype=dtype), maps(kind, OTHER_POSITIONS, dtype)
    assert torch.equal(layer(x), x)
    output = layer(x, context)
    assert torch.equal(output, x)
    output.square().sum().backward()
    assert layer.reprojection.weight.grad.abs().max() > 0
    assert layer.values.weight.abs().max() > 0  # only the reprojection starts at zero
    assert not torch.equal(make(kind, dtype=dtype)(x), x)


@EVERY_KIND
def test_items_of_a_batch_do_not_see_each_other(kind):
    layer, x, context = make(kind), maps(kind), maps(kind, OTHER_POSITIONS)
    mask = torch.rand(2, *context.shape[2:]) < 0.6
    together = layer(x, context, key_mask=mask)
    for i in range(2):
        torch.testing.assert_close(together[i, None], layer(x[i, None], context[i, None], key_mask=mask[i, None]))


@EVERY_KIND
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 1e300])
def test_maps_of_several_sizes_are_padded_into_one_batch(kind, hidden):
    """Each gives, where it is, what it gives alone, whatever the padding holds."""
    layer, axes = make(kind), KINDS[kind][1]
    shapes = (POSITIONS[axes], OTHER_POSITIONS[axes])
    alone = [torch.randn(1, DIM, *shape, dtype=torch.float64) for shape in shapes]
    largest = tuple(map(max, *shapes))
    x = torch.full((2, DIM, *largest), hidden, dtype=torch.float64)
    mask = torch.zeros(2, *largest, dtype=torch.bool)
    for i, (own, shape) in enumerate(zip(alone, shapes)):
        where = tuple(slice(size) for size in shape)
        x[(i, slice(None), *where)] = own[0]
        mask[(i, *where)] = True
    given = layer(x, key_mask=mask)
    across = layer(x.masked_fill(~mask[:, None], 0.0), x, key_mask=mask)  # the context's mask alone
    for i, (own, shape) in enumerate(zip(alone, shapes)):
        where = (i, slice(None), *(slice(size) for size in shape))
        expected = layer(own)[0]
        torch.testing.assert_close(given[where], expected)
        torch.testing.assert_close(across[where], expected)


def test_padding_is_not_counted_among_the_choices_of_queries():
    layer = make("MultiresolutionAttention2d")
    x = maps("MultiresolutionAttention2d")
    layer(x)
    expected = layer.last_routing
    padded = torch.nn.functional.pad(x, (0, 2, 0, 3), value=torch.nan)
    layer(padded, key_mask=~padded[:, 0].isnan())
    torch.testing.assert_close(layer.last_routing.load, expected.load)
    torch.testing.assert_close(layer.last_routing.load_balancing, expected.load_balancing)
    layer(x, padded, key_mask=~padded[:, 0].isnan())  # of the context: every query counts
    torch.testing.assert_close(layer.last_routing.load, expected.load)


@EVERY_KIND
def test_a_map_without_valid_positions_gives_itself_and_the_bias(kind):
    layer, x = make(kind), maps(kind)
    mask = torch.ones(2, *x.shape[2:], dtype=torch.bool)
    mask[1] = False
    output = layer(x, key_mask=mask)
    torch.testing.assert_close(
        output[1] - x[1], layer.reprojection.bias.view(-1, *(1,) * (x.dim() - 2)).expand_as(x[1])
    )
    torch.testing.assert_close(output[:1], layer(x[:1]))


@EVERY_KIND
@pytest.mark.parametrize("num_key_heads", [1, 3])
def test_heads_of_keys_serve_groups_of_heads_of_queries(kind, num_key_heads):
    options, whole = {}, {}
    if kind.startswith("Multiresolution"):
        options = {"resolutions": (3, 1, 2)[:num_key_heads]}
        whole = {"resolutions": np.repeat(options["resolutions"], 6 // num_key_heads)}
    layer, other = make(kind, num_key_heads=num_key_heads, **options), make(kind, **whole)
    state = layer.state_dict()
    for name, width in (("keys", 5), ("values", 11)):
        assert len(state[f"{name}.weight"]) == num_key_heads * width
        for part in ("weight", "bias"):
            heads = state[f"{name}.{part}"].unflatten(0, (num_key_heads, width))
            state[f"{name}.{part}"] = heads.repeat_interleave(6 // num_key_heads, 0).flatten(0, 1)
    other.load_state_dict(state)
    x, context = maps(kind), maps(kind, OTHER_POSITIONS)
    torch.testing.assert_close(layer(x, context), other(x, context))
    assert f"num_key_heads={num_key_heads}" in repr(layer)
    assert "num_key_heads" not in repr(other)


class LowRank(nn.Module):
    """A convolution and a product of two, as libraries put it in its place."""

    def __init__(self, base):
        super().__init__()
        kind = type(base)
        self.base = base
        self.down = kind(base.in_channels, 2, 1, dtype=base.weight.dtype)
        self.up = kind(2, base.out_channels, 1, dtype=base.weight.dtype)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Channels(nn.Module):
    """A linear map of the channels."""

    def __init__(self, base):
        super().__init__()
        self.linear = nn.Linear(base.in_channels, base.out_channels, dtype=base.weight.dtype)

    def forward(self, x):
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


@EVERY_KIND
@pytest.mark.parametrize(
    "wrap", [LowRank, lambda base: nn.Sequential(Channels(base), nn.Identity()), lambda base: base]
)
def test_whatever_stands_in_place_of_a_convolution_works_without_items_or_positions(kind, wrap):
    layer, seen = make(kind), []
    for name in ("queries", "keys", "values", "reprojection"):
        setattr(layer, name, wrap(getattr(layer, name)))
        getattr(layer, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    shapes = [(0, *maps(kind).shape[1:]), (2, *maps(kind).shape[1:-1], 0), (0, *maps(kind).shape[1:-1], 0)]
    for shape in shapes:
        layer.zero_grad()
        seen.clear()
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        output = layer(x)
        output.sum().backward()
        assert output.shape == x.grad.shape == shape
        assert seen == ["queries", "keys", "values", "reprojection"]
        for name, parameter in layer.named_parameters():
            # (Dot products with no key at all do not know of keys and values.)
            unknown = parameter.grad is None and kind.startswith("NonLocal") and name.startswith(("keys", "values"))
            assert unknown or (parameter.grad == 0).all(), name
    assert layer(maps(kind)).isfinite().all()


@pytest.mark.parametrize("kind", ["EfficientAttention2d", "MultiresolutionAttention2d"])
def test_it_is_exported_for_every_size(kind):
    layer = make(kind).eval()
    sizes = {axis: torch.export.Dim(name, min=2, max=1 << 10) for axis, name in ((2, "height"), (3, "width"))}
    exported = torch.export.export(layer, (maps(kind),), dynamic_shapes={"x": sizes}).module()
    for shape in ((2, 2), (5, 11), (64, 61)):
        x = torch.randn(2, DIM, *shape, dtype=torch.float64)
        torch.testing.assert_close(exported(x), layer(x))


@EVERY_KIND
def test_copies_and_pickles_compute_the_same(kind):
    layer, x = make(kind, zero_init=True), maps(kind)
    nn.init.ones_(layer.reprojection.weight)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


# What it says.


@EVERY_KIND
def test_maps_of_another_shape_or_kind_are_refused(kind):
    layer, x, axes = make(kind), maps(kind), KINDS[kind][1]
    names = ", ".join(("depth", "height", "width")[-axes:]) if axes > 1 else "length"
    for wrong in (x[0], x[None], x[:, :5]):
        got = rf"\(batch, 7, {names}\), got \({', '.join(map(str, wrong.shape))}\)$"
        with pytest.raises(ValueError, match=f"^x must have the shape {got}"):
            layer(wrong)
        with pytest.raises(ValueError, match=f"^context must have the shape {got}"):
            layer(x, wrong)
    for wrong, sentence in (
        (x.tolist(), r"x must be a torch\.Tensor, got list$"),
        (x.int(), r"x must be float64, .* got torch\.int32; convert it with x\.float\(\)$"),
        (
            torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged),
            "x must not be a nested tensor; pad the maps to one size, and say with",
        ),
    ):
        with pytest.raises(TypeError, match=f"^{sentence}"):
            layer(wrong)


@EVERY_KIND
def test_a_wrong_mask_is_refused(kind):
    layer, x = make(kind), maps(kind)
    with pytest.raises(ValueError, match=r"^key_mask must have the shape \(batch, .*\) = \(2, .*, got \(2, \d+\)$"):
        layer(x, key_mask=torch.ones(2, x[0, 0].numel() + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^key_mask must be boolean .* got torch\.float32; write key_mask == 0 for"):
        layer(x, key_mask=torch.ones(2, *x.shape[2:]))
    with pytest.raises(ValueError, match=r"^x and key_mask must be on the same device, got cpu and meta; move one"):
        layer(x, key_mask=torch.ones(2, *x.shape[2:], dtype=torch.bool, device="meta"))


@EVERY_KIND
def test_wrong_arguments_are_refused_under_the_name_of_the_layer(kind):
    with pytest.raises(TypeError, match=rf"^{kind}\.__init__\(\) got an unexpected keyword argument 'heads'"):
        make(kind, heads=3)
    with pytest.raises(TypeError, match=rf"^{kind}\.__init__\(\) missing 1 required positional argument: 'dim'"):
        KINDS[kind][0]()
    with pytest.raises(TypeError, match=rf"^{kind}\.forward\(\) got an unexpected keyword argument 'mask'"):
        make(kind)(maps(kind), mask=None)
    with pytest.raises(ValueError, match=r"^impl must be one of .*'streaming'.*, got 'fast'"):
        make(kind, impl="fast")


@EVERY_KIND
def test_numbers_of_numpy_are_numbers(kind):
    layer = make(kind, key_dim=np.int64(30), value_dim=np.uint16(66), scale=np.float64(0.5))
    assert "key_dim=30, value_dim=66" in repr(layer)
    assert "scale=0.5" in repr(layer)
    with pytest.raises(TypeError, match=r"^num_key_heads must be an integer, got True$"):
        make(kind, num_key_heads=True)
