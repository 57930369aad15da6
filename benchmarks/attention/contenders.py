"""What the attention suite compares: this library's implementations, plain PyTorch, dot-product attention, others'.

A contender is made for one shape and may fail at it: what it raises is the reason why it is not measured.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention import peers
from attention.shapes import Shape
from lineara.measure.cost import einsum, plain
from lineara.ops import efficient_attention

_Call = Callable[..., Tensor]
SAME = "same formula"
ANOTHER = "another formula"


@dataclass(frozen=True)
class Layout:
    """How the inputs lie in memory: made of query, key and value outside of what is timed, and the output undone."""

    name: str
    convert: Callable[[Tensor, Tensor, Tensor], Sequence[Tensor]]
    restore: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to compute attention.

    Args:
        name: what it is called in every file and table.
        make: from shape, dtype and device to what is called with the inputs; an nn.Module's weights are trained too.
        layout: of its inputs.
        formula: `SAME` if it must agree with `ops.efficient_attention`, `ANOTHER` otherwise.
        factor: of its output, where it computes the same formula times a number that depends on the shape.
        quadratic: whether its time grows with the square of the number of positions.
        map_bytes: bytes per number of an attention matrix that it keeps, 0 if it keeps none.
        around: a context that it runs in.
        compiles: whether torch.compile makes it, which takes seconds per shape.
    """

    name: str
    make: Callable[[Shape, torch.dtype, str], _Call]
    layout: Layout
    formula: str = SAME
    factor: Callable[[Shape], float] = lambda shape: 1.0
    quadratic: bool = False
    map_bytes: int = 0
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    compiles: bool = False


def chosen(names: Sequence[str] | None) -> list[Contender]:
    """The contenders of these names, or all of them, in the order of the table.

    Raises:
        ValueError: for a name that nobody has.
    """
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"contenders must be among {', '.join(NAMES)}, got {name!r}")
    return [contender for contender in _CONTENDERS if names is None or contender.name in names]


def channels_first(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Plain efficient attention of (batch, heads, channels, positions), as the authors' module has it."""
    context = key.softmax(3) @ value.mT  # (B, H, K, V)
    return context.mT @ query.softmax(2)  # (B, H, V, N)


def _lineara_on_maps(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return efficient_attention(query.mT, key.mT, value.mT).mT  # (B, H, V, N)


def _always(call: _Call, shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    return call


def _compiled(call: _Call, shape: Shape, dtype: torch.dtype, device: str) -> _Call:
    return torch.compile(call, dynamic=False, fullgraph=True)


def _only(backend: str) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(getattr(SDPBackend, backend))


def _sdpa(name: str, backend: str, map_bytes: int = 0) -> Contender:
    return Contender(
        name,
        partial(_always, scaled_dot_product_attention),
        _POSITIONS,
        formula=ANOTHER,
        quadratic=True,
        map_bytes=map_bytes,
        around=partial(_only, backend),
    )


def _peer(name: str, make: Callable[[Shape, torch.dtype, str], _Call], layout: Layout | None = None) -> Contender:
    return Contender(name, make, layout or _POSITIONS, formula=ANOTHER)


def _as_they_are(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return query, key, value


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.mT.contiguous() for tensor in (query, key, value))  # (B, H, K, N), (B, H, V, N)


def _tokens(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    return (value.transpose(1, 2).flatten(2).contiguous(),)  # (B, N, H V)


def _map(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    positions = value.shape[2]
    height = next(size for size in range(int(positions**0.5), 0, -1) if positions % size == 0)
    flat = value.mT.flatten(1, 2)  # (B, H V, N)
    return (flat.unflatten(2, (height, positions // height)).contiguous(),)  # (B, H V, height, width)


_POSITIONS = Layout("positions", _as_they_are, lambda output: output)
_CHANNELS = Layout("channels first", _transposed, lambda output: output.mT)
_TOKENS = Layout("tokens", _tokens, lambda output: output)
_MAP = Layout("map", _map, lambda output: output)
_CONTENDERS = (
    Contender("lineara", partial(_always, efficient_attention), _POSITIONS),
    Contender("lineara-triton", partial(_always, partial(efficient_attention, impl="triton")), _POSITIONS),
    Contender("lineara-map", partial(_always, _lineara_on_maps), _CHANNELS),
    Contender("lineara-streaming", partial(_always, partial(efficient_attention, impl="streaming")), _POSITIONS),
    Contender("lineara-reference", partial(_always, partial(efficient_attention, impl="reference")), _POSITIONS),
    Contender("eager", partial(_always, plain), _POSITIONS),
    Contender("eager-map", partial(_always, channels_first), _CHANNELS),
    Contender("eager-einsum", partial(_always, einsum), _POSITIONS),
    Contender("compile", partial(_compiled, plain), _POSITIONS, compiles=True),
    Contender("compile-map", partial(_compiled, channels_first), _CHANNELS, compiles=True),
    _sdpa("sdpa-flash", "FLASH_ATTENTION"),
    _sdpa("sdpa-efficient", "EFFICIENT_ATTENTION"),
    _sdpa("sdpa-cudnn", "CUDNN_ATTENTION"),
    # Its products and its softmax, and what the backward pass keeps and makes of them.
    _sdpa("sdpa-math", "MATH", map_bytes=12),
    _peer("flash-bla", peers.flash_bidirectional),
    Contender(
        "linear-attention-transformer",
        peers.linear_attention_transformer,
        _POSITIONS,
        factor=lambda shape: shape.key_dim**-0.5,
    ),
    Contender("performer-efficient", peers.performer_without_projection, _POSITIONS),
    _peer("performer", peers.performer),
    _peer("linformer", peers.linformer, _TOKENS),
    _peer("nystrom", peers.nystrom, _TOKENS),
    _peer("timm-lite-mla", peers.lite_mla, _MAP),
)
NAMES = tuple(contender.name for contender in _CONTENDERS)
EAGER_AND_COMPILED = ("eager", "eager-map", "eager-einsum", "compile", "compile-map")
SDPA = tuple(name for name in NAMES if name.startswith("sdpa-"))
