"""The command line. It turns words into calls; what they do lives in `lineara.tasks`, `viz` and `measure`."""

import sys


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    from lineara.tasks.training import TrainingCommand
    TrainingCommand(arguments)
    return 0
