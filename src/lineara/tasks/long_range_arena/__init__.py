"""Long Range Arena: long-sequence classification, as in Tay et al., ICLR 2021, arXiv 2011.04006."""

from lineara.tasks.long_range_arena.data import ListOpsData
from lineara.tasks.long_range_arena.task import SequenceClassification

__all__ = ["ListOpsData", "SequenceClassification"]
