"""Attention of other packages, where they are installed, as calls that the attention suite can time.

Nothing here is a dependency: a package is looked for by its name when its turn comes, and a missing one is said to be
missing. Those that are layers with projections of their own take the tokens or the map that attention is over.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from attention.shapes import Shape

_Call = Callable[..., Tensor]


def flash_bidirectional(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    """Fused linear attention without a feature map and without normalisation, of flash_bla, earlier fbi_la."""
    places = (("flash_bla.ops.simple_la.fused", "simple_la"), ("fbi_la.ops.simple_la.attention", "simple_la"))
    return _found("flash-bidirectional-linear-attention", *places)


def linear_attention_transformer(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    """Efficient attention divided by the square root of the key channels, in two einsums."""
    module = "linear_attention_transformer.linear_attention_transformer"
    return _found("linear-attention-transformer", (module, "linear_attn"))


def performer(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    """FAVOR+ with the package's number of random features."""
    layer = _found("performer-pytorch", ("performer_pytorch", "FastAttention"))
    return layer(dim_heads=shape.key_dim).to(device, dtype)


def performer_without_projection(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    """The same package's form of efficient attention."""
    layer = _found("performer-pytorch", ("performer_pytorch", "FastAttention"))
    return layer(dim_heads=shape.key_dim, no_projection=True).to(device, dtype)


def linformer(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    layer = _found("linformer", ("linformer", "LinformerSelfAttention"))
    width = shape.heads * shape.value_dim
    return _on(device, layer(width, shape.positions, heads=shape.heads, dim_head=shape.value_dim), dtype)


def nystrom(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    layer = _found("nystrom-attention", ("nystrom_attention", "NystromAttention"))
    width = shape.heads * shape.value_dim
    return _on(device, layer(width, dim_head=shape.value_dim, heads=shape.heads), dtype)


def lite_mla(shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    layer = _found("timm", ("timm.models.efficientvit_mit", "LiteMLA"))
    width = shape.heads * shape.value_dim
    return _on(device, layer(width, width, heads=shape.heads, dim=shape.value_dim), dtype)


def _on(device: str, layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    return layer.to(device, dtype).eval()


def _found(package: str, *places: tuple[str, str]) -> Any:
    """The first of the places (module, name) that can be imported.

    Raises:
        ModuleNotFoundError: if the package is not installed.
    """
    for module, name in places:
        try:
            return getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            # Something else that the package needs may be missing: that is another reason.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
    raise ModuleNotFoundError(f"{package} is not installed")
