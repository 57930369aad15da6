"""Global attention maps: what each key channel of efficient attention gathers its context from."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor, nn

from lineara.nn import EfficientAttention, EfficientAttention1d, EfficientAttention2d, EfficientAttention3d

_MAP_LAYERS = (EfficientAttention1d, EfficientAttention2d, EfficientAttention3d)
_MOST_WRITTEN_TOKENS = 120


def global_maps(layer: nn.Module, call: Callable[[], object], *, key_mask: Tensor | None = None) -> Tensor:
    """The global attention maps of a layer while a network runs: its keys, after their softmax over positions.

        map_k = softmax over positions i of (scale K_ik),    context_k = sum_i map_ki V_i

    Args:
        layer: the layer to look into, an `nn.EfficientAttention` or `nn.EfficientAttention1d` / `2d` / `3d` with
            normalization="softmax".
        call: runs the network once, such as `lambda: network(x)`; called without gradients. Dropout is as the network
            has it: call `network.eval()` before.
        key_mask: boolean (batch, positions), True = takes part: the mask that the network gives to a sequence layer.

    Returns:
        (batch, heads, key channels per head, *positions), with the positions of what is attended to: (positions,) for
        sequences, (length,), (height, width) or (depth, height, width) for maps. Each map sums to 1; masked positions
        are 0, and so is a map without a valid position.

    Raises:
        TypeError: for a mask that is not boolean.
        ValueError: for another layer or normalization, a mask of another shape or for a layer without masks, or a layer
            that `call` does not run exactly once.

    Source: Shen et al., WACV 2021, arXiv 1812.01243, section 3.3 and Figure 3.
    """
    projection = _key_projection(layer)
    keys = _outputs_during(projection, call)
    if isinstance(layer, EfficientAttention):
        keys = keys.mT  # (B, H * K, M)
    num_heads, scale = int(layer.num_heads), float(layer.scale)  # type: ignore[arg-type]
    keys = keys.unflatten(1, (num_heads, -1))  # (B, H, K, *positions)
    flat = keys.flatten(3).to(torch.promote_types(keys.dtype, torch.float32)) * scale  # (B, H, K, M)
    if key_mask is not None:
        ...
    return flat.softmax(dim=3).view(keys.shape)
