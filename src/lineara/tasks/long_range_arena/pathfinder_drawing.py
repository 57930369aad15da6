"""One Pathfinder drawing: two contours that are whole, distractors where there is room, and two discs."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.pathfinder_board import (
    SEED_ANGLES,
    SIZE,
    Board,
    PathfinderDrawing,
    board_of,
    disc_of,
    reduced,
)

_Bytes = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]

_BENCHMARK = PathfinderDrawing()
_PADDLE_TRIES = 3
_DISTRACTOR_TRIES = 5
# Of the benchmark's drawings, one attempt in 25 ends well.
_HOPELESS_TRIES = 20_000


@dataclass(frozen=True)
class Layout:
    """What is drawn, before it is.

    Args:
        targets, distractors: contours, each a list of paddles (y, x, kind). The first paddle of a contour leads from
            its pixel onwards, any other one ends at its pixel; `kind` numbers `Board.paddles`.
        markers: centres (y, x) of the discs.
    """

    targets: list[list[tuple[int, int, int]]]
    distractors: list[list[tuple[int, int, int]]]
    markers: list[tuple[int, int]]


def draw_image(rng: np.random.Generator, label: int, drawing: PathfinderDrawing = _BENCHMARK) -> _Bytes:
    """One drawing, (32, 32) uint8, with both discs on one contour (label 1) or on one each (label 0).

    Raises:
        ValueError: the label is neither, or the contours of the drawing do not fit the image.
    """
    if label not in (0, 1):
        raise ValueError(f"label must be 0 or 1, got {label}")
    return _render(lay_out(rng, label, drawing), drawing)


def lay_out(rng: np.random.Generator, label: int, drawing: PathfinderDrawing) -> Layout:
    """Grow the contours; the label decides on nothing but which end the second disc lies on."""
    board = board_of(drawing)
    for _ in range(_HOPELESS_TRIES):
        if targets := _grow_targets(board, rng):
            break
    else:
        raise ValueError(f"two contours must fit {SIZE} x {SIZE} pixels, got none that do for {drawing}")
    solid, touched = _union((board.edge, board.edge), *(contour.taken() for contour in targets))
    distractors: list[_Contour] = []
    for _ in range(drawing.num_distractors):
        for _ in range(_DISTRACTOR_TRIES):
            if distractor := _grow_distractor(board, solid, touched, rng):
                distractors.append(distractor)
                solid, touched = _union((solid, touched), distractor.taken())
                break
    first = int(rng.random() * 2)
    second = first if label else 1 - first
    return Layout(
        [contour.paddles() for contour in targets],
        [contour.paddles() for contour in distractors],
        [board.coordinates(targets[first].pixels[0]), board.coordinates(targets[second].pixels[-1])],
    )


def _grow_targets(board: Board, rng: np.random.Generator) -> "tuple[_Contour, _Contour] | None":
    distance = board.drawing.seed_distance
    middle = SIZE - 4 * distance
    y, x = (2 * distance + int(rng.random() * middle) for _ in range(2))
    one = _Contour(board, board.pixel(y, x), int(rng.random() * SEED_ANGLES))
    angle = 2 * math.pi * rng.random()
    beside = board.pixel(y + round(distance * math.sin(angle)), x + round(distance * math.cos(angle)))
    other = _Contour(board, beside, int(rng.random() * SEED_ANGLES))
    for _ in range(board.drawing.contour_len - 1):
        for growing, standing in ((one, other), (other, one)):
            # As published, the newest paddle of the other one is in nobody's way: the two can cross where both grow.
            if not growing.extend(standing.solid | board.edge, standing.touched | board.edge, rng):
                return None
    if one.last[0] & other.last[0]:  # a disc on one end would lie on both
        return None
    return one, other


def _grow_distractor(board: Board, solid: int, touched: int, rng: np.random.Generator) -> "_Contour | None":
    """Begin anywhere where there is room for the first paddle, in a direction drawn before."""
    kind = int(rng.random() * SEED_ANGLES)
    blocked = board.edge
    for offset in board.paddles[kind].offsets:
        blocked |= touched >> offset if offset > 0 else touched << -offset
    free = board.pixels_outside(blocked)
    if not len(free):
        return None
    contour = _Contour(board, int(free[int(rng.random() * len(free))]), kind)
    for _ in range(board.drawing.distractor_len - 1):
        if not contour.extend(solid, touched, rng):
            return None
    return contour


def _union(*taken: tuple[int, int]) -> tuple[int, int]:
    solid = touched = 0
    for more_solid, more_touched in taken:
        solid |= more_solid
        touched |= more_touched
    return solid, touched


class _Contour:
    """A growing contour. A paddle may come near to the last one of its own, so what that takes is kept apart."""

    def __init__(self, board: Board, pixel: int, kind: int) -> None:
        self.board = board
        self.pixels = [pixel]
        self.kinds = [kind]
        self.pivot = pixel + board.paddles[kind].step
        self.solid = self.touched = 0  # by all paddles but the last
        self.last = board.taken_at(pixel, kind)

    def extend(self, solid: int, touched: int, rng: np.random.Generator) -> bool:
        """Add a paddle clear of what is taken by others and by all of its own but the last; False if there is none."""
        board = self.board
        solid |= self.solid
        blocked = board.dilated(touched | self.touched)
        total, ends = 0.0, list[tuple[float, int, int]]()
        for offset, kind, weight in board.paddles[self.kinds[-1]].turns:
            if not blocked >> (self.pivot + offset) & 1:
                total += weight
                ends.append((total, self.pivot + offset, kind))
        for _ in range(_PADDLE_TRIES if ends else 0):
            draw = total * rng.random()
            _, pixel, kind = next(end for end in ends if draw < end[0])
            taken = board.taken_at(pixel, kind)
            if not taken[0] & solid:
                self.solid, self.touched = _union((self.solid, self.touched), self.last)
                self.last = taken
                self.pixels.append(pixel)
                self.kinds.append(kind)
                self.pivot += board.paddles[kind].step
                return True
        return False

    def taken(self) -> tuple[int, int]:
        return self.solid | self.last[0], self.touched | self.last[1]

    def paddles(self) -> list[tuple[int, int, int]]:
        return [(*self.board.coordinates(pixel), kind) for pixel, kind in zip(self.pixels, self.kinds)]


def _render(layout: Layout, drawing: PathfinderDrawing) -> _Bytes:
    board = board_of(drawing)
    canvas = np.zeros((board.width, board.width), np.float32)
    for contours, contrast in (
        (layout.targets, drawing.target_contrast),
        (layout.distractors, drawing.distractor_contrast),
    ):
        for y, x, kind in (paddle for contour in contours for paddle in contour):
            _lighten(canvas, y + board.border_width, x + board.border_width, contrast * board.paddles[kind].stamp)
    large = disc_of(drawing.marker_radius, drawing.antialias)
    disc = reduced(large, len(large) // drawing.antialias)
    for y, x in layout.markers:
        _lighten(canvas, y + board.border_width, x + board.border_width, disc)
    image = canvas[board.border_width : -board.border_width, board.border_width : -board.border_width]
    return np.rint(image * (255 / image.max())).astype(np.uint8)


def _lighten(canvas: _Floats, y: int, x: int, stamp: _Floats) -> None:
    reach = len(stamp) // 2
    part = canvas[y - reach : y + reach + 1, x - reach : x + reach + 1]
    np.maximum(part, stamp, out=part)
