"""Errors of disparities: by hand, and against another computation of each protocol."""

from math import isnan

import numpy as np
import pytest
import torch

from lineara.tasks.stereo_depth.metrics import PROTOCOLS, StereoScores, protocol_named

INF, NAN = float("inf"), float("nan")


def scores(protocol, images, *, maximum=192, batch=1):
    """Of (prediction, truth, valid), each (height, width)."""
    metric = StereoScores(protocol, maximum)
    for first in range(0, len(images), batch):
        some = images[first : first + batch]
        columns = [torch.stack([torch.as_tensor(image[i]) for image in some]) for i in range(3)]
        metric.update(*columns, [f"frame {first + i}" for i in range(len(some))])
    return metric.compute()


def row(prediction, truth, valid=None):
    truth = torch.tensor([truth], dtype=torch.float32)
    valid = torch.ones_like(truth, dtype=torch.bool) if valid is None else torch.tensor([valid])
    return torch.tensor([prediction], dtype=torch.float32), truth, valid


def test_the_measures_by_hand():
    # Errors 0.5, 2, 4 (of 100: under 5 %), 4 (of 20), 10 (of 100); the last pixel has no truth.
    image = row([10.5, 32.0, 104.0, 16.0, 90.0, 7.0], [10.0, 30.0, 100.0, 20.0, 100.0, 3.0], [True] * 5 + [False])
    for protocol in PROTOCOLS:
        found = scores(protocol, [image])
        assert (found["epe"], found["over_1px"], found["over_3px"], found["d1"]) == (4.1, 0.8, 0.6, 0.4)
        assert (found["frames"], found["frames_without_valid_pixels"]) == (1, 0)


