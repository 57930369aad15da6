"""Efficient attention for feature maps and volumes: the drop-in for a non-local block."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lineara.nn.checks import (
    check_boolean,
    check_input,
    check_options,
    check_same_batch,
    check_weights,
    num_key_heads_of,
    projected,
    width_of,
    with_own_name,
)
from lineara.nn.sequence_attention import ShardedPositions
from lineara.ops import efficient_attention
from lineara.ops.checks import Implementation, Normalization, check_integer, check_scale
from lineara.ops.tracing import is_exporting


class FeatureMapAttention(nn.Module):
    """1x1 convolutions to queries, keys and values, attention over all positions, reprojection, residual.

    A layer says how to `attend`.
    """

    _axes: tuple[str, ...]

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        zero_init: bool = False,
        num_key_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_weights(dtype, zero_init=zero_init)
        self.dim = dim = check_integer("dim", dim)
        self.num_heads = num_heads = check_integer("num_heads", num_heads)
        self.num_key_heads = num_key_heads_of(num_heads, num_key_heads)
        self.key_dim = width_of("key_dim", key_dim, max(dim // 2, 1), num_heads=num_heads, dim=dim, formula="dim // 2")
        self.value_dim = width_of("value_dim", value_dim, dim, num_heads=num_heads, dim=dim)
        keys, values = (width // num_heads * self.num_key_heads for width in (self.key_dim, self.value_dim))
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        convolution, from_zero = _CONVOLUTIONS[len(self._axes)]
        self.queries = convolution(dim, self.key_dim, 1, **factory)
        self.keys = convolution(dim, keys, 1, **factory)
        self.values = convolution(dim, values, 1, **factory)
        self.reprojection = (from_zero if zero_init else convolution)(self.value_dim, dim, 1, **factory)

    def forward(self, x: Tensor, context: Tensor | None = None, *, key_mask: Tensor | None = None) -> Tensor:
        """Attend from every position of the map `x` to every position of `context`, or of `x` itself, and add `x`.

        Args:
            x: (batch, dim, *positions).
            context: (batch, dim, *positions of any size); None attends to `x`.
            key_mask: boolean (batch, *positions of what is attended to), True = takes part: of maps of several sizes,
                padded to one. It guards keys and values alone: what a masked position of `x` holds reaches no other
                position, but a NaN or an infinity there reaches that position's own output and the gradients of all
                convolutions' weights, as 0 times NaN is NaN: fill padded positions with finite numbers first; leaving
                them out of the loss is not enough.

        Returns:
            A map of the shape of `x`.

        Raises:
            ValueError: for inputs or masks of another shape, or projections that were split over processes.
            TypeError: for a mask that is not boolean, or inputs that are not floating point.
        """
        self._check_input("x", x)
        if context is not None:
            self._check_input("context", context)
            check_same_batch(x, context)
        name, source = ("x", x) if context is None else ("context", context)
        mask = None if key_mask is None else self._flat_mask(key_mask, name, source)  # (B, M)
        # Without names of their own, queries, keys and values are gone when the reprojection needs memory.
        maps = self._join_heads(
            self.attend(
                self._split_heads("queries", _project(self.queries, x, "x"), self.key_dim),  # (B, H, N, K)
                self._split_heads("keys", _project(self.keys, source, name), self.key_dim),  # (B, H, M, K)
                self._split_heads("values", _project(self.values, source, name), self.value_dim),  # (B, H, M, V)
                source.shape[2:],
                key_mask=mask,
                query_mask=mask if context is None else None,
            ),
            x.shape[2:],
        )
        return x + _project(self.reprojection, maps)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_shape: Sequence[int],
        *,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
    ) -> Tensor:
        """The operation, on (batch, heads, positions, channels per head); the keys lie on a grid of `key_shape`.

        The query mask, (batch, query positions), says which queries mean something; None where that is not known.
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        shared = "" if self.num_key_heads == self.num_heads else f", num_key_heads={self.num_key_heads}"
        return f"dim={self.dim}, num_heads={self.num_heads}, key_dim={self.key_dim}, value_dim={self.value_dim}{shared}"

    def _split_heads(self, name: str, maps: Tensor, width_of_all: int) -> Tensor:
        num_heads = self.num_heads if name == "queries" else self.num_key_heads
        width = width_of_all // self.num_heads
        if maps.shape[1] != num_heads * width:
            raise ValueError(
                f"{name} must have {num_heads * width} channels, got {maps.shape[1]}; "
                "a layer for maps cannot be split by heads over processes: leave its convolutions whole"
            )
        flat = maps.flatten(2)  # (B, H * D, N)
        return flat.view(flat.shape[0], num_heads, width, flat.shape[2]).mT  # (B, H, N, D), no copy

    def _join_heads(self, attended: Tensor, shape: Sequence[int]) -> Tensor:
        return attended.mT.reshape(attended.shape[0], self.value_dim, *shape)  # (B, H * V, *positions)

    def _check_input(self, name: str, maps: Tensor) -> None:
        instead = f"pad the maps to one size, and say with key_mask which positions of {name} are theirs"
        check_input(name, maps, ("batch", self.dim, *self._axes), instead_of_nesting=instead)

    def _flat_mask(self, key_mask: Tensor, name: str, source: Tensor) -> Tensor:
        check_boolean("key_mask", key_mask, "True = takes part", beside=(name, source))
        expected = (source.shape[0], *source.shape[2:])
        if tuple(key_mask.shape) != expected:
            raise ValueError(
                f"key_mask must have the shape (batch, {', '.join(self._axes)}) = {expected}, "
                f"got {tuple(key_mask.shape)}"
            )
        return key_mask.flatten(1)


