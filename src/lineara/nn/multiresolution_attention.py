"""Multiresolution attention (AdaMRA) as layers: for sequences, and for feature maps."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lineara.nn.checks import with_own_name
from lineara.nn.feature_map_attention import FeatureMapAttention
from lineara.nn.multiresolution_heads import MultiresolutionHeads, check_whole
from lineara.nn.router import Routing
from lineara.nn.sequence_attention import SequenceAttention
from lineara.ops.checks import Compression, FeatureMap, Implementation


@with_own_name("forward")
class MultiresolutionAttention(SequenceAttention):
    """Layer form of `ops.multiresolution_attention`; see it for the mathematics.

    Heads see keys and values at resolutions from coarse to fine, and a router lets every query use the heads that it
    chooses, scaled by the router's probability:

        p_i = softmax(W_r q_i + b_r) over heads, q_i being the queries of all heads side by side
        g_ih = H p_ih for the top_k likeliest of the H heads, 0 for the others
        y_i = sum_h g_ih W_O^h o_ih + b_O

    It adds the projections, the heads and the router, and neither residual nor normalisation: `EncoderBlock` has those.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously. A single one has no router.
        resolutions: for every key head, the number of positions that one key stands for. Default: the powers of two
            from 2 ** (num_key_heads - 1) down to 1, such as 8, 4, 2, 1.
        compression: how a window becomes one position: `"mean"`, `"max"`, or `"conv"`, a learned sum per channel that
            starts as the mean.
        feature_map: `"softmax"`, `"relu"` or `"elu"` (elu + 1).
        routing: `"query"`, or None: every query uses all heads, unscaled, and there is no router.
        top_k: heads that a query uses under `"query"`: 1 is the paper's reading, `num_heads` a soft choice.
        key_dim: channels of all queries together; default `dim`.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        context_dim: channels of the `context` input of cross-attention; default `dim`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        scale: multiplies both query and key.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
        device: of the weights.
        dtype: of the weights.

    Source: our reading of arXiv 2108.04962. Its abstract states that heads have resolutions and that every query
    decides which one it uses; the form of the router, the gate, `top_k` and load balancing are our choice. `AdaMRA` is
    another name of this class.

    Example:
        >>> layer = MultiresolutionAttention(64, num_heads=4)
        >>> layer(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
        >>> layer.last_routing.load.shape
        torch.Size([4])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        resolutions: Sequence[int] | None = None,
        compression: Compression = "mean",
        feature_map: FeatureMap = "softmax",
        routing: Literal["query"] | None = "query",
        top_k: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        context_dim: int | None = None,
        qkv_bias: bool = True,
        scale: float = 1.0,
        impl: Implementation = "auto",
        num_key_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
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
        self.heads = MultiresolutionHeads(
            self.num_heads,
            self.key_dim,
            self.value_dim,
            num_axes=1,
            resolutions=resolutions,
            compression=compression,
            feature_map=feature_map,
            routing=routing,
            top_k=top_k,
            scale=scale,
            impl=impl,
            num_key_heads=self.num_key_heads,
            device=device,
            dtype=dtype,
        )

    @property
    def last_routing(self) -> Routing | None:
        """What the router decided in the last forward call; None before it, without a router, and in copies.

        Its `load_balancing` has a gradient as long as the output of that call is kept, as a loss keeps it. What
        torch.compile has compiled leaves the term with its graph here until the next call.
        """
        return self.heads.last_routing

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
        return self.heads(
            query,
            key,
            value,
            key_mask=key_mask,
            query_mask=query_mask,
            cu_seqlens_query=cu_seqlens_query,
            cu_seqlens_key=cu_seqlens_key,
        )

    def _check_heads(self, query: int, key: int, value: int) -> None:
        check_whole(type(self).__name__, query, self.num_heads)
        super()._check_heads(query, key, value)


class _MultiresolutionMaps(FeatureMapAttention):
    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        *,
        resolutions: Sequence[int] | None = None,
        compression: Compression = "mean",
        feature_map: FeatureMap = "softmax",
        routing: Literal["query"] | None = "query",
        top_k: int = 1,
        key_dim: int | None = None,
        value_dim: int | None = None,
        scale: float = 1.0,
        zero_init: bool = False,
        impl: Implementation = "auto",
        num_key_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
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
        self.heads = MultiresolutionHeads(
            self.num_heads,
            self.key_dim,
            self.value_dim,
            num_axes=len(self._axes),
            resolutions=resolutions,
            compression=compression,
            feature_map=feature_map,
            routing=routing,
            top_k=top_k,
            scale=scale,
            impl=impl,
            num_key_heads=self.num_key_heads,
            device=device,
            dtype=dtype,
        )

    @property
    def last_routing(self) -> Routing | None:
        """What the router decided in the last forward call, positions row by row; see `MultiresolutionAttention`."""
        return self.heads.last_routing

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
        return self.heads(query, key, value, key_shape=key_shape, key_mask=key_mask, query_mask=query_mask)


@with_own_name("__init__", "forward")
class MultiresolutionAttention2d(_MultiresolutionMaps):
    """Layer form of `ops.multiresolution_attention` for (batch, dim, height, width) maps; windows are squares.

    A head of resolution r sees the context in windows of r x r pixels; those at the right and bottom edges may be
    partial. Projections, residual and their names are those of `EfficientAttention2d`; heads, resolutions and routing
    those of `MultiresolutionAttention`.

    Args:
        dim: channels of the input and of the output.
        num_heads: heads; they split key and value channels contiguously. A single one has no router.
        resolutions: for every key head, the side in pixels of the square that one key stands for. Default: the powers
            of two from 2 ** (num_key_heads - 1) down to 1.
        compression: `"mean"`, `"max"` or `"conv"`.
        feature_map: `"softmax"`, `"relu"` or `"elu"` (elu + 1).
        routing: `"query"` or None.
        top_k: heads that a pixel uses under `"query"`.
        key_dim: channels of all queries together; default dim // 2.
        value_dim: channels of all values together, those that heads share counted for each; default `dim`.
        scale: multiplies both query and key.
        zero_init: start the reprojection at zero, so that the layer starts as the identity.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.
        num_key_heads: heads of keys and values; each serves num_heads / num_key_heads heads of queries that follow one
            another. Default `num_heads`.
        device: of the weights.
        dtype: of the weights.

    Source: ours, after arXiv 2108.04962, whose abstract speaks of sequences.
    """

    _axes = ("height", "width")


@with_own_name("__init__", "forward")
class MultiresolutionAttention3d(_MultiresolutionMaps):
    """Layer form of `ops.multiresolution_attention` for (batch, dim, depth, height, width) volumes; windows are cubes.

    Arguments and residual are those of `MultiresolutionAttention2d`.
    """

    _axes = ("depth", "height", "width")