def test_limits_are_exceeded_not_reached():
    # Of 60, 3 pixels are 5 %; of 80, 4 are.
    image = row([11.0, 63.0, 84.0], [10.0, 60.0, 80.0])
    found = scores("default", [image])
    assert (found["over_1px"], found["over_3px"], found["d1"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 0)


def test_five_per_cent_of_a_negative_truth():
    # Errors 4 and 6; 5 % are 5.
    found = scores("psmnet", [row([-96.0, -94.0], [-100.0, -100.0])])
    assert (found["over_3px"], found["d1"]) == (1, 0.5)


# Of each truth: counts in default, psmnet, gwcnet, raft.
TRUTHS = {
    5.0: (True, True, True, True),
    191.9: (True, True, True, True),
    192.0: (False, False, False, False),
    500.0: (False, False, False, False),
    0.0: (False, True, False, True),
    -7.0: (False, True, False, True),
    -192.0: (False, True, False, False),
    -500.0: (False, True, False, False),
    INF: (False, False, False, False),
    -INF: (False, False, False, False),
    NAN: (False, False, False, False),
}


@pytest.mark.parametrize("number", range(4))
def test_which_truths_count(number):
    protocol = list(PROTOCOLS.values())[number]
    assert protocol.name == ("default", "psmnet", "gwcnet", "raft")[number]
    truth = torch.tensor([list(TRUTHS)])
    expected = [counts[number] for counts in TRUTHS.values()]
    assert protocol.counted(truth, torch.ones_like(truth, dtype=torch.bool)).tolist() == [expected]
    assert not protocol.counted(truth, torch.zeros_like(truth, dtype=torch.bool)).any()
    # The limit is the network's.
    assert protocol.counted(
        torch.tensor([[63.9, 64.0]]), torch.ones(1, 2, dtype=torch.bool), max_disparity=64
    ).tolist()[0] == [True, False]
    found = scores(protocol.name, [row([0.0] * len(TRUTHS), list(TRUTHS))])
    errors = [abs(truth) for truth, counts in TRUTHS.items() if counts[number]]
    assert found["epe"] == pytest.approx(np.mean(np.float32(errors), dtype=np.float64), rel=1e-12)


def test_means_over_pixels_images_and_groups():
    # 1 pixel of error 9 in the first image, 3 of error 1 in the second one.
    images = [row([19.0, 0, 0], [10.0, INF, INF]), row([11.0, 11, 11], [10.0, 10, 10])]
    found = scores("default", images)
    assert (found["epe"], found["epe_per_image"]) == (3.0, 5.0)
    assert (found["over_3px"], found["over_3px_per_image"]) == (0.25, 0.5)
    assert set(found) == {
        *(f"{name}{end}" for name in ("epe", "over_1px", "over_3px", "d1") for end in ("", "_per_image")),
        *("frames", "frames_without_valid_pixels", "beyond_max_disparity"),
    }
    assert scores("psmnet", images)["epe"] == 3.0  # a group of two
    for protocol in ("gwcnet", "raft"):
        found = scores(protocol, images)
        assert found["epe"] == 5.0
        assert not any(name.endswith("_per_image") for name in found)


def test_groups_of_eight_images():
    # The first 8: one image with 2 pixels of error 8, 7 with one of error 1, so 23 / 9. Then 3 more of error 4.
    images = [row([18.0, 18], [10.0, 10]), *[row([11.0, 0], [10.0, INF])] * 7, *[row([14.0, 0], [10.0, INF])] * 3]
    for batch in (1, 2, 5, 8, 11):
        assert scores("psmnet", images, batch=batch)["epe"] == pytest.approx((23 / 9 + 4) / 2, rel=1e-12)
    assert scores("psmnet", images[:8])["epe"] == pytest.approx(23 / 9, rel=1e-12)
    # An image without pixels takes its place in a group; a group without is left out.
    empty = row([5.0, 5], [INF, INF])
    moved = [*images[:7], empty, images[7]]
    assert scores("psmnet", moved)["epe"] == pytest.approx((22 / 8 + 1) / 2, rel=1e-12)
    found = scores("psmnet", [empty] * 8 + images[:8])
    assert found["epe"] == pytest.approx(23 / 9, rel=1e-12)
    assert (found["frames"], found["frames_without_valid_pixels"]) == (16, 8)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_images_without_valid_pixels_are_counted_and_left_out(protocol):
    good = row([12.0, 10.0], [10.0, 10.0])
    empty = [row([1.0, NAN], [INF, 900.0]), row([1.0, 2.0], [5.0, 5.0], [False, False])]
    with_empty, without = scores(protocol, [empty[0], good, empty[1]]), scores(protocol, [good])
    assert with_empty == without | {
        **{"frames": 3, "frames_without_valid_pixels": 2},
        "beyond_max_disparity": 1 / 3,
    }
    nothing = scores(protocol, empty)
    assert (nothing.pop("frames"), nothing.pop("frames_without_valid_pixels")) == (2, 2)
    assert nothing.pop("beyond_max_disparity") == 1.0
    assert all(isnan(value) for value in nothing.values())


def test_gwcnet_leaves_out_images_that_are_mostly_out_of_range():
    truths = np.full(100, 300.0, np.float32)
    truths[:9] = 10.0
    mostly_far = row([12.0] * 100, truths.tolist())
    good = row([11.0] * 100, [10.0] * 100)
    found = scores("gwcnet", [mostly_far, good])
    assert (found["epe"], found["frames_without_valid_pixels"]) == (1.0, 1)
    truths[9] = 10.0  # a tenth
    assert scores("gwcnet", [row([12.0] * 100, truths.tolist()), good])["epe"] == 1.5
    assert scores("default", [mostly_far, good])["epe_per_image"] == 1.5


def random_images(number=19):
    random = np.random.default_rng(0)
    images = []
    for _ in range(number):
        truth = random.uniform(-30, 260, (13, 17)).astype(np.float32)
        truth[random.random(truth.shape) < 0.1] = np.inf
        valid = (random.random(truth.shape) < 0.8) & np.isfinite(truth)
        images.append(((truth + random.normal(0, 6, truth.shape)).astype(np.float32), truth, valid))
    images[3] = (np.zeros((13, 17), np.float32), *images[3][1:2], np.zeros((13, 17), bool))
    return images


RULES = {
    "default": lambda t: (t > 0) & (t < 192),
    "psmnet": lambda t: t < 192,
    "gwcnet": lambda t: (t > 0) & (t < 192),
    "raft": lambda t: np.abs(t) < 192,
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_another_computation_agrees(protocol):
    pixels = []
    for prediction, truth, valid in random_images():
        counted = valid & RULES[protocol](truth)
        error = np.abs(prediction[counted].astype(np.float64) - truth[counted])
        bad = (error > 3) & (error / np.abs(truth[counted]) > 0.05)
        pixels.append(np.stack([error, error > 1, error > 3, bad], axis=1))  # (n, 4)
    of_images = np.mean([some.mean(0) for some in pixels if len(some)], axis=0)
    of_pixels = np.concatenate(pixels).mean(0)
    of_groups = np.mean([np.concatenate(pixels[i : i + 8]).mean(0) for i in (0, 8, 16)], axis=0)
    expected = {"default": of_pixels, "psmnet": of_groups, "gwcnet": of_images, "raft": of_images}[protocol]
    found = scores(protocol, random_images(), batch=3)
    names = ("epe", "over_1px", "over_3px", "d1")
    assert [found[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-9)
    if protocol == "default":
        assert [found[f"{name}_per_image"] for name in names] == pytest.approx(of_images.tolist(), rel=1e-9)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_states_of_several_processes_add_up(protocol):
    images = random_images(16)
    whole, one, other = (StereoScores(protocol, 192) for _ in range(3))
    for number, image in enumerate(images):
        arguments = *(torch.as_tensor(part)[None] for part in image), ["frame"]
        whole.update(*arguments)
        (one if number < 8 else other).update(*arguments)
    # As torchmetrics gathers them from another process.
    theirs = iter([getattr(other, name) for name in one._reductions])
    one.sync(dist_sync_fn=lambda ours, group: [ours, next(theirs)], distributed_available=lambda: True)
    one._computed = None
    assert one._update_count == 8
    states = {name: getattr(one, name).clone() for name in one._reductions}
    one.unsync()
    for name, state in states.items():
        assert state.dtype == getattr(one, name).dtype
        setattr(one, name, state)
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-12)
    whole.reset()
    whole.update(*arguments)
    assert whole.compute()["frames"] == 1


def test_low_precision_is_summed_exactly():
    truth = torch.full((1, 97, 89), 10.0)
    metric = StereoScores()
    metric.update(
        torch.full_like(truth, 10.5, dtype=torch.bfloat16), truth, torch.ones_like(truth, dtype=torch.bool), "a"
    )
    assert metric.compute()["epe"] == 0.5


def test_a_prediction_that_is_no_number_is_refused_where_it_counts():
    prediction, truth, valid = (part[None] for part in row([NAN, 10.0], [10.0, INF]))
    with pytest.raises(ValueError, match=r"^a predicted disparity must be finite, got one of frame A that is not; has"):
        StereoScores().update(prediction, truth, valid, ["frame A"])
    StereoScores().update(prediction.flip(-1), truth, valid, ["frame A"])


def test_arguments_that_do_not_fit_are_refused():
    one = torch.zeros(1, 3, 5)
    valid = one.bool()
    with pytest.raises(ValueError, match=r"alike, got \(1, 3, 4\), \(1, 3, 5\) and \(1, 3, 5\)$"):
        StereoScores().update(one[..., 1:], one, valid, ["a"])
    with pytest.raises(ValueError, match=r"alike, got \(3, 5\), \(3, 5\) and \(3, 5\)$"):
        StereoScores().update(one[0], one[0], valid[0], ["a"])
    with pytest.raises(ValueError, match=r"^names must be as many as the 1 images, got 2$"):
        StereoScores().update(one, one, valid, ["a", "b"])
    with pytest.raises(ValueError, match=r"^protocol must be one of default, psmnet, gwcnet, raft, got 'kitti'$"):
        StereoScores("kitti")
    with pytest.raises(ValueError, match=r"^max_disparity must be at least 1 pixel, got 0$"):
        StereoScores(max_disparity=0)


def seen_and_returned(name, height, width):
    """What a network is given of a frame, and what comes back of a map of its positions."""
    protocol, seen = protocol_named(name), []

    def network(left, right):
        assert left.shape == right.shape
        seen.append(left)
        return left[:, 0]

    view = 1 + torch.arange(float(height * width)).reshape(1, 1, height, width).expand(1, 3, -1, -1)
    cut = protocol.cut(view)
    return seen, cut, protocol.predict(network, cut, cut)


def test_psmnet_pads_zeros_at_the_top_and_the_right():
    seen, cut, returned = seen_and_returned("psmnet", 29, 37)
    assert seen[0].shape == (1, 3, 32, 48)
    assert torch.equal(seen[0][..., 3:, :37], cut)
    assert seen[0][..., :3, :].abs().sum() == seen[0][..., 37:].abs().sum() == 0
    assert torch.equal(returned, cut[:, 0])


def test_raft_repeats_the_edges_on_all_sides():
    seen, cut, returned = seen_and_returned("raft", 29, 43)
    assert seen[0].shape == (1, 3, 32, 64)
    assert torch.equal(seen[0][..., 1:30, 10:53], cut)
    assert torch.equal(seen[0][0, 0, 0, 10:53], cut[0, 0, 0])
    assert (seen[0][0, 0, 1:30, :10] == cut[0, 0, :, :1]).all()
    assert (seen[0][0, 0, 1:30, 53:] == cut[0, 0, :, -1:]).all()
    assert torch.equal(returned, cut[:, 0])


def test_gwcnet_sees_the_lower_right_part():
    seen, cut, returned = seen_and_returned("gwcnet", 540, 967)
    assert seen[0].shape == (1, 3, 512, 960)
    assert cut[0, 0, 0, 0] == 1 + 28 * 967 + 7
    assert cut[0, 0, -1, -1] == 540 * 967
    assert torch.equal(returned, cut[:, 0])
    small = torch.zeros(1, 3, 19, 967)
    assert protocol_named("gwcnet").cut(small).shape == (1, 3, 19, 960)


@pytest.mark.parametrize(("name", "size"), [("default", (29, 37)), ("psmnet", (32, 48)), ("raft", (32, 64))])
def test_frames_that_fit_are_not_padded(name, size):
    seen, cut, returned = seen_and_returned(name, *size)
    assert torch.equal(seen[0], cut)
    assert cut.shape[-2:] == size
    assert torch.equal(returned, cut[:, 0])
