"""The public door of efficient attention: signatures, meaning and checks; `dispatch` picks what runs."""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from lineara.ops.checks import (
    NORMALIZATIONS,
    Implementation,
    Normalization,
    check_choice,
    check_cu_seqlens,
    check_inputs,
    check_key_and_value,
    check_key_mask,
    check_query_heads,
    check_same_dtype_and_device,
    check_scale,
    check_tensor,
)
from lineara.ops.dispatch import choose_implementation, is_short
from lineara.ops.linear import attention, reference
from lineara.ops.linear.windows import Keys, Windows
from lineara.ops.packed import in_sequences
from lineara.ops.precision import accumulation_dtype, as_autocast, without_autocast
from lineara.ops.sequence_parallel import merge_over_group, name_of_group

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group

_FEATURE_MAPS = {"softmax": "softmax", "scaling": "identity"}


class ContextSummary(NamedTuple):
    """What efficient attention keeps of a set of keys and values; `merge_contexts` joins two of them exactly.

    `maximum` (m), `total` (s) and `weighted_sum` (S) hold, for every key channel k and value channel v,

        m_k = max_i scale key_ik,   s_k = sum_i exp(scale key_ik - m_k),   S_kv = sum_i exp(scale key_ik - m_k) value_iv

    under softmax normalisation, and m_k = 0, s_k = number of valid positions, S_kv = sum_i scale key_ik value_iv under
    scaling. The context matrix is S / s either way. An empty set has m = -inf (softmax), s = 0 and S = 0. They are
    float64 for float64 inputs and float32 otherwise. The maximum is a shift that cancels in S / s: no gradient flows
    through it.
    """

    maximum: Tensor  # (batch, heads, key channels)
    total: Tensor  # (batch, heads, key channels)
    weighted_sum: Tensor  # (batch, heads, key channels, value channels)
    normalization: str
    scale: float


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalization: Normalization = "softmax",
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    impl: Implementation = "auto",
    group: "Group" = None,
) -> Tensor:
    """Attention through a small context matrix, in time and memory linear in the number of positions.

        E(Q, K, V) = rho_q(scale Q) ( rho_k(scale K)^T V )

    Under `"softmax"`, rho_q is the softmax over the channels of each query and rho_k the softmax over the positions
    of each key channel: the rows of the implied attention matrix rho_q rho_k^T are non-negative and sum to 1, but it is
    not softmax(Q K^T). Under `"scaling"`, both divide by the square root of the number of valid key positions M, which
    makes the result exactly dot-product attention with scaling normalisation, (Q K^T / M) V.

    Args:
        query: (batch, heads, query positions, key channels); float64, float32, bfloat16 or float16, any strides.
        key: (batch, heads, key positions, key channels), of the same dtype. Keys and values may have fewer heads than
            queries, a divisor of their number: neighbouring heads of queries then share one of keys (grouped queries).
        value: (batch, heads, key positions, value channels), of the same dtype.
        normalization: `"softmax"` or `"scaling"`.
        scale: multiplies both query and key. (key channels) ** -0.25 mimics scaled dot-product attention, as the first
            author confirms in the tracker of the published module.
        key_mask: boolean (batch, key positions), True = takes part. What a masked position holds, NaN and inf
            included, reaches neither the output nor a gradient. An item without a valid position gives zeros.
        cu_seqlens_query: for sequences of several lengths, packed one after the other into a batch of one: where each
            begins, and last where the last one ends, (number of sequences + 1,) of int32 or int64, rising from 0 to the
            number of query positions. Each sequence attends to its own keys. `"triton"` cannot look at the numbers
            without waiting for the GPU: there, positions that they leave out get zeros.
        cu_seqlens_key: the same for keys and values.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`: the means, never the mathematics. `"triton"` needs
            a GPU, at most 512 channels per head and no float64; `explain_implementation` says what `"auto"` picks.
        group: the ranks over which the positions are sharded, a torch.distributed ProcessGroup or a DeviceMesh of one
            dimension: every rank passes its own part of queries, keys and values, and gets the answers to its own
            queries. None: all positions are here. All ranks must call alike (in shapes but those of positions, dtypes,
            options and what needs gradients), which cannot be checked without traffic: where they do not, the call
            hangs or fails inside torch. See docs/sequence_parallel.md.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the inputs. Sums are kept in float32, or in
        float64 for float64 inputs. A CPU with instructions for bfloat16 multiplies it: short sequences (up to 2 Mi
        elements) are summed in float32, and the context matrix is rounded to bfloat16, as by torch's own products.

    Raises:
        ValueError: for shapes or devices that do not fit, an unknown `normalization` or `impl`, or a group that this
            rank cannot talk to.
        TypeError: for dtypes that differ or are not floating point, a mask that is not boolean, or a wrong group.

    Cost: O((N + M) K V) time for N query positions, M key positions, K key and V value channels per head. Memory
    beyond inputs and output: O(N K + M (K + V)) with `"reference"`; O(K V) and buffers of constant size with
    `"streaming"`, which with gradients keeps its weights where no tensor has more than 2 Mi elements. With a group,
    messages of K (V + 2) numbers per head forward (K (V + 1) under scaling) and K V backward.

    Source: Shen, Zhang, Zhao, Yi, Li, "Efficient Attention: Attention with Linear Complexities", WACV 2021,
    arXiv 1812.01243. Masks, `scale` and cross-attention are ours.

    Gradients of any order are supported; `"auto"` also supports torch.func transforms, forward mode and torch.export.
    """
    if (
        impl == "auto"
        and normalization == "softmax"
        and type(scale) is float
        and scale == 1.0
        and key_mask is cu_seqlens_query is cu_seqlens_key is group is None
        and is_short(query, key, value)
        and (output := reference.efficient_attention(query, key, value)) is not None
    ):
        return output
    query, key, value = as_autocast(query, key, value)
    check_inputs(query, key, value, key_mask, cu_seqlens_query, cu_seqlens_key)
    check_choice("normalization", normalization, NORMALIZATIONS)
    return attention.linear_attention(
        "efficient_attention",
        query,
        Keys(key, value, key_mask, cu_seqlens_key),
        _FEATURE_MAPS[normalization],
        check_scale(scale, query.dtype),
        cu_seqlens_query=cu_seqlens_query,
        impl=impl,
        group_name=name_of_group(group, query, key, value),
    )


