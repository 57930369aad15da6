"""Measurements: what a call costs in time and memory, and what attention costs against length."""

from lineara.measure.calls import Timing, median_seconds, peak_memory
from lineara.measure.cost import ATTENTIONS, LENGTHS, Case, Cost, cost_table, measure_case, measure_costs

__all__ = [
    "ATTENTIONS",
    "LENGTHS",
    "Case",
    "Cost",
    "Timing",
    "cost_table",
    "measure_case",
    "measure_costs",
    "median_seconds",
    "peak_memory",
]
