"""Global attention maps: where each key channel of efficient attention gathers its context."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor, nn

from lineara.nn import EfficientAttention, EfficientAttention1d, EfficientAttention2d, EfficientAttention3d

_Layer = EfficientAttention | EfficientAttention1d | EfficientAttention2d | EfficientAttention3d
_Array = npt.NDArray[np.float64]

_MOST_TOKENS_WRITTEN = 120
# Of a picture; what is longer is averaged over neighbours, so that no position is lost between two pixels.
_MOST_COLUMNS = 500


def global_maps(layer: nn.Module, call: Callable[[], object], *, key_mask: Tensor | None = None) -> Tensor:
    """The global attention maps of a layer in a running network: its keys after their softmax over positions.

        map_k = softmax over positions i of (scale K_ik),    context_k = sum_i map_ki V_i

    Args:
        layer: the layer to look into: `nn.EfficientAttention`, or `nn.EfficientAttention1d`, `2d` or `3d`, with
            normalization="softmax".
        call: runs the network once, such as `lambda: network(x)`; called without gradients. Dropout is as the network
            has it: call `network.eval()` before.
        key_mask: boolean (batch, positions), True = takes part: the mask that the network gives to a sequence layer.

    Returns:
        (batch, heads, key channels per head, *positions), with the positions of what is attended to: (positions,) of a
        sequence, (length,), (height, width) or (depth, height, width) of a map. Each map sums to 1; masked positions
        are 0, as is every map of an item without a valid position. At least float32.

    Raises:
        TypeError: for a mask that is not boolean.
        ValueError: for another layer or normalization, a mask of another shape or for a layer without masks, or a layer
            that `call` does not run exactly once.

    Source: Shen et al., WACV 2021, arXiv 1812.01243, Figure 3.
    """
    if not isinstance(layer, _Layer):
        raise ValueError(f"layer must be an efficient attention layer of lineara.nn, got {type(layer).__name__}")
    if layer.normalization != "softmax":
        raise ValueError(
            f"layer must have normalization='softmax', got {layer.normalization!r}, whose raw keys are no maps"
        )
    if isinstance(layer, EfficientAttention):
        keys = _output_during(layer.key, call).mT  # (B, H * K, M)
    elif key_mask is None:
        keys = _output_during(layer.keys, call)  # (B, H * K, *positions)
    else:
        raise ValueError(f"key_mask must be None for {type(layer).__name__}, which takes no mask")
    keys = keys.unflatten(1, (layer.num_heads, -1))  # (B, H, K, *positions)
    flat = keys.flatten(3).to(torch.promote_types(keys.dtype, torch.float32)) * layer.scale  # (B, H, K, M)
    return _masked_softmax(flat, key_mask).reshape(keys.shape)


def token_maps(maps: Tensor, tokens: Sequence[str], *, max_channels: int = 16, title: str = "") -> Figure:
    """Draw global attention maps over the tokens of one sequence: a row per key channel, the sharpest first.

    Colour is the weight relative to a uniform map's, weight x positions, on a logarithmic scale: white is uniform, red
    attends more, blue less; the half per cent of highest weights share one red. Beside each row stand its highest
    weight, on the same scale, and the position that has it. The sharpest is the one whose highest weight exceeds its
    mean the most.

    Args:
        maps: (channels, positions), one item and head of `global_maps`.
        tokens: what to write below each position. Beyond 120 of them, positions are counted instead; beyond 500,
            neighbours are averaged.
        max_channels: rows at most.
        title: above the rows.

    Returns:
        A figure of one panel and its colour bar.

    Raises:
        ValueError: for maps of another shape, or not as many tokens as positions.
    """
    weights = _as_array(maps, "(channels, positions)")
    if weights.shape[1] != len(tokens):
        raise ValueError(f"tokens must be as many as positions, got {len(tokens)} and {weights.shape[1]}")
    channels = _sharpest(weights, max_channels)
    relative = weights[channels] * len(tokens)
    written = len(tokens) <= _MOST_TOKENS_WRITTEN
    width = min(max(0.125 * len(tokens) + 3.0, 7.5), 16.0) if written else 12.0
    figure = Figure(figsize=(width, 0.24 * len(channels) + 2.0), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=12)
    axes.set_yticks(range(len(channels)), [str(channel) for channel in channels], fontsize=9)
    axes.set_ylabel("key channel", fontsize=11)
    if written:
        size = 9 if len(tokens) <= 90 else 8
        axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=size, family="monospace")
    else:
        axes.set_xlabel("position", fontsize=11)
    _draw_rows(axes, relative)
    return figure


def map_grid(
    maps: Tensor, *, max_maps: int = 16, image: Tensor | npt.NDArray[np.generic] | None = None, title: str = ""
) -> Figure:
    """Draw global attention maps over one image as the paper's Figure 3 does: in grey, the sharpest first.

    White attends most and black least, map by map. Above each map stands its key channel, below it how many times its
    highest weight is a uniform map's. The sharpest is the one whose highest weight exceeds its mean the most.

    Args:
        maps: (channels, height, width), one item and head of `global_maps`.
        max_maps: maps at most.
        image: (height, width, 3) of any height and width, integers in 0..255 or numbers in 0..1, for the first cell.
        title: above the grid.

    Returns:
        A figure of one panel per map, and one for the image.

    Raises:
        ValueError: for maps or an image of another shape.

    Source: Shen et al., WACV 2021, arXiv 1812.01243, Figure 3.
    """
    weights = _as_array(maps, "(channels, height, width)")
    picture = None if image is None else np.asarray(image)
    if picture is not None and (picture.ndim != 3 or picture.shape[2] != 3):
        raise ValueError(f"image must have the shape (height, width, 3), got {picture.shape}")
    channels = _sharpest(weights.reshape(len(weights), -1), max_maps)
    figure, cells = _grid(len(channels) + (picture is not None), weights.shape[1] / weights.shape[2], title)
    if picture is not None:
        cell = cells.pop(0)
        cell.imshow(picture)
        cell.set_title("image", fontsize=10)
    for cell, channel in zip(cells, channels):
        cell.imshow(weights[channel], cmap="gray")
        cell.set_title(f"channel {channel}", fontsize=10)
        peak = weights[channel].max() * weights[channel].size
        cell.set_xlabel(f"peak {peak:.3g} x uniform", fontsize=9)
    return figure


def _output_during(projection: nn.Module, call: Callable[[], object]) -> Tensor:
    outputs: list[Any] = []
    hook = projection.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with torch.no_grad():
            call()
    finally:
        hook.remove()
    if len(outputs) != 1:
        raise ValueError(f"call must run the layer exactly once, got {len(outputs)} times")
    return outputs[0]


def _masked_softmax(keys: Tensor, key_mask: Tensor | None) -> Tensor:
    if key_mask is None:
        return keys.softmax(dim=3)
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be boolean (True = takes part), got {key_mask.dtype}; write key_mask.bool()")
    expected = (keys.shape[0], keys.shape[3])
    if tuple(key_mask.shape) != expected:
        raise ValueError(f"key_mask must have the shape (batch, positions) = {expected}, got {tuple(key_mask.shape)}")
    hidden = ~key_mask[:, None, None].to(keys.device)  # (B, 1, 1, M)
    # The softmax of an item without a valid position is NaN, so hidden positions are set to 0 after it.
    return keys.masked_fill(hidden, -torch.inf).softmax(dim=3).masked_fill(hidden, 0.0)


def _as_array(maps: Tensor, shape: str) -> _Array:
    if maps.dim() != shape.count(",") + 1 or maps.numel() == 0:
        raise ValueError(f"maps must have the shape {shape}, got {tuple(maps.shape)}; choose one item and one head")
    return maps.detach().cpu().double().numpy()


def _draw_rows(axes: Axes, relative: _Array) -> None:
    """Rows of weights relative to uniform, (channels, positions), with their peaks and a colour bar."""
    num_rows, num_positions = relative.shape
    averaged = _averaged(relative, _MOST_COLUMNS)
    # One highest weight would leave nothing to see of all others. At least from half to twice as much, so that noise
    # around uniform does not look like a pattern.
    most = max(2.0, float(np.quantile(averaged, 0.995)))
    image = axes.imshow(
        averaged.clip(1 / most, most),
        cmap="RdBu_r",
        norm=LogNorm(1 / most, most),
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, num_positions - 0.5, num_rows - 0.5, -0.5),
    )
    axes.hlines(np.arange(1, num_rows) - 0.5, -0.5, num_positions - 0.5, color="white", linewidth=1.5)
    axes.set_xlim(-0.5 - num_positions / 200, num_positions - 0.5)  # the first position clear of the frame
    for row, peak in enumerate(relative.argmax(axis=1)):
        axes.annotate(
            f"{relative[row, peak]:.3g} x at {peak}",
            (1, row),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=9,
        )
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05, aspect=30, extend="both")
    bar.ax.yaxis.set_major_locator(LogLocator(base=2 if most < 50 else 10))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}" if x >= 1 else f"1/{1 / x:g}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("weight relative to uniform", fontsize=10)


def _averaged(rows: _Array, most: int) -> _Array:
    """(rows, columns) to at most so many columns, each the mean of neighbours."""
    size = -(-rows.shape[1] // most)
    starts = np.arange(0, rows.shape[1], size)
    return np.add.reduceat(rows, starts, axis=1) / np.diff([*starts, rows.shape[1]])


def _sharpest(weights: _Array, most: int) -> list[int]:
    """The channels whose highest weight exceeds their mean the most: (channels, positions) to channel numbers."""
    contrast = weights.max(axis=1) - weights.mean(axis=1)
    return np.argsort(-contrast, kind="stable")[:most].tolist()


def _grid(num_cells: int, height_per_width: float, title: str) -> tuple[Figure, list[Axes]]:
    """Empty cells without ticks, row by row."""
    num_columns = min(num_cells, 6)
    num_rows = -(-num_cells // num_columns)
    height = float(np.clip(1.6 * height_per_width, 0.5, 4.0)) + 0.5
    size = (1.6 * num_columns, height * num_rows + (0.4 if title else 0.0))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(title, fontsize=12)
    cells = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for cell in cells:
        cell.set_xticks([])
        cell.set_yticks([])
    for cell in cells[num_cells:]:
        cell.remove()
    return figure, cells[:num_cells]
