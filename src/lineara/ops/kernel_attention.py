"""The public door of kernel attention: signature, meaning and checks."""

from typing import TYPE_CHECKING

from torch import Tensor

from lineara.ops.checks import (
    Implementation,
    check_choice,
    check_inputs,
    check_scale,
)
from lineara.ops.linear import attention
from lineara.ops.linear.feature_maps import KERNEL_MAPS, KernelMap
from lineara.ops.linear.windows import Keys
from lineara.ops.precision import as_autocast
from lineara.ops.sequence_parallel import name_of_group

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group


def kernel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: KernelMap = "elu",
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    impl: Implementation = "auto",
    group: "Group" = None,
) -> Tensor:
    """Attention with a kernel in place of the softmax, in time and memory linear in the number of positions.

        o_i = phi(q_i) C / (phi(q_i) . z),   C = sum_j phi(k_j)^T v_j,   z = sum_j phi(k_j)

    phi(x) is relu(scale x) or elu(scale x) + 1, channel by channel. The implied attention weights
    phi(q_i) . phi(k_j) / (phi(q_i) . z) are non-negative and sum to 1; where the denominator is 0, which relu allows,
    or below the smallest normal number, the output is 0. (With softmaxes as feature maps this is
    `efficient_attention`.)

    Args:
        query: (batch, heads, query positions, key channels); float64, float32, bfloat16 or float16, any strides.
        key: (batch, heads, key positions, key channels), of the same dtype; its heads may be fewer, as
            `efficient_attention` has it.
        value: (batch, heads, key positions, value channels), of the same dtype.
        feature_map: `"relu"` or `"elu"`, which is elu + 1.
        scale: multiplies both query and key; under relu a positive one changes nothing.
        key_mask: boolean (batch, key positions), True = takes part. What a masked position holds, NaN and inf
            included, reaches neither the output nor a gradient. An item without a valid position gives zeros.
        cu_seqlens_query: of packed sequences, as `efficient_attention` has them.
        cu_seqlens_key: the same for keys and values.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`: the means, never the mathematics. `"triton"` needs
            a GPU, at most 512 channels per head and no float64; `explain_implementation` says what `"auto"` picks.
        group: the ranks over which the positions are sharded, as `efficient_attention` has it.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the inputs. Sums are kept in float32, or in
        float64 for float64 inputs.

    Raises:
        ValueError: for shapes or devices that do not fit, an unknown `feature_map` or `impl`, or a group that this rank
            cannot talk to.
        TypeError: for dtypes that differ or are not floating point, a mask that is not boolean, or a wrong group.

    Cost: O((N + M) K V) time for N query positions, M key positions, K key and V value channels per head. Memory
    beyond inputs and output: O(N K + M (K + V)) with `"reference"`; O(K V) and buffers of constant size with
    `"streaming"`, which with gradients keeps its weights where no tensor has more than 2 Mi elements. With a group,
    messages of K (V + 1) numbers per head forward and as many backward.

    Source: Katharopoulos, Vyas, Pappas, Fleuret, "Transformers are RNNs: Fast Autoregressive Transformers with Linear
    Attention", ICML 2020, arXiv 2006.16236, equations 4 to 7 (elu + 1). Masks and `scale` are ours.

    Gradients of any order are supported; `"auto"` also supports torch.func transforms, forward mode and torch.export.
    """
    query, key, value = as_autocast(query, key, value)
    check_inputs(query, key, value, key_mask, cu_seqlens_query, cu_seqlens_key)
    check_choice("feature_map", feature_map, KERNEL_MAPS)
    return attention.linear_attention(
        "kernel_attention",
        query,
        Keys(key, value, key_mask, cu_seqlens_key),
        feature_map,
        check_scale(scale, query.dtype),
        cu_seqlens_query=cu_seqlens_query,
        impl=impl,
        group_name=name_of_group(group, query, key, value),
    )
