"""The report of the attention suite: times and memory, held against a copy, dot-product attention and PyTorch."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from attention.contenders import EAGER_AND_COMPILED, NAMES, SAME, SDPA
from attention.rows import Row
from attention.shapes import PAPER_COUNTS, PASSES, Shape
from attention.targets import LARGE, OURS, Measurements, crossover, large, seconds_of, verdicts

_EXPLANATION = """\
Shapes are batch x heads x positions x channels per head. Times are medians of single calls as a user meets them,
launches included; in brackets the tenth and the ninetieth percentile. The calls of all contenders alternate in random
order, over so many sets of inputs that they do not stay in the cache of a GPU. "Device" is the median without the
launches, which were queued while the device was busy with something else. A fraction of the copy is the smallest
possible traffic (forward 4 tensors: query, key, value, output; backward 7; together 11) over the time, divided by the
bandwidth of a large copy in the same run, bytes read and written. Before it was timed, every contender of the same
formula agreed with the reference, in its output and in the gradients of its pass."""


def attention_report(rows: Sequence[Row]) -> str:
    """Markdown of one section for each device, machine, dtype and state of sources and versions among the rows.

    Raises:
        ValueError: for no rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one case, got none")
    parts = ["# Efficient attention against others", _EXPLANATION]
    for _, group in groupby(sorted(rows, key=_setting), key=_setting):
        parts += _sections(list(group))
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(rows: Sequence[Row]) -> list[str]:
    measurements = Measurements(rows)
    parts = [f"## {rows[0].machine}, {rows[0].dtype}, sources {rows[0].code}", _provenance(rows)]
    if not measurements.rows:
        return [*parts, _not_run(rows)]
    if rows[0].device == "cuda":
        parts += ["### Targets", "Set for an NVIDIA H200 in bfloat16.", _targets(measurements)]
    parts += [*_fractions(measurements), *_against_sdpa(measurements), *_against_eager(measurements)]
    parts += [*_memory(measurements), "### The paper's two places", _paper(measurements)]
    parts += ["### All times", *_all_times(measurements), _not_run(rows)]
    return parts


def _setting(row: Row) -> tuple[str, ...]:
    """What rows must share to be held against each other."""
    return (row.device, row.machine, row.dtype, row.code, row.versions)


def _provenance(rows: Sequence[Row]) -> str:
    lines = [f"- {rows[0].versions}."]
    for (date, commit), group in groupby(sorted(rows, key=_origin), key=_origin):
        found = [row for row in group if row.measured]
        copies = sorted({row.copy_bytes_per_second or 0.0 for row in found})
        reached = " and ".join(f"{copy / 1e9:,.1f}" for copy in copies) or "unknown"
        plural = "" if len(found) == 1 else "s"
        lines.append(f"- {date}, commit {commit}: {len(found)} measurement{plural}; the copy: {reached} GB/s.")
    picked = sorted({row.picked for row in rows if row.picked})
    if picked:
        lines.append(f"- `{OURS}` is `ops.efficient_attention(impl='auto')`, which picked {' and '.join(picked)}.")
    return "\n".join(lines)


def _origin(row: Row) -> tuple[str, str]:
    return row.date, row.commit


def _targets(measurements: Measurements) -> str:
    found = verdicts(measurements)
    return table(["target", "found", "verdict"], [[one.target, one.found or "-", one.verdict] for one in found])


def _fractions(measurements: Measurements) -> list[str]:
    """The fraction of the copy: at large shapes, or at the largest one where there is none of those."""
    same = [row for row in measurements.rows if row.formula == SAME]
    chosen = large(same) or [row for row in same if row.shape.elements == max(row.shape.elements for row in same)]
    if not chosen:
        return []
    large_ones = chosen[0].shape.elements >= LARGE
    title = "shapes of at least 64 Mi elements" if large_ones else "the largest shape"
    names = _present(chosen)
    body: list[list[str]] = []
    for shape, name in _cases(chosen):
        found = [measurements.get(one, shape, name) for one in names]
        body.append([str(shape), name, *(_percent(row and row.fraction_of_copy) for row in found)])
    return [f"### Fraction of the copy, {title}", table(["shape", "pass", *names], body)]


def _against_sdpa(measurements: Measurements) -> list[str]:
    """Speed against the best dot-product attention, by families of shapes that differ in length."""
    body: list[list[str]] = []
    lines: list[str] = []
    shapes = sorted({row.shape for row in measurements.of(OURS, "forward")}, key=_by_family)
    for family, group in groupby(shapes, key=_family):
        alike = list(group)
        for name in PASSES:
            found = [(shape, measurements.ratio(SDPA, shape, name)) for shape in alike]
            for shape, ratio in found:
                if ratio:
                    best = ratio[2]
                    body.append([str(shape), name, _ms(ratio[1]), _ms(best), best.contender, f"{ratio[0]:.3g} x"])
            if sum(ratio is not None for _, ratio in found) > 1:
                first = crossover(measurements, alike, name)
                since = f"from {first:,} positions on" if first else "at none of the measured lengths"
                heads = f"{family[0] * family[1]} head{'' if family[0] * family[1] == 1 else 's'} of {family[2]}"
                lines.append(f"- {heads}, {name}: faster than dot-product attention {since}.")
    if not body:
        return []
    header = ["shape", "pass", f"{OURS}, ms", "best dot-product, ms", "which", "ratio"]
    return ["### Against dot-product attention", table(header, body), "\n".join(lines)]


