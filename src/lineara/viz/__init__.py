"""Figures from tensors and results: every drawing function returns a `matplotlib.figure.Figure`, the caller saves it."""

from lineara.viz.attention_maps import global_maps, map_grid, token_maps
from lineara.viz.cost_curves import cost_curves
from lineara.viz.learning_curves import learning_curves, read_metrics

__all__ = ["cost_curves", "global_maps", "learning_curves", "map_grid", "read_metrics", "token_maps"]
