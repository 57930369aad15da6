"""`lineara bench`: the command line of the studies. What draws is handed in, because it needs more than torch."""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lineara.measure.attention import Suite
from lineara.measure.attention_report import attention_report
from lineara.measure.contenders import NAMES, SDPA, chosen
from lineara.measure.cost import cost_table, length_study, measure_costs
from lineara.measure.limits import Limits, check_device
from lineara.measure.rows import Row, RowsFile, write_text
from lineara.measure.shapes import PRESETS, Shape, preset_shapes
from lineara.measure.targets import Measurements

_DTYPES = ("bfloat16", "float16", "float32")
# What the picture shows, by the names that `viz.cost_curves` knows: of several contenders the fastest at each length.
_DRAWN = {
    "efficient": ("lineara",),
    "plain": ("eager",),
    "efficient, channels first": ("eager-map",),
    "efficient, compiled": ("compile", "compile-map"),
    "softmax": SDPA,
}
Draw = Callable[[list[dict[str, Any]], Path], object]


def bench(words: Sequence[str], *, draw: Draw, progress: Callable[[str], object]) -> None:
    """Run what the words of a command line say.

    Args:
        words: a study and its options.
        draw: called with rows for `viz.cost_curves` and the path of a picture.
        progress: called with one line of text after each case.
    """
    parser = ArgumentParser(prog="lineara bench", description="Measure what attention costs.")
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_cost(studies.add_parser("cost", help=_COST, description=_COST, formatter_class=ArgumentDefaultsHelpFormatter))
    _add_attention(studies.add_parser("attention", help=_ATTENTION, description=_ATTENTION))
    options = parser.parse_args(words)
    options.run(options, draw, progress)


_COST = "time and peak memory of efficient and dot-product attention against length"
_ATTENTION = "efficient attention against others: checked, timed, weighed, and held against a copy"


def _add_cost(parser: ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["efficient", "softmax"], help="what to measure")
    parser.add_argument("--positions", nargs="+", type=int, default=[256, 1024, 4096, 16384, 65536], help="lengths")
    parser.add_argument("--heads", type=int, default=8, help="heads")
    parser.add_argument("--head_dim", type=int, default=64, help="channels per head")
    parser.add_argument("--limit_seconds", type=float, default=60.0, help="leave out calls expected to take longer")
    parser.add_argument("--output", type=Path, default=Path("runs/cost/cost.json"), help="file to write")
    parser.set_defaults(run=_cost)


def _add_attention(parser: ArgumentParser) -> None:
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch finds it, else cpu")
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="which shapes (default quick)")
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help=f"of {', '.join(NAMES)} (default all)")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 on cuda, float32 on cpu")
    parser.add_argument("--batch", default=1, **number, help="items, with --positions (default 1)")
    parser.add_argument("--heads", default=8, **number, help="heads, with --positions (default 8)")
    parser.add_argument("--positions", nargs="+", **number, help="lengths in place of a preset")
    parser.add_argument("--head_dim", default=64, **number, help="channels per head, with --positions (default 64)")
    parser.add_argument("--limit_minutes", type=float, help="begin nothing later (default 9 on cuda, none on cpu)")
    parser.add_argument("--limit_seconds", type=float, help="of a quadratic call (default 0.25 on cuda, 20 on cpu)")
    parser.add_argument("--case_seconds", type=float, help="of repeats (default 0.2 on cuda, 5 on cpu)")
    parser.add_argument("--skip_memory", action="store_true", help="do not weigh; on a CPU that takes long")
    parser.add_argument("--output", type=Path, default=Path("runs/attention"), help="folder (default runs/attention)")
    parser.set_defaults(run=_attention)


def _cost(options: Namespace, draw: Draw, progress: Callable[[str], object]) -> None:
    cases = length_study(options.attention, options.positions, heads=options.heads, head_dim=options.head_dim)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    costs = measure_costs(cases, limit_seconds=options.limit_seconds, progress=progress)
    table = cost_table(costs)
    print(table)
    write_text(options.output.with_suffix(".md"), table + "\n")
    write_text(options.output, json.dumps([cost.as_row() for cost in costs], indent=1) + "\n")
    print(options.output)


def _attention(options: Namespace, draw: Draw, progress: Callable[[str], object]) -> None:
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_cpu = device == "cpu"
    dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    contenders = chosen(options.contenders)
    for name in ("limit_minutes", "limit_seconds", "case_seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value:g}")
    if options.positions is None:
        shapes = preset_shapes(options.preset, device)
    else:
        width = options.head_dim
        shapes = [Shape(options.batch, options.heads, length, width, width) for length in sorted(options.positions)]
    limits = Limits(
        minutes=options.limit_minutes or (None if on_cpu else 9.0),
        call_seconds=options.limit_seconds or (20.0 if on_cpu else 0.25),
        case_seconds=options.case_seconds or (5.0 if on_cpu else 0.2),
        weigh=not options.skip_memory,
    )
    check_device(device)
    file = RowsFile(options.output / "attention.json")
    try:
        suite = Suite(file, device=device, dtype=dtype, limits=limits, progress=progress)
        suite.measure(shapes, contenders)
    finally:  # an interrupted run has its report too
        if file.rows:
            write_text(options.output / "attention.md", attention_report(file.rows))
    print(file.path)
    print(options.output / "attention.md")
    _picture(file.rows, options.output / "attention.png", draw)


def _picture(rows: Sequence[Row], path: Path, draw: Draw) -> None:
    """Draw the setting of which most lengths were measured, the newest of several; nothing without matplotlib."""
    settings: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row.measured:
            source = (row.machine, row.dtype, row.versions, row.code)
            key = (*source, row.batch, row.heads, row.key_dim, row.value_dim)
            settings.setdefault(key, []).append(row)
    if not settings:
        return
    newest_first = reversed(settings.values())
    most = Measurements(max(newest_first, key=lambda alike: len({row.positions for row in alike})))
    points: list[dict[str, Any]] = []
    for label, contenders in _DRAWN.items():
        for shape, name in dict.fromkeys((row.shape, row.pass_name) for row in most.rows):
            best = most.best(contenders, shape, name)
            if best is not None and name != "backward":
                points.append(
                    {
                        "attention": label,
                        "positions": best.positions,
                        "backward": name != "forward",
                        "seconds": best.seconds,
                        "peak_bytes": best.peak_bytes,
                    }
                )
    if points:
        with suppress(ImportError):
            draw(points, path)