def _against_eager(measurements: Measurements) -> list[str]:
    body: list[list[str]] = []
    for shape, name in _cases(measurements.rows):
        found = measurements.ratio(EAGER_AND_COMPILED, shape, name)
        if found:
            ratio, ours, best = found
            within = ours.seconds_low is not None and best.seconds_high is not None
            overlap = within and (ours.seconds_low or 0) <= (best.seconds_high or 0)
            verdict = "not slower" if ratio >= 1 else "slower, within the spread" if overlap else "slower"
            body.append([str(shape), name, _ms(ours), _ms(best), best.contender, f"{ratio:.2f} x", verdict])
    if not body:
        return []
    header = ["shape", "pass", f"{OURS}, ms", "best, ms", "which", "ratio", "verdict"]
    return ["### Against plain and compiled PyTorch", table(header, body)]


def _memory(measurements: Measurements) -> list[str]:
    rows = [row for row in measurements.rows if row.peak_bytes is not None and row.formula == SAME]
    rows = [row for row in rows if row.shape.elements >= 2**20] or rows
    if not rows:
        return []
    names = _present(rows)
    body: list[list[str]] = []
    for shape, name in _cases(rows):
        itemsize = _itemsize(rows[0].dtype)
        least = shape.least_memory(name, itemsize)
        cells: list[str] = []
        for one in names:
            row = measurements.get(one, shape, name)
            known = row is not None and row.peak_bytes is not None
            peak = (row.peak_bytes or 0) + shape.inputs_bytes(name, itemsize) if known and row else None
            cells.append("-" if peak is None else f"{peak / least:.2f}")
        body.append([str(shape), name, f"{least / 1e6:,.1f}", *cells])
    explanation = (
        "Peak, inputs included, over the bytes of inputs, output, gradients and contexts, which no implementation can "
        "do without; those in MB (10^6 bytes)."
    )
    return ["### Peak memory", explanation, table(["shape", "pass", "least, MB", *names], body)]


def _paper(measurements: Measurements) -> str:
    """Counts of whole modules beside measured operations."""
    body: list[list[str]] = []
    for count in PAPER_COUNTS:
        ours = measurements.get(OURS, count.shape, "forward")
        theirs = measurements.get("sdpa-math", count.shape, "forward")
        body.append(
            [
                count.place,
                f"{_size(count.efficient_bytes)} against {_size(count.non_local_bytes)}",
                _size(count.map_bytes),
                _measured_memory(ours),
                _measured_memory(theirs),
            ]
        )
    explanation = (
        "Counted are whole modules in float32, as arXiv 1812.01243 counts them: all tensors of the efficient one, of "
        "the non-local one, and its attention matrix alone. Measured is the operation on half as many key channels: "
        "peak memory of the forward pass beyond its inputs, and its time."
    )
    header = ["place", "counted", "matrix", f"{OURS}, measured", "dot-product with its matrix, measured"]
    return f"{explanation}\n\n{table(header, body)}"


def _all_times(measurements: Measurements) -> list[str]:
    parts: list[str] = []
    for name in PASSES:
        body: list[list[str]] = []
        rows = sorted((row for row in measurements.rows if row.pass_name == name), key=_by_shape)
        for row in rows:
            low, high = (_digits((value or 0.0) * 1e3) for value in (row.seconds_low, row.seconds_high))
            body.append(
                [
                    str(row.shape),
                    row.contender,
                    f"{_ms(row)} ({low}-{high})",
                    str(row.repeats),
                    "-" if row.device_seconds is None else _digits(row.device_seconds * 1e3),
                    _percent(row.fraction_of_copy) if row.formula == SAME else row.formula,
                    "-" if row.error is None else f"{row.error:.1e}",
                ]
            )
        if body:
            header = ["shape", "contender", "ms", "calls", "device, ms", "of the copy", "relative error"]
            parts.append(f"#### {name.capitalize()}\n\n{table(header, body)}")
    return parts


def _not_run(rows: Sequence[Row]) -> str:
    """Every reason once, with how many cases it kept from running."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        if not row.measured:
            key = (row.contender, row.status.removeprefix("not run: "))
            reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return ""
    body = [[contender, reason.replace("|", "/"), str(number)] for (contender, reason), number in reasons.items()]
    return f"### Not run\n\n{table(['contender', 'reason', 'cases'], body)}"


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Markdown, numbers to the right."""
    lines = [header, ["---"] + ["--:"] * (len(header) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _present(rows: Iterable[Row]) -> list[str]:
    found = {row.contender for row in rows}
    return [name for name in NAMES if name in found]


def _cases(rows: Iterable[Row]) -> list[tuple[Shape, str]]:
    found = {(row.shape, row.pass_name): row for row in rows}
    return sorted(found, key=lambda case: (_by_family(case[0]), PASSES.index(case[1])))


def _family(shape: Shape) -> tuple[int, ...]:
    return (shape.batch, shape.heads, shape.key_dim, shape.value_dim)


def _by_family(shape: Shape) -> tuple[int, ...]:
    return (*_family(shape), shape.positions)


def _by_shape(row: Row) -> tuple[int, ...]:
    return (*_by_family(row.shape), NAMES.index(row.contender) if row.contender in NAMES else len(NAMES))


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _measured_memory(row: Row | None) -> str:
    if row is None or row.peak_bytes is None:
        return "not measured"
    return f"{_size(row.peak_bytes)}, {_ms(row)} ms"


def _ms(row: Row) -> str:
    return _digits(seconds_of(row) * 1e3)


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    rounded = f"{value:.2e}"
    return f"{float(rounded):.{max(2 - int(rounded.partition('e')[2]), 0)}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _size(number: float) -> str:
    for unit, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= power:
            return f"{_digits(number / power)} {unit}"
    return f"{number:,.0f} bytes"