def summarize_context(
    key: Tensor,
    value: Tensor,
    *,
    normalization: Normalization = "softmax",
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    impl: Implementation = "auto",
) -> ContextSummary:
    """Summarise keys and values to what efficient attention needs of them, whatever their number of positions.

        m_k = max_i scale K_ik,   s_k = sum_i exp(scale K_ik - m_k),   S_kv = sum_i exp(scale K_ik - m_k) V_iv

    (`"softmax"`; under `"scaling"` m = 0, s is the number of valid positions and S = scale K^T V). The context matrix
    is S / s. Summaries of parts merge exactly (`merge_contexts`), so keys and values may come in chunks, be summarised
    once for many queries, or live on several machines.

    Args:
        key: (batch, heads, key positions, key channels); the number of positions may be 0.
        value: (batch, heads, key positions, value channels).
        normalization: `"softmax"` or `"scaling"`.
        scale: multiplies the key here, and the query in `attend_context`, which reads it from the summary.
        key_mask: boolean (batch, key positions), True = takes part.
        cu_seqlens: of packed sequences, as `efficient_attention` has them; the summary has one item per sequence.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.

    Returns:
        A named tuple of `maximum` m and `total` s, both (batch, heads, key channels), `weighted_sum` S
        (batch, heads, key channels, value channels), `normalization` and `scale`. The tensors are float64 for float64
        inputs and float32 otherwise. Gradients flow through s and S; m is a shift that cancels in S / s and has none.

    Raises:
        ValueError, TypeError: as `efficient_attention`.

    Cost: O(M K V) time; the result has K (V + 2) numbers per head.

    Source: ours, from the associativity of the sums of arXiv 1812.01243 with the running maximum of online softmax.
    """
    key, value = as_autocast(key, value)
    check_key_and_value(key, value)
    check_key_mask(key_mask, key)
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "key", key)
    scale = check_scale(scale, key.dtype)
    implementation = choose_implementation("efficient_attention", impl, key, value)
    with without_autocast(key):
        keys, name = Keys(key, value, key_mask, cu_seqlens), _FEATURE_MAPS[normalization]
        return ContextSummary(*attention.summarize(implementation, keys, Windows(), name, scale), normalization, scale)


