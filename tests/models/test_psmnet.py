"""PSMNet by its published size and by hand; with attention, against itself without."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from lineara.models import PSMNet
from lineara.models.pretrained import load_plain_weights
from lineara.models.psmnet import PLACES, FeaturePyramid, cost_volume, expected_disparity
from lineara.nn import EfficientAttention3d
from lineara.nn.multiresolution_attention import MultiresolutionAttention3d
from lineara.nn.non_local_attention import NonLocalAttention3d

SMALL = {"channels": 4, "num_blocks": (1, 1, 1, 1)}


def views(height=32, width=48, batch=2):
    return torch.randn(batch, 3, height, width), torch.randn(batch, 3, height, width)


def test_the_published_network_has_its_published_size():
    with torch.device("meta"):
        network = PSMNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_224_768


def test_the_volume_holds_both_views_for_every_shift():
    left, right = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 5, 7)
    for levels in (1, 4, 9):
        expected = torch.zeros(2, 6, levels, 5, 7)
        for shift in range(levels):
            for column in range(shift, 7):
                expected[:, :3, shift, :, column] = left[..., column]
                expected[:, 3:, shift, :, column] = right[..., column - shift]
        assert torch.equal(cost_volume(left, right, levels), expected)


def test_the_answer_is_the_mean_disparity_by_hand():
    scores = torch.tensor([0.0, math.log(2), math.log(5)]).reshape(1, 3, 1, 1)  # weights 1/8, 2/8, 5/8
    assert expected_disparity(scores).item() == pytest.approx(12 / 8)
    sharp = torch.zeros(1, 5, 2, 3)
    sharp[:, 3] = 200
    torch.testing.assert_close(expected_disparity(sharp), torch.full((1, 2, 3), 3.0))


@pytest.mark.parametrize("kind", [EfficientAttention3d, NonLocalAttention3d, MultiresolutionAttention3d])
@pytest.mark.parametrize("training", [True, False])
def test_with_modules_that_start_at_zero_it_is_the_plain_network(kind, training):
    plain = PSMNet(16, **SMALL)
    network = PSMNet(16, lambda dim: kind(dim, key_dim=4, zero_init=True), places=PLACES, **SMALL)
    missing, unexpected = network.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert {".".join(key.split(".")[:2]) for key in missing} == {f"attention.{place}" for place in PLACES}
    left, right = views()
    expected, found = plain.train(training)(left, right), network.train(training)(left, right)
    assert len(found) == (3 if training else 2)  # of the latter, the two pairs
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with torch.no_grad():
        network.attention["volume"].reprojection.weight.fill_(0.5)
    assert not torch.equal(network(left, right)[0], expected[0])


def test_modules_see_the_quarter_volume_in_the_order_of_the_network():
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            seen.append((self, tuple(x.shape)))
            return x

    network = PSMNet(16, lambda dim: Looking(), places=tuple(reversed(PLACES)), **SMALL).eval()
    network(*views())
    assert [module for module, _ in seen] == [network.attention[place] for place in PLACES]
    assert {shape for _, shape in seen} == {(2, 4, 4, 8, 12)}


def test_the_default_place_is_between_the_residual_block_and_the_hourglasses():
    network = PSMNet(16, lambda dim: EfficientAttention3d(dim), **SMALL).eval()
    inputs = {}
    network.hourglasses[0].register_forward_hook(lambda module, given, answer: inputs.update(hourglass=given[0]))
    network.entry.register_forward_hook(lambda module, given, answer: inputs.update(entry=answer))
    with torch.no_grad():
        network(*views())
        before = inputs["entry"] + network.residual(inputs["entry"])
        torch.testing.assert_close(inputs["hourglass"], network.attention["volume"](before))


@pytest.mark.parametrize(("height", "width", "max_disparity"), [(1, 1, 1), (17, 31, 5), (32, 48, 33), (13, 61, 192)])
def test_any_size_is_answered_at_its_size_within_the_bound(height, width, max_disparity):
    network = PSMNet(max_disparity, **SMALL).eval()
    left, right = views(height, width)
    answer = network(left, right)
    assert answer.shape == (2, height, width)
    assert answer.dtype == torch.float32
    assert answer.min() >= 0
    assert answer.max() <= max_disparity - 1
    padded = (pad(view, (0, -width % 16, -height % 16, 0)) for view in (left, right))
    assert torch.equal(network(*padded)[:, -height % 16 :, :width], answer)


def test_each_answer_of_training_has_the_size_of_the_input_and_every_weight_learns():
    network = PSMNet(16, lambda dim: EfficientAttention3d(dim), **SMALL)
    answers = network(*views(30, 44))
    assert [tuple(answer.shape) for answer in answers] == [(2, 30, 44)] * 3
    sum(answer.square().mean() for answer in answers).backward()
    for name, parameter in network.named_parameters():
        # A key's bias shifts all positions alike, which their softmax does not see.
        assert name.endswith("keys.bias") or parameter.grad.abs().max() > 0, name


def test_what_the_hourglasses_pass_on():
    network = PSMNet(16, **SMALL)
    calls = []
    for hourglass in network.hourglasses:
        hourglass.register_forward_hook(lambda module, given, answer: calls.append((given, answer)))
    network(*views())
    (first_in, first_out), (second_in, second_out), (third_in, _) = calls
    assert first_in[1:] == (None, None)
    assert second_in[1] is first_out[1]
    assert third_in[1] is first_out[1]
    assert second_in[2] is first_out[2]
    assert third_in[2] is second_out[2]
    torch.testing.assert_close(second_in[0], first_out[0] + first_in[0])
    torch.testing.assert_close(third_in[0], second_out[0] + first_in[0])


def test_costs_of_later_hourglasses_add_to_those_before():
    network = PSMNet(16, **SMALL).eval()
    with torch.no_grad():
        for head in network.heads[1:]:
            head[-1].weight.zero_()
        network.train()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm3d | nn.BatchNorm2d):
                module.eval()
        first, second, third = network(*views())
    assert torch.equal(first, second)
    assert torch.equal(first, third)


def test_the_answer_is_the_shift_at_which_the_views_match():
    # A volume of products in place of the learned costs: the largest where both views show the same.
    left = torch.nn.functional.normalize(torch.randn(1, 32, 4, 20), dim=1)
    right = left.roll(-3, dims=3)  # what is at x in the left view is at x - 3 in the right one
    volume = cost_volume(left, right, 8)
    scores = 100 * (volume[:, :32] * volume[:, 32:]).sum(dim=1)  # (B, D, height, width)
    answer = expected_disparity(scores)[..., 8:]
    torch.testing.assert_close(answer, torch.full_like(answer, 3.0), rtol=0, atol=1e-3)


def test_half_precision_keeps_the_answer_in_float32():
    network = PSMNet(16, lambda dim: EfficientAttention3d(dim), **SMALL).eval()
    left, right = views()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        answer = network(left, right)
    assert answer.dtype == torch.float32
    with torch.no_grad():
        assert (answer - network(left, right)).abs().mean() < 0.5


def test_windows_beyond_small_features_are_as_large_as_those():
    pyramid = FeaturePyramid(4, (1, 1, 1, 1)).eval()
    assert pyramid(torch.randn(1, 3, 16, 32)).shape == (1, 4, 4, 8)


def test_plain_weights_fit_all_but_the_modules(tmp_path):
    plain = PSMNet(16, **SMALL)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    network = PSMNet(16, lambda dim: EfficientAttention3d(dim), **SMALL)
    missing = load_plain_weights(network, tmp_path / "plain.pth")
    assert {name.split(".")[1] for name in missing} == {"volume"}
    assert torch.equal(network.entry[0].weight, plain.entry[0].weight)


def test_convolutions_start_as_published_and_modules_as_they_are_made():
    network = PSMNet(16, lambda dim: EfficientAttention3d(dim, zero_init=True))
    assert network.entry[0].weight.std().item() == pytest.approx(math.sqrt(2 / (27 * 32)), rel=0.05)
    assert network.features.stem[3].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 32)), rel=0.05)
    assert (network.attention["volume"].reprojection.weight == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_disparity": 0}, "^max_disparity must be at least 1, got 0$"),
        ({"places": ["middle"]}, r"^places must be a list of some of entry, volume, .*, each once, got \['middle'\]$"),
        ({"places": "volume"}, "got 'volume'$"),
        ({"places": ["volume", "volume"]}, "each once"),
        ({"channels": 0}, "^channels must be at least 1, got 0$"),
        ({"num_blocks": (3, 16, 3)}, "^num_blocks must be 4 numbers"),
        ({"num_blocks": (3, 16, 3, 0)}, "^num_blocks must be 4 numbers"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PSMNet(**options)


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 32, 48), (3, 32, 48)), ((1, 1, 32, 48), (1, 1, 32, 48)), ((1, 3, 32, 48), (1, 3, 32, 47))],
)
def test_views_of_another_shape_are_refused(left, right):
    with pytest.raises(ValueError, match=r"^left and right must both have the shape \(batch, 3, height, width\), got"):
        PSMNet(16, **SMALL)(torch.zeros(left), torch.zeros(right))


def test_a_single_pair_of_training_must_have_more_than_one_value_per_channel():
    network = PSMNet(16, **SMALL)
    sentence = (
        r"^in training the batch must hold at least 2 pairs, or crops higher or wider than 496 pixels, got 1 pair of "
        r"496 x 32 with its padding; set a larger batch size or crop size$"
    )
    with pytest.raises(ValueError, match=sentence):
        network(*views(496, 17, batch=1))
    assert len(network(*views(497, 17, batch=1))) == 3
    assert len(network(*views(32, 17, batch=2))) == 3
    assert network.eval()(*views(32, 17, batch=1)).shape == (1, 32, 17)
    # With fixed statistics one value is enough.
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            module.eval()
    assert len(network(*views(32, 17, batch=1))) == 3


def test_normalisation_over_several_processes_is_left_to_them():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(PSMNet(16, **SMALL))
    network.features.check_normalisable(1, 32, 32)
