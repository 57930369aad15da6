"""Efficient attention for feature maps and volumes: the drop-in for a non-local block."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lineara.nn.sequence_attention import ShardedPositions, check_options, check_widths
from lineara.ops import efficient_attention


class FeatureMapAttention(nn.Module):
    """1x1 convolutions to queries, keys and values, attention over all positions, reprojection, residual.

    A layer says how to `attend`.
    """

    _convolution: type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]
    _axes: tuple[str, ...]

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.key_dim = max(dim // 2, 1) if key_dim is None else key_dim
        self.value_dim = dim if value_dim is None else value_dim
        check_widths(num_heads, dim=dim, key_dim=self.key_dim, value_dim=self.value_dim)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.queries = self._convolution(dim, self.key_dim, 1, **factory)
        self.keys = self._convolution(dim, self.key_dim, 1, **factory)
        self.values = self._convolution(dim, self.value_dim, 1, **factory)
        self.reprojection = self._convolution(self.value_dim, dim, 1, **factory)
        if zero_init:
            nn.init.zeros_(self.reprojection.weight)
            if self.reprojection.bias is not None:
                nn.init.zeros_(self.reprojection.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attend from every position of the map `x` to every position of `context`, or of `x` itself, and add `x`.

        Args:
            x: (batch, dim, *positions).
            context: (batch, dim, *positions of any size); None attends to `x`.

        Returns:
            A map of the shape of `x`.

        Raises:
            ValueError: for inputs of another shape.
        """
        self._check_input("x", x)
        if context is None:
            context = x
        else:
            self._check_input("context", context)
        # Without names of their own, queries, keys and values are gone when the reprojection needs memory.
        maps = self._join_heads(
            self.attend(
                self._split_heads(_project(self.queries, x)),  # (B, H, N, K)
                self._split_heads(_project(self.keys, context)),  # (B, H, M, K)
                self._split_heads(_project(self.values, context)),  # (B, H, M, V)
                context.shape[2:],
            ),
            x.shape[2:],
        )
        return x + _project(self.reprojection, maps)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_shape: Sequence[int]) -> Tensor:
        """The operation, on (batch, heads, positions, channels per head); the keys lie on a grid of `key_shape`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}"

    def _split_heads(self, maps: Tensor) -> Tensor:
        batch, channels = maps.shape[:2]
        num_positions = math.prod(maps.shape[2:])
        return maps.reshape(
            batch, self.num_heads, channels // self.num_heads, num_positions
        ).mT  # (B, H, N, D), no copy

    def _join_heads(self, attended: Tensor, shape: Sequence[int]) -> Tensor:
        return attended.mT.reshape(attended.shape[0], self.value_dim, *shape)  # (B, H * V, *positions)

    def _check_input(self, name: str, maps: Tensor) -> None:
        if maps.dim() != 2 + len(self._axes) or maps.shape[1] != self.dim:
            raise ValueError(
                f"{name} must have the shape (batch, {self.dim}, {', '.join(self._axes)}), got {tuple(maps.shape)}"
            )


def _project(convolution: nn.Module, maps: Tensor) -> Tensor:
    """The convolution, which refuses maps without a position: those of a rank whose shard is empty."""
    if maps.numel():
        return convolution(maps)
    assert isinstance(convolution, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    projected = nn.functional.linear(maps.movedim(1, -1), convolution.weight.flatten(1), convolution.bias)
    return projected.movedim(-1, 1)


class _EfficientAttention(FeatureMapAttention, ShardedPositions):
    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        normalization: str = "softmax",
        scale: float = 1.0,
        zero_init: bool = False,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(normalization, impl)
        super().__init__(
            dim, num_heads, key_dim=key_dim, value_dim=value_dim, zero_init=zero_init, device=device, dtype=dtype
        )
        self.normalization = normalization
        self.scale = scale
        self.impl = impl

    def attend(self, query: Tensor, key: Tensor, value: Tensor, key_shape: Sequence[int]) -> Tensor:
        return efficient_attention(
            query,
            key,
            value,
            normalization=self.normalization,
            scale=self.scale,
            impl=self.impl,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization={self.normalization!r}, scale={self.scale}, impl={self.impl!r}"


class EfficientAttention1d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, length) maps; see it for the mathematics.

    Arguments, weights and residual are those of `EfficientAttention2d`.
    """

    _convolution = nn.Conv1d
    _axes = ("length",)


class EfficientAttention2d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, height, width) maps; see it for the mathematics.

    1x1 convolutions named `queries`, `keys`, `values` and `reprojection`, and the input added to the result: what the
    paper puts in place of a non-local block. A state dict of the authors' module loads as it is.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously. 1 is the paper's setting.
        key_dim: channels of all queries, and of all keys, together; default dim // 2, the paper's usual choice.
        value_dim: channels of all values together; default `dim`.
        normalization: `"softmax"` or `"scaling"`.
        scale: multiplies both query and key.
        zero_init: start the reprojection at zero, so that the layer starts as the identity (ours, for extending
            pretrained networks).
        impl: `"auto"`, `"reference"` or `"streaming"`.
        device: of the weights.
        dtype: of the weights.
    """

    _convolution = nn.Conv2d
    _axes = ("height", "width")


class EfficientAttention3d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, depth, height, width) volumes.

    Arguments, weights and residual are those of `EfficientAttention2d`.
    """

    _convolution = nn.Conv3d
    _axes = ("depth", "height", "width")