def merge_contexts(first: ContextSummary, *others: ContextSummary, group: "Group" = None) -> ContextSummary:
    """Merge summaries of disjoint sets of positions into the summary of their union, in any order and grouping.

        m = max(m1, m2),   s = s1 exp(m1 - m) + s2 exp(m2 - m),   S likewise

    Args:
        first: a summary from `summarize_context`.
        others: any number of further ones, of the same shapes, normalisation and scale.
        group: ranks whose summaries are merged too, as `efficient_attention` has it; every rank gets the result.

    Returns:
        The summary of all their positions.

    Raises:
        ValueError: for shapes, normalisations, scales or devices that differ, or a group that this rank cannot talk to.
        TypeError: for dtypes that differ, or arguments that are not summaries or not a group.

    Cost: O(K V) time and memory per summary and head. With a group, messages of K (V + 2) numbers per head forward
    (K (V + 1) under scaling) and K (V + 1) backward.

    Source: ours; see `summarize_context`.
    """
    for summary in (first, *others):
        _check_summary(summary)
    merged = first
    for other in others:
        for name in ("normalization", "scale"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(
                    f"contexts must have the same {name} to be merged, got {getattr(first, name)!r} and "
                    f"{getattr(other, name)!r}; summarize both with the same one"
                )
        if other.weighted_sum.shape != first.weighted_sum.shape:
            raise ValueError(
                "contexts must have the same shape (batch, heads, key channels, value channels) to be merged, got "
                f"{tuple(first.weighted_sum.shape)} and {tuple(other.weighted_sum.shape)}"
            )
        check_same_dtype_and_device(("context", "other context"), (first.weighted_sum, other.weighted_sum))
        merged = ContextSummary(*reference.merge(merged[:3], other[:3]), *first[3:])
    group_name = name_of_group(group, *merged[:3])
    return ContextSummary(*merge_over_group(merged[:3], group_name), *first[3:]) if group_name else merged


def attend_context(
    query: Tensor, context: ContextSummary, *, cu_seqlens: Tensor | None = None, impl: Implementation = "auto"
) -> Tensor:
    """Answer queries from a summary of keys and values, as `efficient_attention` would from the keys and values.

        O = rho_q(scale Q) (S / s)

    Args:
        query: (batch, heads, query positions, key channels).
        context: the summary, from `summarize_context` or `merge_contexts`; it carries normalisation and scale.
        cu_seqlens: of packed sequences, as `efficient_attention` has them; the context has one item per sequence.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the query; zeros where the summary is empty.

    Raises:
        ValueError: for shapes or devices that do not fit, or an unknown `impl`.
        TypeError: for a context that is no summary, or a query whose dtype does not fit the summary's (a float64 query
            goes with a float64 summary, every other one with float32).

    Cost: O(N K V) time.

    Source: Shen et al., WACV 2021, arXiv 1812.01243; see `efficient_attention`.
    """
    check_tensor("query", query)
    _check_summary(context)
    check_cu_seqlens("cu_seqlens", cu_seqlens, "query", query)
    (query,) = as_autocast(query)
    check_query_heads(query.shape[1], context.total.shape[1], "context")
    expected = (in_sequences(query, cu_seqlens), context.total.shape[1], query.shape[3])
    if tuple(context.total.shape) != expected:
        raise ValueError(
            "query and context must have the same batch size (with cu_seqlens: number of sequences) and number of key "
            f"channels, got {(expected[0], expected[2])} and {(context.total.shape[0], context.total.shape[2])}"
        )
    if accumulation_dtype(query.dtype) != context.total.dtype:
        raise TypeError(
            f"a {query.dtype} query needs a context of {accumulation_dtype(query.dtype)}, got {context.total.dtype}; "
            "summarize keys and values of the query's dtype"
        )
    if query.device != context.total.device:
        raise ValueError(
            f"query and context must be on the same device, got {query.device} and {context.total.device}; "
            "move one of them"
        )
    _, total, weighted_sum, normalization, scale = context
    implementation = choose_implementation("efficient_attention", impl, query, weighted_sum, total)
    with without_autocast(query):
        name = _FEATURE_MAPS[normalization]
        return attention.attend(implementation, query, total, weighted_sum, None, cu_seqlens, name, scale)


def _is_whole(*tensors: Tensor) -> bool:
    if not all(isinstance(tensor, Tensor) for tensor in tensors):  # pyright: ignore[reportUnnecessaryIsInstance]
        return False
    kinds = {(tensor.dtype, tensor.device) for tensor in tensors}
    maximum, total, weighted_sum = (tensor.shape for tensor in tensors)
    return len(kinds) == 1 and len(weighted_sum) == 4 and maximum == total == weighted_sum[:3]


def _check_summary(context: ContextSummary) -> None:
    if not isinstance(context, ContextSummary):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"a context must come from summarize_context or merge_contexts, got {type(context).__name__}")
    if not _is_whole(*context[:3]):
        raise ValueError(
            "the tensors of a context must have the shapes (batch, heads, key channels) twice and (batch, heads, key "
            "channels, value channels), one dtype and one device; use what summarize_context gives as it is"
        )
    check_choice("normalization", context.normalization, NORMALIZATIONS)
    check_scale(context.scale, context.total.dtype)