def _project(projection: nn.Module, maps: Tensor, name: str | None = None) -> Tensor:
    """The projection, which may refuse maps without a position: those of a rank whose shard is empty.

    Such maps get one that is dropped again, so that whatever stands in a convolution's place runs, with its hooks.
    """
    if is_exporting() or 0 not in maps.shape:
        return projected(projection, name, maps)
    sides = [side for size in reversed(maps.shape) for side in (0, int(size == 0))]
    result = projected(projection, name, pad(maps, sides))
    for axis, size in enumerate(maps.shape):
        result = result if size else result.narrow(axis, 0, 0)
    return result


class _FromZero(nn.Module):
    """A convolution whose initial weights are zero, whoever resets it and when."""

    def reset_parameters(self) -> None:
        # It draws all the same, so that other weights do not depend on where this one starts.
        super().reset_parameters()  # pyright: ignore[reportUnknownMemberType, reportAttributeAccessIssue] - a mixin
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)


class _Conv1dFromZero(_FromZero, nn.Conv1d): ...


class _Conv2dFromZero(_FromZero, nn.Conv2d): ...


class _Conv3dFromZero(_FromZero, nn.Conv3d): ...


_CONVOLUTIONS: dict[int, tuple[Any, Any]] = {
    1: (nn.Conv1d, _Conv1dFromZero),
    2: (nn.Conv2d, _Conv2dFromZero),
    3: (nn.Conv3d, _Conv3dFromZero),
}


class _EfficientAttention(FeatureMapAttention, ShardedPositions):
    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        normalization: Normalization = "softmax",
        scale: float = 1.0,
        zero_init: bool = False,
        impl: Implementation = "auto",
        num_key_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_options(normalization, impl)
        super().__init__(
            dim,
            num_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            zero_init=zero_init,
            num_key_heads=num_key_heads,
            device=device,
            dtype=dtype,
        )
        self.normalization: Normalization = normalization
        self.scale = check_scale(scale)
        self.impl: Implementation = impl

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_shape: Sequence[int],
        *,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
    ) -> Tensor:
        return efficient_attention(
            query,
            key,
            value,
            normalization=self.normalization,
            scale=self.scale,
            key_mask=key_mask,
            impl=self.impl,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization={self.normalization!r}, scale={self.scale}, impl={self.impl!r}"


@with_own_name("__init__", "forward")
class EfficientAttention1d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, length) maps; see it for the mathematics.

    Arguments, weights and residual are those of `EfficientAttention2d`.
    """

    _axes = ("length",)


@with_own_name("__init__", "forward")
class EfficientAttention2d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, height, width) maps; see it for the mathematics.

    1x1 convolutions named `queries`, `keys`, `values` and `reprojection`, and the input added to the result: what the
    paper puts in place of a non-local block. A state dict of the authors' module loads as it is.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously. 1 is the paper's setting.
        key_dim: channels of all queries together; default dim // 2, the paper's usual choice.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        normalization: `"softmax"` or `"scaling"`.
        scale: multiplies both query and key.
        zero_init: start the reprojection at zero, so that the layer starts as the identity (ours, for extending
            pretrained networks).
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
        device: of the weights.
        dtype: of the weights.
    """

    _axes = ("height", "width")


@with_own_name("__init__", "forward")
class EfficientAttention3d(_EfficientAttention):
    """Layer form of `ops.efficient_attention` for (batch, dim, depth, height, width) volumes.

    Arguments, weights and residual are those of `EfficientAttention2d`.
    """

    _axes = ("depth", "height", "width")
