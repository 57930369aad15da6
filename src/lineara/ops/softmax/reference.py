"""Exact dot-product attention over torch's own kernel, and its scaling-normalised form."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalization: str,
    scale: float | None,
    key_mask: Tensor | None,
) -> Tensor:
    attention_mask = None
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]  # (B, 1, M, 1)
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        # An item without a valid position attends to the zeros that stand in its place, so no softmax is empty.
        attention_mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None, :]  # (B, 1, 1, M)
    if key.shape[2] == 0:
        return query.new_zeros((*query.shape[:3], value.shape[3])) + 0.0 * query.sum()
    if normalization == "scaling":
        return _scaling(query, key, value, 1.0 if scale is None else scale, key_mask)
    logit_scale = query.shape[3] ** -0.5 if scale is None else scale**2
    return scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=logit_scale)


def _scaling(query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Divided where it is small: after the product a second N x M tensor would stand beside the first.
    num_valid = key.shape[2] if key_mask is None else key_mask.sum(dim=1, dtype=wide).clamp_min(1)[:, None, None, None]
    products = (query.to(wide) * (scale / num_valid)) @ (key.to(wide) * scale).mT  # (B, H, N, M); masked keys are zeros
    return (products @ value.to(wide)).to(query.dtype)
