"""From checked arguments to the arithmetic: summarise keys and values, over all ranks, and let queries attend.

    attention(Q, K, V) = attend(Q, over_group(summarize(K, V)))

Every public operation of linear attention is this one, under a feature map and with or without windows.
"""

from torch import Tensor

from lineara.ops import library
from lineara.ops.dispatch import choose_implementation
from lineara.ops.linear import one_block, operators, reference, shards, windows
from lineara.ops.linear.feature_maps import Summary, feature_map
from lineara.ops.linear.windows import Keys, Windows
from lineara.ops.precision import without_autocast
from lineara.ops.sequence_parallel import over_group

_POSITIONS = Windows()
# Those that autograd follows, or have formulas for it; the others are operators.
_DIFFERENTIATED = {"reference": reference, "one block": one_block}


def linear_attention(
    operation: str,
    query: Tensor,
    keys: Keys,
    name: str,
    scale: float,
    *,
    grid: Windows = _POSITIONS,
    gate: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    impl: str,
    group_name: str,
) -> Tensor:
    """The output, (B, H, N, V), of the feature map `name`; the heads of the keys may be fewer than those of queries."""
    implementation = choose_implementation(operation, impl, query, keys.value, keys.key, gate, *keys[4:])
    with without_autocast(query):
        if implementation == "reference" and not group_name and feature_map(name).divides_context:
            total, weighted_sum = None, windows.context_of(keys, grid, name, scale)
        else:
            summary = summarize(implementation, keys, grid, name, scale, group_name)
            total, weighted_sum = over_group(summary, name, group_name)
        return attend(implementation, query, total, weighted_sum, gate, cu_seqlens_query, name, scale)


def summarize(implementation: str, keys: Keys, grid: Windows, name: str, scale: float, group_name: str = "") -> Summary:
    """The summary of this rank's positions; windows that straddle two ranks are completed where they begin."""
    arguments = *keys, name, scale, list(grid.resolutions), list(grid.key_shape), grid.compression, implementation
    if group_name and grid.resolutions:
        run = shards.summarize if implementation in _DIFFERENTIATED else shards.SUMMARIZE_SHARD
        return run(*arguments, group_name)
    if implementation in _DIFFERENTIATED:
        return windows.summarize(_DIFFERENTIATED[implementation], keys, grid, name, scale)
    return library.run(operators.SUMMARIZE, *arguments)


def attend(
    implementation: str,
    query: Tensor,
    total: Tensor | None,
    weighted_sum: Tensor,
    gate: Tensor | None,
    cu_seqlens: Tensor | None,
    name: str,
    scale: float,
) -> Tensor:
    """The answers to queries, from sums of as many heads as they have, or of a part of that many."""
    shared_by = query.shape[1] // max(weighted_sum.shape[1], 1)
    if shared_by > 1:  # heads of queries that see the same keys lie side by side
        total = None if total is None else total.repeat_interleave(shared_by, dim=1)
        weighted_sum = weighted_sum.repeat_interleave(shared_by, dim=1)
    if implementation == "reference":
        return reference.attend(query, total, weighted_sum, gate, cu_seqlens, name, scale)
    assert total is not None, "only the reference divides before"
    if implementation == "one block":
        return one_block.attend(query, total, weighted_sum, gate, cu_seqlens, name, scale)
    arguments = query, total, weighted_sum, gate, cu_seqlens, name, scale, implementation
    return library.run(operators.ATTEND, *arguments)
