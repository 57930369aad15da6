"""The public door of exact dot-product attention, the quadratic baseline."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lineara.ops.checks import (
    NORMALIZATIONS,
    Implementation,
    Normalization,
    check_choice,
    check_inputs,
    check_scale,
)
from lineara.ops.dispatch import choose_implementation
from lineara.ops.packed import cut
from lineara.ops.precision import accumulation_dtype, as_autocast, without_autocast
from lineara.ops.tracing import transform_of


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalization: Normalization = "softmax",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Exact dot-product attention, in time quadratic in the number of positions: the baseline.

        D(Q, K, V) = softmax(scale^2 Q K^T) V            or, with normalization="scaling",    (scale^2 Q K^T / M) V

    where M is the number of valid key positions. The scaling form equals `efficient_attention` with
    `normalization="scaling"` exactly, at quadratic cost; it is the paper's non-local baseline.

    Args:
        query: (batch, heads, query positions, key channels); float64, float32, bfloat16 or float16, any strides.
        key: (batch, heads, key positions, key channels), of the same dtype; its heads may be fewer, as
            `efficient_attention` has it.
        value: (batch, heads, key positions, value channels), of the same dtype.
        normalization: `"softmax"` (over key positions) or `"scaling"`.
        scale: **multiplies both query and key, so that it is the square root of torch's**:
            `scaled_dot_product_attention(query, key, value, scale=s * s)` is this at `scale=s`. None is the field's
            default: (key channels) ** -0.25, so that the products are divided by the square root of the key channels,
            under `"softmax"`; 1 under `"scaling"`.
        key_mask: boolean (batch, key positions), True = takes part. Masked positions never leak, NaN and inf included;
            an item without a valid position gives zeros.
        cu_seqlens_query: of packed sequences, as `efficient_attention` has them; each is a call of torch's of its own.
        cu_seqlens_key: the same for keys and values.
        impl: `"auto"` or `"reference"`: torch's own scaled_dot_product_attention.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the inputs.

    Raises:
        ValueError: for shapes or devices that do not fit, or an unknown `normalization` or `impl`.
        TypeError: for dtypes that differ or are not floating point, or a mask that is not boolean.

    Gradients of gradients are supported under `"scaling"`; otherwise on the CPU torch's kernels have none.

    Cost: O(N M (K + V)) time. Memory O(N M) under `"scaling"` and where torch has no fused kernel for the inputs.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, equation 1; the scaling form is
    Wang et al., "Non-local Neural Networks", CVPR 2018, arXiv 1711.07971, as named in arXiv 1812.01243.
    """
    query, key, value = as_autocast(query, key, value)
    check_inputs(query, key, value, key_mask, cu_seqlens_query, cu_seqlens_key)
    check_choice("normalization", normalization, NORMALIZATIONS)
    choose_implementation("softmax_attention", impl, query, value)
    scale = None if scale is None else check_scale(scale, query.dtype, power=2)
    with without_autocast(query):
        if cu_seqlens_query is None or cu_seqlens_key is None:
            return _attend(query, key, value, key_mask, normalization, scale)
        sequences = zip(cut(cu_seqlens_query, query), cut(cu_seqlens_key, key, value, key_mask))
        outputs = [_attend(q, k, v, mask, normalization, scale) for (q,), (k, v, mask) in sequences]
        return torch.cat(outputs, dim=2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, normalization: str, scale: float | None
) -> Tensor:
    attention_mask = None
    if key_mask is not None:
        hidden = ~key_mask[:, None, :, None]  # (B, 1, M, 1)
        key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        # An item without a valid position attends to the zeros that stand in its place, so no softmax is empty.
        attention_mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None, :]  # (B, 1, 1, M)
    if key.shape[2] == 0:
        nothing = query[:, :, :0].sum() + key.sum() + value.sum()  # 0, with gradients
        return query.new_zeros((*query.shape[:3], value.shape[3])) + nothing
    if normalization == "scaling":
        return _scaling(query, key, value, 1.0 if scale is None else scale, key_mask)
    logit_scale = query.shape[3] ** -0.5 if scale is None else scale**2
    # (A flag that is a symbol while tracing would not do.)
    grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
    call = partial(scaled_dot_product_attention, attn_mask=attention_mask, scale=logit_scale, **grouped)
    if not transform_of(query, key, value):
        return call(query, key, value)
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, because its import takes a while

    with sdpa_kernel(SDPBackend.MATH):  # the others have no derivatives of this kind
        return call(query, key, value)


def _scaling(query: Tensor, key: Tensor, value: Tensor, scale: float, key_mask: Tensor | None) -> Tensor:
    wide = accumulation_dtype(query.dtype)
    # Divided where it is small: after the product a second N x M tensor would stand beside the first.
    num_valid = key.shape[2] if key_mask is None else key_mask.sum(dim=1, dtype=wide).clamp_min(1)[:, None, None, None]
    scaled = query.to(wide) * (scale / num_valid)
    # Heads of queries that see the same keys are further queries: (B, H of keys, all their N, K).
    shared_by = query.shape[1] // max(key.shape[1], 1)
    scaled = scaled.reshape(key.shape[0], key.shape[1], shared_by * query.shape[2], key.shape[3])
    products = scaled @ (key.to(wide) * scale).mT  # masked keys are zeros
    return (products @ value.to(wide)).reshape(*query.shape[:3], value.shape[3]).to(query.dtype)
