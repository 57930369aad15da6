"""The public door of multiresolution attention: signature, meaning and checks."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lineara.ops.checks import (
    COMPRESSIONS,
    FEATURE_MAPS,
    Compression,
    FeatureMap,
    Implementation,
    check_choice,
    check_dense,
    check_inputs,
    check_integer,
    check_same_dtype_and_device,
    check_scale,
)
from lineara.ops.linear import attention
from lineara.ops.linear.windows import Keys, Windows
from lineara.ops.packed import cut
from lineara.ops.precision import as_autocast
from lineara.ops.sequence_parallel import name_of_group

if TYPE_CHECKING:
    from lineara.ops.sequence_parallel import Group


def multiresolution_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    resolutions: Sequence[int],
    compression: Compression = "mean",
    feature_map: FeatureMap = "softmax",
    gate: Tensor | None = None,
    key_weight: Tensor | None = None,
    value_weight: Tensor | None = None,
    key_shape: Sequence[int] | None = None,
    scale: float = 1.0,
    key_mask: Tensor | None = None,
    cu_seqlens_query: Tensor | None = None,
    cu_seqlens_key: Tensor | None = None,
    impl: Implementation = "auto",
    group: "Group" = None,
) -> Tensor:
    """Linear attention whose heads see keys and values at different resolutions, and queries that choose among them.

        k^_h[j] = f(k_h[r_h j], ..., k_h[r_h j + r_h - 1])       windows of r_h positions, v^_h likewise
        C_h = sum_j phi_k(k^_h[j])^T v^_h[j],   z_h = sum_j phi_k(k^_h[j])
        y_ih = g_ih phi_q(q_ih) C_h / (phi_q(q_ih) . z_h)

    Under the feature map `"softmax"`, phi_q is the softmax over channels and phi_k over windows, as in
    `efficient_attention`, which one resolution of 1 without a gate gives exactly; with `"relu"` and `"elu"` that is
    `kernel_attention`. A window is compressed by the mean of its valid positions, by their maximum, or by
    a weighted sum per channel (`"conv"`, a strided depthwise convolution) that is divided by the share of its positions
    that are valid, so that weights of 1 / positions are the mean. The last window may be partial; a window without a
    valid position does not exist.

    Args:
        query: (batch, heads, query positions, key channels); float64, float32, bfloat16 or float16, any strides.
        key: (batch, heads, key positions, key channels), of the same dtype; its heads may be fewer, as
            `efficient_attention` has it.
        value: (batch, heads, key positions, value channels), of the same dtype.
        resolutions: for every head of keys, the number of positions r_h >= 1 that one key stands for, along each axis
            of `key_shape`; one beyond the grid makes a single window. Neighbouring heads of the same resolution are
            computed together.
        compression: `"mean"`, `"max"` or `"conv"`.
        feature_map: `"softmax"`, `"relu"` or `"elu"` (elu + 1).
        gate: (batch, heads, query positions), multiplies the output of each head: 0 where a query does not use it.
        key_weight: under `"conv"`, (heads, key channels, positions of the largest window); a head of a smaller window
            reads its first entries, row by row over the window.
        value_weight: under `"conv"`, (heads, value channels, positions of the largest window).
        key_shape: sizes of the grid that the key positions lie on, row by row, such as (height, width): windows are
            then r_h x r_h squares. None is a sequence.
        scale: multiplies both query and (compressed) key.
        key_mask: boolean (batch, key positions), True = takes part. What a masked position holds, NaN and inf
            included, reaches neither the output nor a gradient. An item without a valid position gives zeros.
        cu_seqlens_query: of packed sequences, as `efficient_attention` has them. Windows begin anew with each sequence.
        cu_seqlens_key: the same for keys and values; without a `key_shape`.
        impl: `"auto"`, `"reference"`, `"streaming"` or `"triton"`: the means, never the mathematics. `"triton"` needs
            a GPU, at most 512 channels per head and no float64; `explain_implementation` says what `"auto"` picks.
        group: the ranks over which the positions are sharded, as `efficient_attention` has it: shards are consecutive
            parts of the sequence, in the order of ranks, or of the first axis of the grid, of which `key_shape` is
            this rank's part. Windows are those of the whole sequence; one that straddles a border of shards is
            completed where it begins. The implementation `"reference"` cannot be compiled with a group.

    Returns:
        (batch, heads, query positions, value channels), in the dtype of the inputs. Sums are kept in float32, or in
        float64 for float64 inputs.

    Raises:
        ValueError: for shapes, resolutions or devices that do not fit, weights without `"conv"` or the reverse, an
            unknown `compression`, `feature_map` or `impl`, or a group that this rank cannot talk to.
        TypeError: for dtypes that differ or are not floating point, a mask that is not boolean, resolutions that are
            not integers, or a group that is none.

    Cost: O(M (K + V) + (N + M / r) K V) time for N query positions, M key positions, K key and V value channels per
    head. Memory beyond inputs and output: O(N K + M (K + V)) with `"reference"`; with `"streaming"` O(K V), buffers of
    constant size, and M / r positions of those heads that compress; with gradients it keeps its weights where no
    tensor has more than 2 Mi elements. With a group, messages of `efficient_attention` or `kernel_attention`, and
    fewer positions per border than the least common multiple of the resolutions.

    Source: our reading of Zhang, Ma, Seidl, Tresp, "Adaptive Multi-Resolution Attention with Linear Complexity", arXiv
    2108.04962. Its abstract states heads of different resolution, each query's choice among them, and kernel attention;
    how windows are compressed, the feature maps, masks and partial windows are our choice.

    Gradients of any order are supported; `"auto"` also supports torch.func transforms, forward mode and torch.export.
    """
    query, key, value, gate, key_weight, value_weight = as_autocast(query, key, value, gate, key_weight, value_weight)
    check_inputs(query, key, value, key_mask, cu_seqlens_query, cu_seqlens_key)
    check_choice("compression", compression, COMPRESSIONS)
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    scale = check_scale(scale, query.dtype)
    resolutions = _checked_resolutions(resolutions, key)
    given_shape, key_shape = key_shape, _checked_shape(key_shape, key)
    _check_gate(gate, query)
    _check_weights(key_weight, value_weight, key, value, compression, max(resolutions) ** len(key_shape))
    if cu_seqlens_key is not None and given_shape is not None:
        raise ValueError(f"key_shape must be None with packed sequences, got {tuple(given_shape)}")
    group_name = name_of_group(group, query, key, value, gate, key_weight, value_weight)
    run = partial(
        attention.linear_attention,
        "multiresolution_attention",
        name=feature_map,
        scale=scale,
        impl=impl,
        group_name=group_name,
    )
    grid = Windows(resolutions, key_shape, compression)
    weights = key_weight, value_weight
    if cu_seqlens_query is None or cu_seqlens_key is None or not group_name:
        keys = Keys(key, value, key_mask, cu_seqlens_key, *weights)
        return run(query, keys, grid=grid, gate=gate, cu_seqlens_query=cu_seqlens_query)
    # Every sequence has borders of its own between ranks.
    outputs = [
        run(q, Keys(k, v, mask, None, *weights), grid=grid._replace(key_shape=(k.shape[2],)), gate=g)
        for (q, g), (k, v, mask) in zip(cut(cu_seqlens_query, query, gate), cut(cu_seqlens_key, key, value, key_mask))
    ]
    return torch.cat(outputs, dim=2)


def _checked_resolutions(resolutions: Sequence[int], key: Tensor) -> tuple[int, ...]:
    if isinstance(resolutions, str) or not isinstance(resolutions, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"resolutions must be a sequence of integers, got {type(resolutions).__name__}")
    if key.shape[1] == 0:
        raise ValueError(f"key must have at least one head, got the shape {tuple(key.shape)}")
    if len(resolutions) != key.shape[1]:
        raise ValueError(
            f"resolutions must have one entry for each of the {key.shape[1]} heads of keys, got {len(resolutions)}"
        )
    return tuple(check_integer("each of resolutions", resolution) for resolution in resolutions)


def _checked_shape(key_shape: Sequence[int] | None, key: Tensor) -> tuple[int, ...]:
    if key_shape is None:
        return (key.shape[2],)
    if not isinstance(key_shape, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"key_shape must be a sequence of integers, got {key_shape!r}")
    if any(isinstance(size, Tensor) for size in key_shape):  # as torch.jit.trace has sizes
        raise TypeError(
            "each size of key_shape must be an integer, got a tensor; torch.jit.trace would keep its number: use "
            "torch.export"
        )
    sizes = tuple(check_integer("each size of key_shape", size, least=None) for size in key_shape)
    if not sizes or min(sizes) < 0 or math.prod(sizes) != key.shape[2]:
        raise ValueError(
            f"the product of key_shape must be the number of key positions, got {sizes} and {key.shape[2]}"
        )
    return sizes


def _check_gate(gate: Tensor | None, query: Tensor) -> None:
    if gate is None:
        return
    _check_is_tensor("gate", gate)
    if tuple(gate.shape) != tuple(query.shape[:3]):
        raise ValueError(
            f"gate must have the shape (batch, heads, query positions) = {tuple(query.shape[:3])}, "
            f"got {tuple(gate.shape)}"
        )
    check_same_dtype_and_device(("query", "gate"), (query, gate))


def _check_weights(
    key_weight: Tensor | None, value_weight: Tensor | None, key: Tensor, value: Tensor, compression: str, size: int
) -> None:
    for name, weight, tensor in (("key_weight", key_weight, key), ("value_weight", value_weight, value)):
        if (weight is not None) != (compression == "conv"):
            raise ValueError(
                f"{name} must be given with compression='conv' and not otherwise, got compression={compression!r} "
                f"and {'a weight' if weight is not None else 'None'}"
            )
        if weight is None:
            continue
        _check_is_tensor(name, weight)
        expected = (tensor.shape[1], tensor.shape[3], size)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{name} must have the shape (heads, channels, positions of the largest window) = {expected}, "
                f"got {tuple(weight.shape)}"
            )
        check_same_dtype_and_device((name.removesuffix("_weight"), name), (tensor, weight))


def _check_is_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tensor).__name__}")
    check_dense(name, tensor)
