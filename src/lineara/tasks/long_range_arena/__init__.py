"""Long Range Arena: long-sequence classification, as in Tay et al., ICLR 2021, arXiv 2011.04006."""

from typing import Any

__all__ = ["ListOpsData", "SequenceClassification"]


def __getattr__(name: str) -> Any:
    """Import the classes when they are first used: the generator needs neither torch nor Lightning."""
    if name == "ListOpsData":
        from lineara.tasks.long_range_arena.data import ListOpsData

        return ListOpsData
    if name == "SequenceClassification":
        from lineara.tasks.long_range_arena.task import SequenceClassification

        return SequenceClassification
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
