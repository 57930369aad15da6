"""Which resolution every query of multiresolution attention chose, and how a training used its heads."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from lineara.viz.learning_curves import smoothed

_Metrics = Mapping[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

# Of tokens laid out as text, in inches: the figure, its margin, a character, a line, a row of the legend.
_WIDTH, _MARGIN, _CHARACTER, _LINE, _LEGEND_ROW = 11.0, 0.15, 0.085, 0.31, 0.24
_LEGEND_COLUMNS = 4
_LOAD = re.compile(r"train/load_layer(\d+)_head(\d+)")
_GAP = 0.02
# A head that fewer queries choose has as good as dropped out.
_COLLAPSED_SHARE = 0.02


def routing_over_tokens(
    choice: Tensor, probability: Tensor, tokens: Sequence[str], *, resolutions: Sequence[int], title: str = ""
) -> Figure:
    """Draw the tokens of one sequence as text, each on the colour of the resolution that its query finds likeliest.

    Colours run from dark, the coarsest head, to light, the finest. The bar below a token is as long, in widths of its
    cell, as its likeliest head is probable. Above each layer stands the share of tokens that chose each head.

    Args:
        choice: integer (layers, positions, top_k), the heads of each query, the likeliest first: `nn.router.Routing`'s
            of one item.
        probability: (layers, positions, heads), likewise.
        tokens: what to write, one word for each position.
        resolutions: of each head.
        title: above all layers.

    Returns:
        A figure of one panel per layer.

    Raises:
        ValueError: for a choice or probabilities of another shape, heads without a resolution, or not as many tokens as
            positions.
    """
    likeliest = _likeliest(choice, resolutions)  # (layers, positions)
    num_layers, num_tokens = likeliest.shape
    expected = (num_layers, num_tokens, len(resolutions))
    if tuple(probability.shape) != expected:
        raise ValueError(
            f"probability must have the shape (layers, positions, heads) = {expected}, got {tuple(probability.shape)}"
        )
    if len(tokens) != num_tokens:
        raise ValueError(f"tokens must be as many as positions, got {len(tokens)} and {num_tokens}")
    most = probability.amax(dim=2).cpu().double().numpy()  # (layers, positions)
    cells, num_lines = _text_cells(tokens)
    above = 0.3 + _LEGEND_ROW * -(-len(resolutions) // _LEGEND_COLUMNS)
    block = above + _LINE * num_lines + 0.15
    height = block * num_layers + (0.35 if title else 0.0)
    figure = Figure(figsize=(_WIDTH, height), dpi=100)
    figure.text(_MARGIN / _WIDTH, 1 - 0.1 / height, title, fontsize=13, verticalalignment="top")
    for layer in range(num_layers):
        bottom = block * (num_layers - layer) - above - _LINE * num_lines
        place = (_MARGIN / _WIDTH, bottom / height, 1 - 2 * _MARGIN / _WIDTH, _LINE * num_lines / height)
        axes = figure.add_axes(place)
        axes.set_axis_off()
        axes.set_xlim(0, _WIDTH - 2 * _MARGIN)
        axes.set_ylim(_LINE * num_lines, 0)
        _draw_text(axes, cells, tokens, likeliest[layer], most[layer], resolutions)
        chosen = "its choice" if choice.shape[2] == 1 else f"the likeliest of its {choice.shape[2]} choices"
        heading = f"layer {layer}; bar: probability of {chosen}, on average {most[layer].mean():.2f}"
        axes.text(0, 0.14 - above, heading, fontsize=11)
        _add_legend(axes, likeliest[layer], resolutions, "lower left", (0, 1), ncols=_LEGEND_COLUMNS)
    return figure


def routing_over_image(
    image: npt.NDArray[np.generic], choice: Tensor, *, resolutions: Sequence[int], title: str = ""
) -> Figure:
    """Draw an image, and beside it for each layer the resolution that every pixel's query finds likeliest.

    Colours run from dark, the coarsest head, to light, the finest; below each layer stands the share of pixels that
    chose each head.

    Args:
        image: (height, width), integers in 0..255 or numbers in 0..1.
        choice: integer (layers, height * width, top_k), the heads of each pixel, row by row, the likeliest first; -1
            for a pixel that is hidden from the network.
        resolutions: of each head.
        title: above the panels.

    Returns:
        A figure of one panel for the image and one per layer.

    Raises:
        ValueError: for an image or a choice of another shape, or heads without a resolution.
    """
    likeliest = _likeliest(choice, resolutions)  # (layers, positions)
    if image.ndim != 2 or image.size != likeliest.shape[1]:
        raise ValueError(f"image must have two axes and {likeliest.shape[1]} pixels, as choice, got {image.shape}")
    # Placed by hand: the automatic layouts cut off the legends of panels whose sides are given by an image.
    side, num_panels = 2.7, 1 + len(likeliest)
    panel = side * image.shape[0] / image.shape[1]
    below, above = 0.15 + _LEGEND_ROW * (len(resolutions) + 1), 0.7
    width, height = (side + _MARGIN) * num_panels + _MARGIN, below + panel + above
    figure = Figure(figsize=(width, height), dpi=100)
    figure.suptitle(title, fontsize=13, y=1 - 0.1 / height, verticalalignment="top")
    lefts = [(_MARGIN + (side + _MARGIN) * i) / width for i in range(num_panels)]
    first, *others = [figure.add_axes((left, below / height, side / width, panel / height)) for left in lefts]
    brightest = 255 if np.issubdtype(image.dtype, np.integer) else 1
    first.imshow(image, cmap="gray", vmin=0, vmax=brightest, interpolation="nearest")
    first.set_title("image", fontsize=11)
    likeliest_of = "" if choice.shape[2] == 1 else f", likeliest of {choice.shape[2]} choices"
    colors = np.concatenate([_colors(resolutions), np.ones((1, 4))])  # -1 is white
    for layer, axes in enumerate(others):
        axes.imshow(colors[likeliest[layer].reshape(image.shape)], interpolation="nearest")
        axes.set_title(f"layer {layer}{likeliest_of}", fontsize=11)
        _add_legend(axes, likeliest[layer], resolutions, "upper center", (0.5, -0.02), ncols=1)
    for axes in (first, *others):
        axes.set_xticks([])
        axes.set_yticks([])
    return figure


def router_load(metrics: _Metrics, *, title: str = "") -> Figure:
    """Draw the share of queries that each head gets against the optimiser's steps.

    Logged shares are drawn faintly, and boldly their mean over a tenth of the run, whose last value the legend tells. A
    dashed line marks an even share; below the dotted one, at 2 %, a head counts as collapsed.

    Args:
        metrics: from `read_metrics`, with `"train/load_layer<l>_head<h>"` for every layer and head; others are ignored.
        title: above the panels.

    Returns:
        A figure of one panel per layer.

    Raises:
        ValueError: if there are no such metrics.
    """
    loads: dict[int, dict[int, tuple[_Ints, _Floats]]] = {}
    for name, points in metrics.items():
        if found := _LOAD.fullmatch(name):
            loads.setdefault(int(found[1]), {})[int(found[2])] = points
    if not loads:
        raise ValueError(
            f"metrics must hold train/load_layer<l>_head<h>, got {', '.join(metrics) or 'none'}; only a network with "
            "routers has them"
        )
    num_columns = min(len(loads), 3)
    num_rows = -(-len(loads) // num_columns)
    figure = Figure(figsize=(5.2 * num_columns, 4.2 * num_rows + 0.3), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False, sharey=True).flat)
    for axes, layer in zip(panels, sorted(loads)):
        axes.set_title(f"layer {layer}", fontsize=12)
        _draw_load(axes, loads[layer])
    panels[0].set_ylim(bottom=0)  # of all of them, and only once all are drawn
    for axes in panels[len(loads) :]:
        axes.remove()
    return figure


def _likeliest(choice: Tensor, resolutions: Sequence[int]) -> _Ints:
    """The first choice of each query, (layers, positions)."""
    if choice.dim() != 3 or choice.numel() == 0:
        raise ValueError(f"choice must have the shape (layers, positions, top_k), got {tuple(choice.shape)}")
    if not -1 <= choice.min() <= choice.max() < len(resolutions):
        raise ValueError(
            f"choice must name heads below {len(resolutions)}, as resolutions has them, or be -1, got heads from "
            f"{choice.min()} to {choice.max()}"
        )
    return choice[:, :, 0].cpu().numpy().astype(np.int64)


def _colors(resolutions: Sequence[int]) -> _Floats:
    """(heads, 4) from dark to light, as the resolutions run from coarse to fine."""
    shades = np.empty(len(resolutions))
    shades[_coarse_to_fine(resolutions)] = np.linspace(0.0, 0.92, len(resolutions))
    return colormaps["viridis"](shades)


def _coarse_to_fine(resolutions: Sequence[int]) -> list[int]:
    return sorted(range(len(resolutions)), key=lambda head: -resolutions[head])


def _add_legend(
    axes: Axes,
    heads: _Ints,
    resolutions: Sequence[int],
    loc: Literal["lower left", "upper center"],
    anchor: tuple[float, float],
    *,
    ncols: int,
) -> None:
    """The heads from coarse to fine, each with its share of those that chose; hidden ones apart."""
    colors = _colors(resolutions)
    chosen = np.bincount(heads[heads >= 0], minlength=len(resolutions)) / max(1, (heads >= 0).sum())
    entries = [
        Patch(color=colors[head], label=f"resolution {resolutions[head]} (head {head}): {chosen[head]:.0%}")
        for head in _coarse_to_fine(resolutions)
    ]
    if (heads < 0).any():
        entries.append(Patch(facecolor="white", edgecolor="#888888", label="hidden"))
    axes.legend(
        handles=entries,
        loc=loc,
        bbox_to_anchor=anchor,
        ncols=ncols,
        fontsize=10,
        frameon=False,
        borderaxespad=0.3,
        borderpad=0,
    )


def _text_cells(tokens: Sequence[str]) -> tuple[list[tuple[float, float, float]], int]:
    """Left end, top and width of each token in inches, wrapped into lines; and the number of lines."""
    cells: list[tuple[float, float, float]] = []
    left, line = 0.0, 0
    for token in tokens:
        width = _CHARACTER * (len(token) + 0.8)
        if left and left + width > _WIDTH - 2 * _MARGIN:
            left, line = 0.0, line + 1
        cells.append((left, line * _LINE, width))
        left += width
    return cells, line + 1


def _draw_text(
    axes: Axes,
    cells: Sequence[tuple[float, float, float]],
    tokens: Sequence[str],
    heads: _Ints,
    probability: _Floats,
    resolutions: Sequence[int],
) -> None:
    colors = _colors(resolutions)[heads]  # (positions, 4)
    ink = np.where(colors[:, :3] @ (0.299, 0.587, 0.114) < 0.45, "white", "black")
    boxes = [_box(left, top, width - _GAP, 0.72 * _LINE) for left, top, width in cells]
    bars = [
        _box(left, top + 0.77 * _LINE, (width - _GAP) * share, 0.11 * _LINE)
        for (left, top, width), share in zip(cells, probability)
    ]
    axes.add_collection(PolyCollection(boxes, facecolors=colors, linewidths=0))
    axes.add_collection(PolyCollection(bars, facecolors="#444444", linewidths=0))
    for (left, top, width), token, color in zip(cells, tokens, ink):
        axes.text(
            left + (width - _GAP) / 2,
            top + 0.36 * _LINE,
            token,
            color=color,
            fontsize=9.5,
            family="monospace",
            horizontalalignment="center",
            verticalalignment="center_baseline",
        )


def _box(left: float, top: float, width: float, height: float) -> list[tuple[float, float]]:
    return [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]


def _draw_load(axes: Axes, loads: Mapping[int, tuple[_Ints, _Floats]]) -> None:
    colors = colormaps["viridis"](np.linspace(0.0, 0.85, len(loads)))
    for color, head in zip(colors, sorted(loads)):
        steps, shares = loads[head]
        averaged = smoothed(shares)
        axes.plot(steps, shares, color=color, alpha=0.25, linewidth=0.9)
        axes.plot(steps, averaged, color=color, linewidth=2.2, label=f"head {head}, at last {averaged[-1]:.0%}")
    even = 1 / len(loads)
    marks = ((even, "--", f"even: {even:.0%}"), (_COLLAPSED_SHARE, ":", f"collapse: {_COLLAPSED_SHARE:.0%}"))
    for share, style, name in marks:
        axes.axhline(share, color="#444444", linewidth=1.2, linestyle=style, zorder=1)
        axes.annotate(
            name,
            (1, share),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=10,
            color="#444444",
        )
    axes.set_xlabel("optimiser step", fontsize=11)
    axes.set_ylabel("share of queries", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, fontsize=10, frameon=False)
