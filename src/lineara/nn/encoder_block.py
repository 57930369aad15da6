"""The pre-norm transformer block around any attention layer."""

from typing import Any

import torch
from torch import Tensor, nn

from lineara.nn.checks import check_input, check_layer, check_weights, probability, projected
from lineara.nn.sequence_attention import SequenceAttention
from lineara.ops.checks import check_integer


class EncoderBlock(nn.Module):
    """A pre-norm encoder block that takes any attention layer.

        x = x + dropout(attention(norm(x), context, key_mask)),    x = x + mlp(norm(x))

    Args:
        dim: channels of the input and of the output.
        attention: a layer called as attention(x, context, key_mask=...), and with cu_seqlens and context_cu_seqlens
            where those are given; such as `EfficientAttention(dim, ...)`.
        mlp_dim: channels between the two linear maps of the feed-forward part; default 4 * dim.
        dropout: probability, after attention and after both linear maps of the feed-forward part.
        device: of the weights made here (not of `attention`).
        dtype: of the weights made here.

    Source: Xiong et al., "On Layer Normalization in the Transformer Architecture", ICML 2020, arXiv 2002.04745.

    Example:
        >>> block = EncoderBlock(64, EfficientAttention(64, num_heads=2), dropout=0.1)
        >>> block(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        *,
        mlp_dim: int | None = None,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_weights(dtype)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim = check_integer("dim", dim)
        mlp_dim = 4 * dim if mlp_dim is None else check_integer("mlp_dim", mlp_dim)
        dropout = probability("dropout", dropout)
        check_layer("attention", attention)
        if isinstance(attention, SequenceAttention) and attention.dim != dim:
            raise ValueError(
                f"attention must be a layer of dim={dim} channels, got one of {attention.dim}; give both one dim"
            )
        self.attention_norm = nn.LayerNorm(dim, **factory)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(dim, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim, **factory),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, dim, **factory),
            nn.Dropout(dropout),
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """(batch, positions, dim) to the same; all other arguments go to the attention layer as they are."""
        check_input(
            "x",
            x,
            ("batch", "positions", self.dim),
            instead_of_nesting="pack its sequences into a batch of one, torch.cat(x.unbind())[None], and say where "
            "each begins with cu_seqlens",
        )
        packing = {"cu_seqlens": cu_seqlens, "context_cu_seqlens": context_cu_seqlens}
        given = {name: tensor for name, tensor in packing.items() if tensor is not None}
        x = x + self.dropout(
            self.attention(projected(self.attention_norm, "x", x), context, key_mask=key_mask, **given)
        )
        return x + self.mlp(self.mlp_norm(x))

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
