"""What the layers of multiresolution attention share: resolutions, weights of windows, and the router."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lineara.nn.router import Router, Routing, check_top_k
from lineara.nn.sequence_attention import ShardedPositions
from lineara.ops import multiresolution_attention
from lineara.ops.checks import check_choice
from lineara.ops.dispatch import IMPLEMENTATIONS


class MultiresolutionHeads(ShardedPositions):
    """`ops.multiresolution_attention` with the weights that belong to it.

    Args:
        num_heads: heads.
        key_dim: channels of all queries, and of all keys, together.
        value_dim: channels of all values together.
        num_axes: axes of the grid of positions: 1 for sequences, 2 for feature maps.
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
        compression: str,
        feature_map: str,
        routing: str | None,
        top_k: int,
        scale: float,
        impl: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_choice("compression", compression, ("mean", "max", "conv"))
        check_choice("feature_map", feature_map, ("softmax", "relu", "elu"))
        check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
        if routing not in ("query", None):
            raise ValueError(f"routing must be 'query' or None, got {routing!r}")
        self.resolutions = _checked_resolutions(resolutions, num_heads)
        self.compression = compression
        self.feature_map = feature_map
        self.scale = scale
        self.impl = impl
        check_top_k(top_k, num_heads)
        self.router = None
        if routing == "query" and num_heads > 1:
            self.router = Router(key_dim, num_heads, top_k, device=device, dtype=dtype)
        self.key_weight = self.value_weight = None
        if compression == "conv":
            sizes = torch.tensor(self.resolutions, device=device, dtype=dtype or torch.get_default_dtype()) ** num_axes
            mean = (1 / sizes)[:, None, None]  # (H, 1, 1)
            largest = max(self.resolutions) ** num_axes
            self.key_weight = nn.Parameter(mean.repeat(1, key_dim // num_heads, largest))
            self.value_weight = nn.Parameter(mean.repeat(1, value_dim // num_heads, largest))

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
            impl=self.impl,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"resolutions={self.resolutions}, compression={self.compression!r}, feature_map={self.feature_map!r}, "
            f"scale={self.scale}, impl={self.impl!r}"
        )


def _checked_resolutions(resolutions: Sequence[int] | None, num_heads: int) -> tuple[int, ...]:
    if resolutions is None:
        return tuple(2 ** (num_heads - 1 - head) for head in range(num_heads))
    if isinstance(resolutions, str) or not isinstance(resolutions, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"resolutions must be a sequence of integers or None, got {resolutions!r}")
    if len(resolutions) != num_heads:
        raise ValueError(
            f"resolutions must have one entry for each head, got {len(resolutions)} of them and num_heads={num_heads}"
        )
    for resolution in resolutions:
        if isinstance(resolution, bool) or not isinstance(resolution, int):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"resolutions must be integers, got {resolution!r}")
        if resolution < 1:
            raise ValueError(f"resolutions must be at least 1, got {resolution}")
    return tuple(resolutions)
