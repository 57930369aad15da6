import math
from itertools import pairwise

import numpy as np
import pytest

from lineara.tasks.long_range_arena import pathfinder_drawing
from lineara.tasks.long_range_arena.pathfinder_board import PathfinderDrawing, board_of
from lineara.tasks.long_range_arena.pathfinder_drawing import draw_image, lay_out

EASY, HARD = PathfinderDrawing(contour_len=6), PathfinderDrawing()


def layouts(drawing, label, num):
    return [lay_out(np.random.default_rng((7, i)), label, drawing) for i in range(num)]


def distance(a, b):
    return math.hypot(a[0] - b[0], a[1] - b[1])


@pytest.mark.parametrize("drawing", [EASY, HARD], ids=["easy", "hard"])
@pytest.mark.parametrize("label", [0, 1])
def test_the_discs_lie_on_both_ends_of_one_contour_or_on_one_end_of_each(drawing, label):
    firsts = set()
    for layout in layouts(drawing, label, 40):
        starts = [contour[0][:2] for contour in layout.targets]
        ends = [contour[-1][:2] for contour in layout.targets]
        first, second = starts.index(layout.markers[0]), ends.index(layout.markers[1])
        assert (first == second) == bool(label)
        firsts.add(first)
    assert firsts == {0, 1}


def test_the_label_changes_nothing_but_the_second_disc():
    for one, other in zip(layouts(HARD, 0, 10), layouts(HARD, 1, 10)):
        assert (one.targets, one.distractors, one.markers[0]) == (other.targets, other.distractors, other.markers[0])
        assert one.markers[1] != other.markers[1]


@pytest.mark.parametrize("drawing", [EASY, HARD], ids=["easy", "hard"])
def test_targets_are_whole_and_start_at_their_distance_from_each_other(drawing):
    nums = set()
    for layout in layouts(drawing, 1, 40):
        assert [len(contour) for contour in layout.targets] == [drawing.contour_len] * 2
        assert {len(contour) for contour in layout.distractors} <= {drawing.distractor_len}
        assert len(layout.distractors) <= drawing.num_distractors
        nums.add(len(layout.distractors))
        starts = [contour[0] for contour in layout.targets]
        assert distance(*starts) == pytest.approx(drawing.seed_distance, abs=0.75)
        assert all(14 <= along < 18 for along in starts[0][:2])
    assert max(nums) == drawing.num_distractors


def test_neighbours_on_a_contour_are_one_step_apart_and_turn_by_less_than_a_right_angle():
    for layout in layouts(HARD, 1, 20):
        for contour in (*layout.targets, *layout.distractors):
            ends = [paddle[:2] for paddle in contour[1:]]
            steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(ends)]
            # From an end on to the next pivot, about 1, and from there by 3, less than 90 degrees apart.
            assert all(3 < math.hypot(*step) < 4.6 for step in steps)


def solids(board, contour):
    return [board.taken_at(board.pixel(y, x), kind)[0] for y, x, kind in contour]


def test_paddles_stay_clear_of_the_edge_and_of_what_was_drawn_before():
    board = board_of(HARD)
    for layout in layouts(HARD, 1, 20):
        targets = [solids(board, contour) for contour in layout.targets]
        distractors = [solids(board, contour) for contour in layout.distractors]
        for contour in (*targets, *distractors):
            assert not any(paddle & board.edge for paddle in contour[1:])
            # Neighbours on a contour may touch.
            assert not any(a & b for i, a in enumerate(contour) for b in contour[i + 2 :])
        for i, contour in enumerate(distractors):
            others = [paddle for other in (*targets, *distractors[:i]) for paddle in other]
            assert not any(a & b for a in contour for b in others)
        # The contours grow in turns, and what is newest on each may meet, but at the end.
        one, other = targets
        assert not any(a & b for i, a in enumerate(one) for j, b in enumerate(other) if abs(i - j) > 1)
        assert not one[-1] & other[-1]


def brightest(image, y, x):
    return image[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()


@pytest.mark.parametrize("label", [0, 1])
def test_discs_and_paddles_are_where_the_layout_has_them(label):
    for i in range(20):
        layout = lay_out(np.random.default_rng((7, i)), label, HARD)
        image = draw_image(np.random.default_rng((7, i)), label, HARD)
        assert image.shape == (32, 32)
        assert image.dtype == np.uint8
        assert image.max() == 255
        for y, x in layout.markers:
            disc = image[y - 1 : y + 2, x - 1 : x + 2]
            assert (disc > 100).all()  # 3 x 3 pixels are lit nowhere else
        for contour in (*layout.targets, *layout.distractors):
            assert all(brightest(image, y, x) > 60 for y, x, _ in contour)


def test_without_discs_and_distractors_each_target_is_one_chain_of_lit_pieces(monkeypatch):
    """Walk over lit pixels, across gaps of at most 2: the end of a target that stands alone is reached."""
    drawing = PathfinderDrawing(contour_len=9, distractor_paddles=0)
    board = board_of(drawing)
    for layout in layouts(drawing, 1, 10):
        for contour in layout.targets:
            canvas = np.zeros((board.width, board.width), np.float32)
            for y, x, kind in contour:
                stamp = board.paddles[kind].stamp
                pathfinder_drawing._lighten(canvas, y + board.border_width, x + board.border_width, stamp)
            lit = {tuple(pixel) for pixel in (np.argwhere(canvas > 0.15) - board.border_width).tolist()}
            reached, edge = set(), {pixel for pixel in lit if distance(pixel, contour[0]) < 1.5}
            while edge:
                reached |= edge
                edge = {pixel for pixel in lit - reached if any(distance(pixel, other) < 3.7 for other in edge)}
            assert any(distance(pixel, contour[-1]) < 1.5 for pixel in reached)
            assert reached == lit


def test_a_stamp_lightens_and_never_darkens():
    canvas = np.full((5, 7), 0.5, np.float32)
    pathfinder_drawing._lighten(canvas, 2, 3, np.array([[0, 0, 0], [0.25, 1, 0.5], [0, 0.75, 0]], np.float32))
    assert canvas[2, 3] == 1
    assert canvas[3, 3] == 0.75
    assert canvas.sum() == 0.5 * 33 + 1.75


@pytest.mark.parametrize("label", [2, -1])
def test_another_label_is_refused(label):
    with pytest.raises(ValueError, match=f"label must be 0 or 1, got {label}"):
        draw_image(np.random.default_rng(0), label)


def test_contours_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(pathfinder_drawing, "_HOPELESS_TRIES", 50)
    with pytest.raises(ValueError, match=r"^two contours must fit 32 x 32 pixels, got none .*contour_len=32"):
        draw_image(np.random.default_rng(0), 1, PathfinderDrawing(contour_len=32, paddle_len=8))


def test_settings_change_the_drawing():
    def mean(**settings):
        drawing = PathfinderDrawing(contour_len=6, **settings)
        return np.mean([draw_image(np.random.default_rng((3, i)), 1, drawing) > 60 for i in range(20)])

    usual = mean()
    assert mean(distractor_paddles=0) < 0.8 * usual
    assert mean(marker_radius=3.0) > 1.1 * usual
    assert mean(thickness=1.0) > 1.1 * usual
