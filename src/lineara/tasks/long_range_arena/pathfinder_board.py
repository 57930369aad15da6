"""What Pathfinder drawings are made of: their settings, the board that contours grow on, the paddles of all directions.

The board has one bit per pixel and is one Python integer: to move a shape is a shift, to look for a collision is an
`&`. It is wider than the image, so that no shape reaches beyond it.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

_Floats = npt.NDArray[np.float32]

SIZE = 32
SEED_ANGLES = 360  # directions of the first paddle of a contour
# How much of a pixel a paddle and its margin cover: so much that no other may, or that none should begin or end there.
_SOLID, _TOUCHED = 0.9, 0.3


@dataclass(frozen=True)
class PathfinderDrawing:
    """How a drawing is made; the defaults are the benchmark's hard set. A number out of range is a ValueError.

    Two target contours of `contour_len` dashes (paddles) start `seed_distance` apart, the first of them in the middle
    of the image, and grow in turns. A paddle turns by an angle a against the one before with a probability
    proportional to cos(continuity a)^2, 0 from 90 degrees on, and to 0 where its end would come too near to what is
    drawn. Then come `num_distractors` contours of `distractor_len` paddles, fewer if there is no room. The drawing is
    made `antialias` times as large and reduced, and at last its brightest pixel is made white.

    Args:
        contour_len: paddles of a target contour: 6 is easy, 9 intermediate, 14 hard.
        paddle_len: length of a paddle in pixels, at least 1.
        thickness: of a paddle in pixels; `thickness * antialias` is a whole number, at least 1.
        margin: pixels, at least 1, that are left free around a paddle.
        padding: pixels, at least 1, that are left free along the edge.
        marker_radius: radius in pixels of the discs.
        seed_distance: pixels between the starts of the target contours, 1..7.
        continuity: above 0; the higher, the straighter.
        antialias: 1 or more.
        distractor_paddles: paddles of all distractors together, at most.
        target_contrast, distractor_contrast: brightness of paddles, a disc's being 1.

    Source: Linsley et al., NeurIPS 2018, arXiv 1805.08315; settings of Tay et al., 2021, "Long Range Arena", arXiv
    2011.04006. Points fall on the nearest pixel, where the original rounds down some and up others; and what covers a
    pixel in part is taken as covering it or not.
    """

    contour_len: int = 14
    paddle_len: int = 2
    thickness: float = 0.5
    margin: int = 1
    padding: int = 1
    marker_radius: float = 1.5
    seed_distance: int = 7
    continuity: float = 1.0
    antialias: int = 2
    distractor_paddles: int = 20
    target_contrast: float = 1.5
    distractor_contrast: float = 2.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("contour_len", 3, 32),
            ("paddle_len", 1, 8),
            ("margin", 1, 4),
            ("padding", 1, 8),
            ("seed_distance", 1, (SIZE - 1) // 4),
            ("antialias", 1, 8),
            ("distractor_paddles", 0, 200),
            ("thickness", 0.125, 4),
            ("marker_radius", 0.5, 8),
            ("continuity", 0.1, 10),
            ("target_contrast", 0.1, 10),
            ("distractor_contrast", 0.1, 10),
        ):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie in {least}..{most}, got {getattr(self, name)}")
        width = self.thickness * self.antialias
        if width < 1 or width != round(width):
            raise ValueError(f"thickness times antialias must be a whole number, at least 1, got {width}")

    @property
    def distractor_len(self) -> int:
        """Paddles of a distractor."""
        return self.contour_len // 3

    @property
    def num_distractors(self) -> int:
        return self.distractor_paddles // self.distractor_len


@dataclass(frozen=True)
class Paddle:
    """A paddle of one direction, drawn from its pixel on.

    Args:
        stamp: brightness, (2 reach + 1, 2 reach + 1) with the pixel in the middle.
        solid, touched: what it takes of a board whose pixel `Board.middle` is its own.
        offsets: of the pixels of `solid`.
        step: from the pivot of this paddle to that of the next; for a first one, which has none, from its pixel.
        turns: offset from the pivot, kind and weight of every paddle that can be next.
    """

    stamp: _Floats
    solid: int
    touched: int
    offsets: list[int]
    step: int
    turns: list[tuple[int, int, float]]


class Board:
    """The image with room around it, row by row, and the paddles that can be drawn, all in whole pixels.

    A contour's pivot lies in the gap before its next paddle, whose end is one of the pixels on a circle around it. So
    there is one kind of paddle for every such pixel, drawn from its end back, after those of the first paddles.
    """

    def __init__(self, drawing: PathfinderDrawing) -> None:
        self.drawing = drawing
        length, margin = drawing.paddle_len, drawing.margin
        self.reach = length + math.ceil(drawing.thickness) + margin
        self.border_width = max(2 * length + 3 * margin, self.reach, math.ceil(drawing.marker_radius) + 1)
        self.width = SIZE + 2 * self.border_width
        self.middle = self.reach * (self.width + 1)
        inside = np.zeros((self.width, self.width), bool)
        border = self.border_width + drawing.padding
        inside[border:-border, border:-border] = True
        self.edge = self._bits(~inside)
        disc = disc_of(margin, 1)
        self.around = [offset for offset in self._offsets(disc) if offset]
        pixels = np.argwhere(np.ones((2 * (length + margin) + 1,) * 2)) - (length + margin)
        circle = [(y, x) for y, x in pixels.tolist() if abs(math.hypot(y, x) - length - margin) < 0.5]
        ends = [math.atan2(y, x) for y, x in circle]
        self.paddles = [
            self._paddle(angle, angle, length + margin, circle)
            for angle in (math.tau * turn / SEED_ANGLES for turn in range(SEED_ANGLES))
        ] + [self._paddle(angle, angle + math.pi, length + 2 * margin, circle) for angle in ends]

    def pixel(self, y: int, x: int) -> int:
        return (y + self.border_width) * self.width + x + self.border_width

    def coordinates(self, pixel: int) -> tuple[int, int]:
        y, x = divmod(pixel, self.width)
        return y - self.border_width, x - self.border_width

    def taken_at(self, pixel: int, kind: int) -> tuple[int, int]:
        paddle, shift = self.paddles[kind], pixel - self.middle
        return paddle.solid << shift, paddle.touched << shift

    def dilated(self, bits: int) -> int:
        result = bits
        for offset in self.around:
            result |= bits << offset if offset > 0 else bits >> -offset
        return result

    def pixels_outside(self, bits: int) -> npt.NDArray[np.intp]:
        size = -(-(self.width**2) // 8)
        content = np.frombuffer((bits & (1 << self.width**2) - 1).to_bytes(size, "little"), np.uint8)
        return np.flatnonzero(np.unpackbits(content, bitorder="little")[: self.width**2] == 0)

    def _paddle(self, angle: float, drawn_towards: float, step: int, circle: list[tuple[int, int]]) -> Paddle:
        stamp, cover = _rasterised(self.drawing, drawn_towards, self.reach)
        turns = []
        for end, (y, x) in enumerate(circle):
            turned = abs(math.remainder(math.atan2(y, x) - angle, math.tau)) * self.drawing.continuity
            if turned < math.pi / 2 - 1e-9:
                turns.append((y * self.width + x, SEED_ANGLES + end, math.cos(turned) ** 2))
        y, x = _rounded(step, angle)
        return Paddle(
            stamp,
            self._bits(cover >= _SOLID),
            self._bits(cover >= _TOUCHED),
            self._offsets(cover >= _SOLID),
            y * self.width + x,
            turns,
        )

    def _bits(self, shape: npt.NDArray[np.bool_]) -> int:
        """A shape of odd width as bits of a board, its middle on `self.middle` unless it is as large as the board."""
        return sum(1 << offset for offset in (np.argwhere(shape) @ [self.width, 1]).tolist())

    def _offsets(self, shape: npt.NDArray[np.bool_]) -> list[int]:
        return ((np.argwhere(shape) - len(shape) // 2) @ [self.width, 1]).tolist()


@cache
def board_of(drawing: PathfinderDrawing) -> Board:
    return Board(drawing)


def _rounded(distance: float, angle: float) -> tuple[int, int]:
    return round(distance * math.sin(angle)), round(distance * math.cos(angle))


def disc_of(radius: float, scale: int) -> npt.NDArray[np.bool_]:
    """A disc in the middle of the smallest odd number of pixels that holds it, each divided into `scale` squared."""
    size = 2 * math.ceil(radius) + 1
    along = (np.arange(size * scale) + 0.5) / scale - size / 2
    return along[:, None] ** 2 + along**2 <= radius**2


def _rasterised(drawing: PathfinderDrawing, angle: float, reach: int) -> tuple[_Floats, _Floats]:
    """A paddle from the middle of (2 reach + 1) squared pixels towards an angle: its brightness, its cover."""
    scale = drawing.antialias
    # Not (2 reach + 1) * scale: the line begins in the middle of a pixel, drawn large as well as reduced.
    size, middle = 2 * reach * scale + 1, reach * scale
    y, x = _rounded(drawing.paddle_len * scale, angle)
    large = Image.new("L", (size, size))
    width = round(drawing.thickness * scale)
    ImageDraw.Draw(large).line([(middle, middle), (middle + x, middle + y)], fill=1, width=width)
    line = np.array(large, bool)
    cover = np.zeros_like(line)
    disc = disc_of(drawing.margin * scale, 1)
    around = len(disc) // 2
    for y, x in np.argwhere(line):
        cover[y - around : y + around + 1, x - around : x + around + 1] |= disc
    return reduced(line, 2 * reach + 1), reduced(cover, 2 * reach + 1)


def reduced(shape: npt.NDArray[np.bool_], size: int) -> _Floats:
    """A shape drawn large, at (size, size) pixels: how much of each it covers, by a Lanczos filter, 0..1."""
    large = Image.fromarray(shape.astype(np.uint8) * 255)
    return np.array(large.resize((size, size), Image.Resampling.LANCZOS), np.float32) / np.float32(255)
