"""Non-local attention for feature maps and volumes: the quadratic baseline that efficient attention replaces."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lineara.nn.checks import check_options, with_own_name
from lineara.nn.feature_map_attention import FeatureMapAttention
from lineara.ops import softmax_attention
from lineara.ops.checks import Implementation, Normalization, check_scale


class _NonLocalAttention(FeatureMapAttention):
    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        normalization: Normalization = "scaling",
        scale: float | None = None,
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
        self.scale = None if scale is None else check_scale(scale)
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
        return softmax_attention(
            query,
            key,
            value,
            normalization=self.normalization,
            scale=self.scale,
            key_mask=key_mask,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization={self.normalization!r}, scale={self.scale}, impl={self.impl!r}"


@with_own_name("__init__", "forward")
class NonLocalAttention2d(_NonLocalAttention):
    """Layer form of `ops.softmax_attention` for (batch, dim, height, width) maps: a non-local block.

    Projections, residual and their names are those of `EfficientAttention2d`, so that the two differ in the operation
    alone: with normalization="scaling" they compute the same function of the same weights.

    **`scale` multiplies both query and key, so that torch's scale is its square**:
    `scaled_dot_product_attention(q, k, v, scale=s * s)` under `"softmax"`.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously.
        key_dim: channels of all queries together; default dim // 2.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        normalization: `"scaling"`, dot products divided by the number of positions, or `"softmax"`.
        scale: multiplies both query and key; None divides their products by the square root of a head's key channels
            under `"softmax"`.
        zero_init: start the reprojection at zero, so that the layer starts as the identity.
        impl: `"auto"` or `"reference"`.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
        device: of the weights.
        dtype: of the weights.

    Source: Wang, Girshick, Gupta, He, "Non-local Neural Networks", CVPR 2018, arXiv 1711.07971. Theirs
    has dim // 2 value channels; the default here is that of efficient attention, for the sake of comparison.
    """

    _axes = ("height", "width")


@with_own_name("__init__", "forward")
class NonLocalAttention3d(_NonLocalAttention):
    """Layer form of `ops.softmax_attention` for (batch, dim, depth, height, width) volumes.

    Arguments, weights and residual are those of `NonLocalAttention2d`.
    """

    _axes = ("depth", "height", "width")
