"""What the attention suite holds measurements against: the targets on an H200, and the best of the others."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from attention.contenders import EAGER_AND_COMPILED, SDPA
from attention.rows import Row
from attention.shapes import Shape, shape_of

# Elements of the output from which on memory's speed is the measure.
LARGE = 64 * 2**20
OURS = "lineara"
_Found = tuple[str, bool] | None


@dataclass(frozen=True)
class Verdict:
    """One target: what it asks, what was found, and `"met"`, `"missed"` or `"not measured"`."""

    target: str
    found: str
    verdict: str


class Measurements:
    """The measured rows of one dtype on one machine, to be asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if row.measured]
        self._found = {(row.contender, row.shape, row.pass_name): row for row in self.rows}

    def get(self, contender: str, shape: Shape, pass_name: str) -> Row | None:
        return self._found.get((contender, shape, pass_name))

    def best(self, contenders: Iterable[str], shape: Shape, pass_name: str) -> Row | None:
        """The fastest of several."""
        rows = [row for name in contenders if (row := self.get(name, shape, pass_name))]
        return min(rows, key=seconds_of, default=None)

    def of(self, contender: str, pass_name: str) -> list[Row]:
        rows = [row for row in self.rows if (row.contender, row.pass_name) == (contender, pass_name)]
        return sorted(rows, key=lambda row: (row.shape.all_heads, row.key_dim, row.positions))

    def ratio(self, others: Iterable[str], shape: Shape, pass_name: str) -> tuple[float, Row, Row] | None:
        """How many times as long the best of the others takes as ours; ours; theirs."""
        ours, theirs = self.get(OURS, shape, pass_name), self.best(others, shape, pass_name)
        return None if ours is None or theirs is None else (seconds_of(theirs) / seconds_of(ours), ours, theirs)


def seconds_of(row: Row) -> float:
    """The median of a measured row."""
    if row.seconds is None:
        raise ValueError(f"row must be measured, got one of status {row.status!r}")
    return row.seconds


def verdicts(measurements: Measurements) -> list[Verdict]:
    """Every target with what was found; `lineara`, the implementation that users get, is judged."""
    wide_head = shape_of(1, 65536, 256)
    checks: list[tuple[str, Callable[[Measurements], _Found]]] = [
        ("forward reaches 85 % of the copy from 64 Mi elements on", lambda m: _worst_large(m, "forward", 0.85)),
        ("backward reaches 75 % of the copy from 64 Mi elements on", lambda m: _worst_large(m, "backward", 0.75)),
        (
            f"one wide head ({wide_head}) reaches 60 % of the copy, forward",
            lambda m: _fraction([row for row in m.of(OURS, "forward") if row.shape == wide_head], 0.6),
        ),
        *(
            (f"{least:g} x the best dot-product attention, 32 heads of 64, {length:,} positions, forward", against)
            for length, least in ((512, 1.0), (4096, 15.0), (16384, 60.0))
            for against in [_times_sdpa(length, least)]
        ),
        ("never slower than the best of eager and compiled from 1,024 positions on", _never_slower),
    ]
    answers = ((target, find(measurements)) for target, find in checks)
    return [
        Verdict(target, "", "not measured") if found is None else Verdict(target, found[0], judged(found[1]))
        for target, found in answers
    ]


def judged(met: bool) -> str:
    return "met" if met else "missed"


def large(rows: Sequence[Row]) -> list[Row]:
    """Those of at least 64 Mi elements."""
    return [row for row in rows if row.shape.elements >= LARGE]


def crossover(measurements: Measurements, lengths: Sequence[Shape], pass_name: str) -> int | None:
    """The number of positions from which on ours beats the best dot-product attention at every measured length."""
    first: int | None = None
    for shape in sorted(lengths, key=lambda shape: shape.positions):
        found = measurements.ratio(SDPA, shape, pass_name)
        if found is None:
            continue
        if found[0] < 1:
            first = None
        elif first is None:
            first = shape.positions
    return first


def _worst_large(measurements: Measurements, pass_name: str, least: float) -> _Found:
    return _fraction(large(measurements.of(OURS, pass_name)), least)


def _fraction(rows: Sequence[Row], least: float) -> _Found:
    """The row of the lowest fraction."""
    found = [(row.fraction_of_copy, row) for row in rows if row.fraction_of_copy is not None]
    if not found:
        return None
    lowest, row = min(found, key=lambda pair: pair[0])
    which = f", the lowest of {len(found)} shapes ({row.shape})" if len(found) > 1 else ""
    return f"{lowest:.1%}{which}", lowest >= least


def _times_sdpa(positions: int, least: float) -> Callable[[Measurements], _Found]:
    def find(measurements: Measurements) -> _Found:
        found = measurements.ratio(SDPA, shape_of(32, positions, 64), "forward")
        return found and (f"{found[0]:.3g} x {found[2].contender}", found[0] >= least)

    return find


def _never_slower(measurements: Measurements) -> _Found:
    shapes = {(row.shape, row.pass_name) for row in measurements.rows if row.positions >= 1024}
    ratios = [found for key in shapes if (found := measurements.ratio(EAGER_AND_COMPILED, *key))]
    if not ratios:
        return None
    lowest, ours, theirs = min(ratios, key=lambda found: found[0])
    where = f"{ours.shape}, {ours.pass_name}"
    slower = sum(ratio < 1 for ratio, *_ in ratios)
    return f"at worst {lowest:.2f} x {theirs.contender} ({where}); slower in {slower} of {len(ratios)}", lowest >= 1
