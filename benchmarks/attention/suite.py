"""Efficient attention against plain PyTorch, dot-product attention and other packages.

    python benchmarks/attention/suite.py --preset full --output runs/attention

From a checkout, installed or not; it needs torch and nothing else. `--help` tells the options. Rows are written to the
folder after every shape and pass: a run that is killed keeps what it has, and a second one goes on from there. Report
and, where there is matplotlib, picture follow at the end. A quiet machine is the caller's business.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(_REPOSITORY / "src"), str(_REPOSITORY / "benchmarks")]

import torch

from attention.contenders import NAMES, SDPA, chosen
from attention.limits import Limits, check_device
from attention.measurement import Suite
from attention.report import attention_report
from attention.rows import Row, RowsFile
from attention.shapes import PRESETS, Shape, preset_shapes
from attention.targets import Measurements
from lineara.measure.machine import write_text

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


def parse(words: Sequence[str] | None = None) -> Namespace:
    parser = ArgumentParser(description="Efficient attention against others: checked, timed, memory included.")
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
    return parser.parse_args(words)


def measure(options: Namespace, *, draw: Draw, progress: Callable[[str], object]) -> None:
    """Measure, and write rows, report and picture."""
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


def draw_rows(rows: list[dict[str, Any]], path: Path) -> None:
    from lineara.viz import cost_curves

    cost_curves(rows).savefig(path)
    print(path)


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 a mistake in the call."""
    try:
        measure(parse(words), draw=draw_rows, progress=lambda line: print(line, file=sys.stderr))
    except (ValueError, OSError) as error:
        print(f"suite.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
