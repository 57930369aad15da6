import math

import numpy as np
import pytest

from lineara.tasks.long_range_arena.pathfinder_board import SEED_ANGLES, PathfinderDrawing, board_of, disc_of, reduced

HARD = PathfinderDrawing()


@pytest.mark.parametrize(
    ("contour_len", "distractor_len", "num_distractors"), [(6, 2, 10), (9, 3, 6), (14, 4, 5), (3, 1, 20)]
)
def test_distractors_are_a_third_as_long_and_share_twenty_paddles(contour_len, distractor_len, num_distractors):
    drawing = PathfinderDrawing(contour_len=contour_len)
    assert (drawing.distractor_len, drawing.num_distractors) == (distractor_len, num_distractors)


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("contour_len", 2, "3..32"),
        ("contour_len", 33, "3..32"),
        ("paddle_len", 0, "1..8"),
        ("margin", 0, "1..4"),
        ("padding", 0, "1..8"),
        ("seed_distance", 0, "1..7"),
        ("seed_distance", 8, "1..7"),
        ("antialias", 0, "1..8"),
        ("distractor_paddles", -1, "0..200"),
        ("marker_radius", 0, "0.5..8"),
        ("continuity", 0, "0.1..10"),
        ("continuity", math.nan, "0.1..10"),
        ("target_contrast", 0, "0.1..10"),
        ("distractor_contrast", 11, "0.1..10"),
    ],
)
def test_settings_out_of_range_are_refused(name, value, bounds):
    with pytest.raises(ValueError, match=rf"^{name} must lie in {bounds}, got {value}$"):
        PathfinderDrawing(**{name: value})


@pytest.mark.parametrize(("thickness", "antialias"), [(0.5, 1), (0.75, 2), (0.25, 2)])
def test_a_line_is_a_whole_number_of_pixels_before_it_is_reduced(thickness, antialias):
    with pytest.raises(ValueError, match=f"whole number, at least 1, got {thickness * antialias}$"):
        PathfinderDrawing(thickness=thickness, antialias=antialias)


def place(board, y, x):
    return y * board.width + x


def test_the_ends_of_paddles_lie_on_a_circle_around_the_pivot():
    board = board_of(HARD)
    circle = {(y, x) for y in range(-5, 6) for x in range(-5, 6) if abs(math.hypot(y, x) - 3) < 0.5}
    ends = {offset for paddle in board.paddles for offset, _, _ in paddle.turns}
    assert ends == {place(board, y, x) for y, x in circle}
    assert len(board.paddles) == SEED_ANGLES + len(circle)


@pytest.mark.parametrize("continuity", [1.0, 1.8])
def test_turns_are_weighted_by_the_squared_cosine(continuity):
    board = board_of(PathfinderDrawing(continuity=continuity))
    paddle = board.paddles[30]  # towards 30 degrees: x goes right, y down
    expected = {}
    for y in range(-3, 4):
        for x in range(-3, 4):
            turned = abs(math.degrees(math.atan2(y, x)) - 30) * continuity
            if abs(math.hypot(y, x) - 3) < 0.5 and min(turned, 360 * continuity - turned) < 90:
                expected[place(board, y, x)] = math.cos(math.radians(turned)) ** 2
    assert {offset: weight for offset, _, weight in paddle.turns} == pytest.approx(expected)
    assert max(weight for _, _, weight in paddle.turns) > 0.85


def test_a_paddle_is_drawn_from_its_pixel_and_takes_a_margin_around():
    board = board_of(HARD)
    stamp, reach = board.paddles[0].stamp, board.reach  # to the right
    lit = np.argwhere(stamp > 0.2) - reach
    assert set(lit[:, 0]) == {0}
    assert lit[:, 1].min() == 0
    assert lit[:, 1].max() == HARD.paddle_len
    [end] = [kind for offset, kind, _ in board.paddles[0].turns if offset == place(board, 0, 3)]
    # The one that ends there comes from the left.
    np.testing.assert_array_equal(board.paddles[end].stamp, stamp[:, ::-1])
    for paddle in board.paddles:
        assert not paddle.solid & ~paddle.touched
        cells = {(y, x) for y, x in (np.argwhere(paddle.stamp > 0.35) - reach).tolist()}
        around = {place(board, y, x) for y, x in cells}
        assert all(paddle.touched >> (board.middle + offset) & 1 for offset in around)


def test_moved_bits_and_offsets_name_the_same_pixels():
    board = board_of(HARD)
    for kind in (0, 77, SEED_ANGLES + 5):
        pixel = board.pixel(11, 17)
        solid, _ = board.taken_at(pixel, kind)
        assert solid == sum(1 << pixel + offset for offset in board.paddles[kind].offsets)


def test_the_edge_is_all_but_the_inside_and_pixels_keep_their_coordinates():
    board = board_of(PathfinderDrawing(padding=3))
    inside = [board.coordinates(pixel) for pixel in board.pixels_outside(board.edge)]
    assert inside == [(y, x) for y in range(3, 29) for x in range(3, 29)]


def test_a_dilated_pixel_is_a_disc():
    board = board_of(PathfinderDrawing(margin=2))
    y, x = np.mgrid[-3:4, -3:4]
    disc = np.argwhere(y**2 + x**2 <= 4) - 3
    pixel = board.pixel(13, 7)
    assert board.dilated(1 << pixel) == sum(1 << pixel + place(board, y, x) for y, x in disc.tolist())


def test_reducing_keeps_the_area_of_a_disc():
    large = disc_of(6.0, 4)
    assert large.shape == (52, 52)
    assert large.sum() / 16 == pytest.approx(math.pi * 36, rel=0.02)
    small = reduced(large, 13)
    assert small.sum() == pytest.approx(math.pi * 36, rel=0.02)
    assert small[6, 6] == 1
    assert small[0, 0] == 0
