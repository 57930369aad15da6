"""What the layers of multiresolution attention share: resolutions, weights of windows, and the router."""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lineara.nn.checks import sequence_of
from lineara.nn.initial_values import assign
from lineara.nn.router import Router, Routing, checked_top_k
from lineara.nn.sequence_attention import ShardedPositions
from lineara.ops import multiresolution_attention
from lineara.ops.checks import (
    COMPRESSIONS,
    FEATURE_MAPS,
    IMPLEMENTATIONS,
    Compression,
    FeatureMap,
    Implementation,
    check_choice,
    check_integer,
    check_scale,
)


class MultiresolutionHeads(ShardedPositions):
    """`ops.multiresolution_attention` with the weights that belong to it.

    Args:
        num_heads: heads of queries.
        key_dim: channels of all queries together.
        value_dim: channels of all values together, those that heads share counted for each.
        num_axes: axes of the grid of positions: 1 for sequences, 2 for feature maps.
        num_key_heads: heads of keys and values; default `num_heads`.
        resolutions, compression, feature_map, routing, top_k, scale, impl, device, dtype: as the layers have them.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int,
        *,
        num_axes: int,
        resolutions: Sequence[int] | None,
        compression: Compression,
        feature_map: FeatureMap,
        routing: Literal["query"] | None,
        top_k: int,
        scale: float,
        impl: Implementation,
        num_key_heads: int | None = None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("compression", compression, COMPRESSIONS)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        check_choice("impl", impl, IMPLEMENTATIONS)
        if routing not in ("query", None):
            raise ValueError(f"routing must be 'query' or None, got {routing!r}")
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        self.resolutions = _checked_resolutions(resolutions, num_key_heads)
        self.compression: Compression = compression
        self.feature_map: FeatureMap = feature_map
        self.scale = check_scale(scale)
        self.impl: Implementation = impl
        self._num_axes = num_axes
        top_k = checked_top_k(top_k, num_heads)
        self.router = None
        if routing == "query" and num_heads > 1:
            self.router = Router(key_dim, num_heads, top_k, device=device, dtype=dtype)
        self.key_weight = self.value_weight = None
        if compression == "conv":
            largest = max(self.resolutions) ** num_axes
            widths = (key_dim // num_heads, value_dim // num_heads)
            if num_key_heads * max(widths) * largest >= 2**60:  # torch counts bytes in 63 bits
                raise ValueError(
                    "resolutions must leave room for the weights of windows under compression='conv', got windows of "
                    f"{largest} positions; give smaller resolutions, or another compression"
                )
            self.key_weight, self.value_weight = (
                nn.Parameter(torch.empty(num_key_heads, width, largest, device=device, dtype=dtype)) for width in widths
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let the weights of windows be the mean again; the router resets its own."""
        # In Python's numbers: a power of a resolution may be beyond those of float16.
        means = [[[resolution**-self._num_axes]] for resolution in self.resolutions]  # (H, 1, 1)
        for weight in (self.key_weight, self.value_weight):
            if weight is not None:
                assign(weight, torch.tensor(means, dtype=weight.dtype, device=weight.device))

    @property
    def resolutions_of_queries(self) -> tuple[int, ...]:
        """For every head of queries, the resolution at which it sees keys and values."""
        num_heads = len(self.resolutions) if self.router is None else self.router.num_heads
        return tuple(self.resolutions[head * len(self.resolutions) // num_heads] for head in range(num_heads))

    @property
    def last_routing(self) -> Routing | None:
        return None if self.router is None else self.router.last

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        key_shape: Sequence[int] | None = None,
        key_mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        cu_seqlens_query: Tensor | None = None,
        cu_seqlens_key: Tensor | None = None,
    ) -> Tensor:
        """(B, H, N, K), (B, H, M, K) and (B, H, M, V) to (B, H, N, V); `query_mask` says which queries to count."""
        gate = None
        if self.router is not None:
            gate = self.router(query.transpose(1, 2).flatten(2), query_mask)  # (B, H, N)
        return multiresolution_attention(
            query,
            key,
            value,
            resolutions=self.resolutions,
            compression=self.compression,
            feature_map=self.feature_map,
            gate=gate,
            key_weight=self.key_weight,
            value_weight=self.value_weight,
            key_shape=key_shape,
            scale=self.scale,
            key_mask=key_mask,
            cu_seqlens_query=cu_seqlens_query,
            cu_seqlens_key=cu_seqlens_key,
            impl=self.impl,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"resolutions={self.resolutions}, compression={self.compression!r}, feature_map={self.feature_map!r}, "
            f"scale={self.scale}, impl={self.impl!r}"
        )


def check_whole(layer: str, heads_here: int, num_heads: int) -> None:
    """Raise where only some of the heads are here."""
    if heads_here != num_heads:
        raise ValueError(
            f"{layer} cannot be split by heads over processes, since its router sees the queries of all of them, got "
            f"{heads_here} of {num_heads} heads here; leave its projections whole, or use EfficientAttention"
        )


def _checked_resolutions(resolutions: Iterable[int] | None, num_key_heads: int) -> tuple[int, ...]:
    if resolutions is None:
        return tuple(2 ** (num_key_heads - 1 - head) for head in range(num_key_heads))
    checked = sequence_of("resolutions", resolutions, check_integer, otherwise=" or None")
    if len(checked) != num_key_heads:
        raise ValueError(
            f"resolutions must have one entry for each key head, got {len(checked)} of them and {num_key_heads} heads"
        )
    return checked
