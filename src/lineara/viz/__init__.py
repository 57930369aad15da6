"""Figures from tensors and results: drawing functions return a `matplotlib.figure.Figure`, callers save it."""

try:
    from lineara.viz.attention_maps import global_maps, map_grid, token_maps
    from lineara.viz.cost_curves import cost_curves, read_costs
    from lineara.viz.detections import detections
    from lineara.viz.disparity import disparity_comparison, disparity_picture
    from lineara.viz.example_images import example_images
    from lineara.viz.learning_curves import learning_curves, read_metrics
    from lineara.viz.routing import router_load, routing_over_image, routing_over_tokens
    from lineara.viz.trade_off import trade_off
except ModuleNotFoundError as error:
    raise ImportError(
        f"lineara.viz needs {str(error.name).partition('.')[0]}, which is not installed; install it with: "
        "pip install 'lineara[train]'"
    ) from error

__all__ = [
    "cost_curves",
    "detections",
    "disparity_comparison",
    "disparity_picture",
    "example_images",
    "global_maps",
    "learning_curves",
    "map_grid",
    "read_costs",
    "read_metrics",
    "router_load",
    "routing_over_image",
    "routing_over_tokens",
    "token_maps",
    "trade_off",
]
