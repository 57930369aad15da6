"""Exact dot-product attention as a layer for sequences: the quadratic baseline."""

import torch
from torch import Tensor

from lineara.nn.checks import check_options, with_own_name
from lineara.nn.sequence_attention import SequenceAttention
from lineara.ops import softmax_attention
from lineara.ops.checks import Implementation, Normalization, check_scale


@with_own_name("forward")
class SoftmaxAttention(SequenceAttention):
    """Layer form of `ops.softmax_attention`; see it for the mathematics.

    **`scale` multiplies both query and key, so that torch's scale is its square**:
    `scaled_dot_product_attention(q, k, v, scale=s * s)` is what `SoftmaxAttention(..., scale=s)` computes.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously.
        key_dim: channels of all queries together; default `dim`.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        context_dim: channels of the `context` input of cross-attention; default `dim`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        normalization: `"softmax"` or `"scaling"`.
        scale: multiplies both query and key; None divides their products by the square root of a head's key channels
            under `"softmax"`.
        impl: `"auto"` or `"reference"`.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
        device: of the weights.
        dtype: of the weights.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        normalization: Normalization = "softmax",
        scale: float | None = None,
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
            context_dim=context_dim,
            qkv_bias=qkv_bias,
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
        *,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        cu_seqlens_query: Tensor | None,
        cu_seqlens_key: Tensor | None,
    ) -> Tensor:
        return softmax_attention(
            query,
            key,
            value,
            normalization=self.normalization,
            scale=self.scale,
            key_mask=key_mask,
            impl=self.impl,
            cu_seqlens_query=cu_seqlens_query,
            cu_seqlens_key=cu_seqlens_key,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, normalization={self.normalization!r}, scale={self.scale}, impl={self.impl!r}"
