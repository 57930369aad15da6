"""`lineara bench`: what attention costs on this machine."""

import json
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from lineara.measure.cost import cost_table, length_study, measure_costs
from lineara.measure.machine import write_text


def bench(words: Sequence[str], *, progress: Callable[[str], object]) -> None:
    """Run what the words of a command line say.

    Args:
        words: a study and its options.
        progress: called with one line of text after each case.
    """
    parser = ArgumentParser(prog="lineara bench", description="Measure what attention costs.", allow_abbrev=False)
    studies = parser.add_subparsers(title="studies", metavar="STUDY", required=True)
    _add_cost(
        studies.add_parser(
            "cost", help=_COST, description=_COST, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False
        )
    )
    if list(words[:1]) == ["attention"]:
        raise ValueError(
            "a study of lineara bench must be cost, got attention; from a checkout of the repository run "
            "python benchmarks/attention/suite.py"
        )
    options = parser.parse_args(words)
    _cost(options, progress)


_COST = "time and peak memory of efficient and dot-product attention against length"


def _add_cost(parser: ArgumentParser) -> None:
    parser.add_argument("--attention", nargs="+", default=["efficient", "softmax"], help="what to measure")
    parser.add_argument("--positions", nargs="+", type=int, default=[256, 1024, 4096, 16384, 65536], help="lengths")
    parser.add_argument("--heads", type=int, default=8, help="heads")
    parser.add_argument("--head_dim", type=int, default=64, help="channels per head")
    parser.add_argument("--limit_seconds", type=float, default=60.0, help="leave out calls expected to take longer")
    parser.add_argument("--output", type=Path, default=Path("runs/cost/cost.json"), help="file to write")


def _cost(options: Namespace, progress: Callable[[str], object]) -> None:
    cases = length_study(options.attention, options.positions, heads=options.heads, head_dim=options.head_dim)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    costs = measure_costs(cases, limit_seconds=options.limit_seconds, progress=progress)
    table = cost_table(costs)
    print(table)
    write_text(options.output.with_suffix(".md"), table + "\n")
    write_text(options.output, json.dumps([cost.as_row() for cost in costs], indent=1) + "\n")
    print(options.output)
