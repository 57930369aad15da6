"""Random changes of a frame: both views, truth and mask move together, so that the truth stays true."""

import pytest
import torch

from lineara.tasks.stereo_depth.frames import Frame
from lineara.tasks.stereo_depth.transforms import Augmentation, colours, mirrored, normalised

HEIGHT, WIDTH = 19, 29


def world(shift=3):
    """A wall with a texture: both truths are `shift`, and valid where the other view has the pixel."""
    texture = torch.randint(0, 256, (3, HEIGHT, WIDTH + shift), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    columns = torch.arange(WIDTH).expand(HEIGHT, WIDTH)
    truth = torch.full((HEIGHT, WIDTH), float(shift))
    # Column x of the left view is at x - shift in the right one.
    return Frame(
        left=texture[..., :WIDTH],
        right=texture[..., shift:],
        disparity=truth,
        valid=columns >= shift,
        right_disparity=truth.clone(),
        right_valid=columns < WIDTH - shift,
    )


def assert_true(frame):
    """Every valid pixel has the colour of its partner in the right view."""
    rows, columns = frame.valid.nonzero(as_tuple=True)
    assert len(rows) > 0
    partners = columns - frame.disparity[rows, columns].long()
    inside = partners >= 0  # not where a crop has cut it off
    assert inside.any()
    assert torch.equal(frame.left[:, rows[inside], columns[inside]], frame.right[:, rows[inside], partners[inside]])


def test_the_world_itself_is_true():
    frame = world()
    assert_true(frame)
    with pytest.raises(AssertionError):
        assert_true(Frame(frame.right, frame.left, frame.disparity, frame.valid))


def test_a_mirrored_frame_is_true_and_its_views_have_changed_places():
    frame = world()
    frame.disparity[~frame.valid] = 77
    frame.right_disparity[~frame.right_valid] = 99
    other = mirrored(frame)
    assert_true(other)
    assert torch.equal(other.disparity, frame.right_disparity.flip(-1))
    assert torch.equal(other.valid, frame.right_valid.flip(-1))
    assert torch.equal(other.left, frame.right.flip(-1))
    assert torch.equal(other.right, frame.left.flip(-1))
    again = mirrored(other)
    assert all(torch.equal(value, vars(frame)[name]) for name, value in vars(again).items())


@pytest.mark.parametrize(
    "options", [{}, {"vertical_flip": 1.0}, {"swap_views": 1.0}, {"vertical_flip": 0.5, "swap_views": 0.5}]
)
def test_crops_are_true_wherever_they_lie(options):
    change = Augmentation(crop_height=7, crop_width=11, **options)
    torch.manual_seed(0)
    crops = [change(world()) for _ in range(40)]
    for crop in crops:
        assert crop.left.shape == crop.right.shape == (3, 7, 11)
        assert crop.disparity.shape == crop.valid.shape == (7, 11)
        assert_true(crop)
    assert len({tuple(crop.left.flatten().tolist()) for crop in crops}) > 30


def positions(**options):
    """Upper left corners of crops, by a map of positions."""
    frame = Frame(
        *(torch.zeros(3, 5, 8, dtype=torch.uint8),) * 2, torch.arange(40.0).reshape(5, 8), torch.ones(5, 8).bool()
    )
    torch.manual_seed(0)
    return [change.disparity[0, 0].item() for change in (Augmentation(**options)(frame) for _ in range(300))]


def test_every_place_of_a_crop_comes_and_none_beyond():
    corners = {8.0 * row + column for row in range(3) for column in range(6)}
    assert set(positions(crop_height=3, crop_width=3)) == corners
    assert set(positions(crop_height=5, crop_width=8)) == {0.0}


def test_half_of_the_frames_are_turned_if_asked_for():
    turned = positions(crop_height=5, crop_width=8, vertical_flip=0.5)
    assert set(turned) == {0.0, 32.0}
    assert 110 < turned.count(32.0) < 190
    assert set(positions(crop_height=5, crop_width=8, vertical_flip=1.0)) == {32.0}


def test_a_frame_that_is_only_cropped_keeps_its_colours():
    frame = world()
    change = Augmentation(crop_height=HEIGHT, crop_width=WIDTH)
    changed = change(frame)
    assert all(torch.equal(value, vars(frame)[name]) for name, value in vars(changed).items())


JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}


def test_colours_change_alike_in_both_views_unless_asked_otherwise():
    frame = world(0)  # both views are the same
    torch.manual_seed(0)
    alike = [Augmentation(HEIGHT, WIDTH, **JITTER)(frame) for _ in range(10)]
    assert all(torch.equal(changed.left, changed.right) for changed in alike)
    assert not any(torch.equal(changed.left, frame.left) for changed in alike)
    assert len({tuple(changed.left.flatten().tolist()) for changed in alike}) == 10
    separate = [Augmentation(HEIGHT, WIDTH, **JITTER, separate_colours=1.0)(frame) for _ in range(10)]
    assert not any(torch.equal(changed.left, changed.right) for changed in separate)
    mixed = [Augmentation(HEIGHT, WIDTH, **JITTER, separate_colours=0.5)(frame) for _ in range(60)]
    assert 15 < sum(torch.equal(changed.left, changed.right) for changed in mixed) < 45
    assert torch.equal(alike[0].disparity, frame.disparity)
    assert frame.left.dtype == alike[0].left.dtype == torch.uint8


@pytest.mark.parametrize("name", JITTER)
def test_each_change_of_colours_is_an_argument(name):
    torch.manual_seed(0)
    changed = Augmentation(HEIGHT, WIDTH, **{name: JITTER[name]})(world(0))
    assert not torch.equal(changed.left, world(0).left)
    assert torch.equal(changed.left, changed.right)


def test_colours_are_normalised_by_imagenets_and_back():
    image = torch.tensor([0, 128, 255], dtype=torch.uint8).reshape(3, 1, 1).repeat(1, 2, 3)
    found = normalised(image)
    expected = [(0 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225]
    assert found.dtype == torch.float32
    assert found[:, 1, 2].tolist() == pytest.approx(expected, rel=1e-5)
    frame = world()
    assert torch.equal((colours(normalised(frame.left)) * 255).round().to(torch.uint8), frame.left)
    pair = torch.stack([frame.left, frame.right])
    assert torch.equal(normalised(pair)[1], normalised(frame.right))


@pytest.mark.parametrize("size", [(20, 5), (5, 30)])
def test_a_frame_smaller_than_the_crop_is_refused(size):
    sentence = (
        rf"^must be at least as large as the crop of {size[0]} x {size[1]} pixels, got 19 x 29; set a smaller crop_"
    )
    with pytest.raises(ValueError, match=sentence):
        Augmentation(*size)(world())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"crop_height": 0}, "crop_height and crop_width must be at least 1, got 0 and 512"),
        ({"crop_width": -1}, "crop_height and crop_width must be at least 1, got 256 and -1"),
        ({"vertical_flip": 1.1}, "vertical_flip must be a probability from 0 to 1, got 1.1"),
        ({"swap_views": -0.1}, "swap_views must be a probability from 0 to 1, got -0.1"),
        ({"separate_colours": 2}, "separate_colours must be a probability from 0 to 1, got 2"),
        ({"brightness": -1}, "brightness must be a share from 0 to 1, got -1"),
        ({"contrast": 3}, "contrast must be a share from 0 to 1, got 3"),
        ({"saturation": float("nan")}, "saturation must be a share from 0 to 1, got nan"),
        ({"hue": 0.6}, "hue must be a share from 0 to 0.5, got 0.6"),
    ],
)
def test_arguments_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        Augmentation(**wrong)
