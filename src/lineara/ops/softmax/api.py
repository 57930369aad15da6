"""The public door of exact dot-product attention, the quadratic baseline."""

from torch import Tensor

from lineara.ops.checks import check_choice, check_key_and_value, check_key_mask, check_query_and_key, check_scale
from lineara.ops.dispatch import choose_implementation
from lineara.ops.softmax import reference

NORMALIZATIONS = ("softmax", "scaling")


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalization: str = "softmax",
    scale: float | None = None,
    key_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Exact dot-product attention, in time quadratic in the number of positions: the baseline.

        D(Q, K, V) = softmax(scale^2 Q K^T) V            or, with normalization="scaling",    (scale^2 Q K^T / M) V

    where M is the number of valid key positions. The scaling form equals `efficient_attention` with
    `normalization="scaling"` exactly, at quadratic cost; it is the paper's non-local baseline.

    Args:
        query: (batch, heads, query positions, key channels); float64, float32, bfloat16 or float16, any strides.
        key: (batch, heads, key positions, key channels), of the same dtype.
        value: (batch, heads, key positions, value channels), of the same dtype.
        normalization: `"softmax"` (over key positions) or `"scaling"`.
        scale: multiplies both query and key. None is the field's default: (key channels) ** -0.25, so that the products
            are divided by the square root of the key channels, under `"softmax"`; 1 under `"scaling"`.
        key_mask: boolean (batch, key positions), True = takes part. Masked positions never leak, NaN and inf included;
            an item without a valid position gives zeros.
        impl: `"auto"` or `"reference"`: torch's own scaled_dot_product_attention.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the inputs.

    Raises:
        ValueError: for shapes or devices that do not fit, or an unknown `normalization` or `impl`.
        TypeError: for dtypes that differ or are not floating point, or a mask that is not boolean.

    Cost: O(N M (K + V)) time. Memory O(N M) under `"scaling"` and where torch has no fused kernel for the inputs.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017, arXiv 1706.03762, equation 1; the scaling form is
    Wang et al., "Non-local Neural Networks", CVPR 2018, arXiv 1711.07971, as named in arXiv 1812.01243.
    """
    check_key_and_value(key, value)
    check_query_and_key(query, key)
    check_key_mask(key_mask, key)
    check_choice("normalization", normalization, NORMALIZATIONS)
    if scale is not None:
        check_scale(scale)
    choose_implementation("softmax_attention", impl, query, value)
    return reference.softmax_attention(query, key, value, normalization=normalization, scale=scale, key_mask=key_mask)
