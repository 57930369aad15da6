"""Checks of shape, dtype, device and mask that the operations share.

They run at the public door, before any work, and raise one sentence: what must hold, what was given, what to do.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, Literal, SupportsIndex, get_args

import torch
from torch import Tensor

from lineara.ops.linear.feature_maps import FeatureMap

Normalization = Literal["softmax", "scaling"]
Compression = Literal["mean", "max", "conv"]
Implementation = Literal["auto", "reference", "streaming", "triton"]
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
COMPRESSIONS: tuple[str, ...] = get_args(Compression)
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
FEATURE_MAPS: tuple[str, ...] = get_args(FeatureMap)

_LARGEST = torch.finfo(torch.float64).max
FLOATING_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_inputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    cu_seqlens_query: Tensor | None,
    cu_seqlens_key: Tensor | None,
) -> None:
    """Raise unless queries, keys, values, mask and packing fit one another."""
    if not _fit(query, key, value):
        check_key_and_value(key, value)
        check_query_and_key(query, key)
    if key_mask is not None:
        check_key_mask(key_mask, key)
    if cu_seqlens_query is not None or cu_seqlens_key is not None:
        check_packing(cu_seqlens_query, cu_seqlens_key, query, key)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether one look shows what the checks ask for, as it does of nearly every call; a short call takes as long."""
    if not (type(query) is Tensor and type(key) is Tensor and type(value) is Tensor):
        return False
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4 or query.is_nested or key.is_nested or value.is_nested:
        return False
    batch, heads, _, key_dim = query.shape
    return (
        query.dtype is key.dtype is value.dtype
        and query.dtype in FLOATING_DTYPES
        and query.layout is key.layout is value.layout is torch.strided
        and query.device == key.device == value.device
        and key.shape[0] == batch
        and key.shape[1] == heads
        and key.shape[3] == key_dim != 0
        and value.shape[:3] == key.shape[:3]
        and value.shape[3] != 0
    )


def check_tensor(name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating-point (batch, heads, positions, channels) tensor."""
    if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor; put the sequences one after the other and say where each begins with "
            "cu_seqlens"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; convert it with .to_dense()")
    if tensor.dtype not in FLOATING_DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}; convert it with .float()"
        )
    if tensor.dim() != 4:
        raise ValueError(
            f"{name} must have the shape (batch, heads, positions, channels), got {tuple(tensor.shape)}; "
            "use the layers of lineara.nn for other layouts"
        )
    if tensor.shape[3] == 0:
        raise ValueError(f"{name} must have at least one channel, got the shape {tuple(tensor.shape)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise for nested and sparse tensors."""
    if tensor.is_nested:
        raise TypeError(f"{name} must not be a nested tensor; pad it with torch.nested.to_padded_tensor, or pack it")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}; convert it with .to_dense()")


def check_same_dtype_and_device(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """Raise unless all tensors share one dtype and one device."""
    for name, tensor in zip(names[1:], tensors[1:]):
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(
                f"{names[0]} and {name} must have the same dtype, got {tensors[0].dtype} and {tensor.dtype}; "
                "convert one of them"
            )
        if tensor.device != tensors[0].device:
            raise ValueError(
                f"{names[0]} and {name} must be on the same device, got {tensors[0].device} and {tensor.device}; "
                "move one of them"
            )


def check_key_and_value(key: Tensor, value: Tensor) -> None:
    """Raise unless key and value agree in everything but their number of channels."""
    check_tensor("key", key)
    check_tensor("value", value)
    _check_equal_size("key", key.shape[0], "value", value.shape[0], "batch size")
    _check_equal_size("key", key.shape[1], "value", value.shape[1], "number of heads")
    _check_equal_size("key", key.shape[2], "value", value.shape[2], "number of positions")
    check_same_dtype_and_device(("key", "value"), (key, value))


def check_query_and_key(query: Tensor, key: Tensor) -> None:
    """Raise unless query and key agree in everything but their number of positions."""
    check_tensor("query", query)
    _check_equal_size("query", query.shape[0], "key", key.shape[0], "batch size")
    check_query_heads(query.shape[1], key.shape[1], "key")
    _check_equal_size("query", query.shape[3], "key", key.shape[3], "number of channels")
    check_same_dtype_and_device(("query", "key"), (query, key))


def check_query_heads(of_query: int, of_keys: int, name: str) -> None:
    """Raise unless every head of keys can serve as many heads of queries as any other."""
    if of_query != of_keys and (of_query == 0 or of_keys == 0 or of_query % of_keys):
        raise ValueError(
            f"query must have as many heads as {name}, or a multiple of that number, got {of_query} and {of_keys}"
        )


def check_key_mask(key_mask: Tensor | None, key: Tensor) -> None:
    """Raise unless the mask is None or a boolean (batch, positions) tensor beside the keys."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"key_mask must be a torch.Tensor or None, got {type(key_mask).__name__}")
    check_dense("key_mask", key_mask)
    if key_mask.dtype != torch.bool:
        raise TypeError(
            f"key_mask must be boolean (True = takes part), got {key_mask.dtype}; write key_mask == 0 for a mask that "
            "is added to scores (0 and -inf), and key_mask != 0 for one of ones and zeros"
        )
    expected = (key.shape[0], key.shape[2])
    if tuple(key_mask.shape) != expected:
        raise ValueError(
            f"key_mask must have the shape (batch, key positions) = {expected}, got {tuple(key_mask.shape)}"
        )
    if key_mask.device != key.device:
        raise ValueError(
            f"key and key_mask must be on the same device, got {key.device} and {key_mask.device}; move one of them"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor | None, tensor_name: str, tensor: Tensor) -> None:
    """Raise unless this is None, or can say where the sequences packed into the tensor begin.

    Its numbers are not looked at, which would mean waiting for the device.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance] - callers are untyped
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(cu_seqlens).__name__}")
    check_dense(name, cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}; write {name}.int()")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{name} must have the shape (number of sequences + 1,) with at least one sequence, "
            f"got {tuple(cu_seqlens.shape)}"
        )
    if tensor.shape[0] != 1:
        raise ValueError(
            f"{tensor_name} must have a batch size of 1 with {name}, got {tensor.shape[0]}; "
            "put the sequences one after the other along the positions"
        )
    if cu_seqlens.device != tensor.device:
        raise ValueError(
            f"{tensor_name} and {name} must be on the same device, got {tensor.device} and {cu_seqlens.device}; "
            "move one of them"
        )


def check_packing(cu_seqlens_query: Tensor | None, cu_seqlens_key: Tensor | None, query: Tensor, key: Tensor) -> None:
    """Raise unless queries and keys are packed alike: not at all, or as many sequences of each."""
    check_cu_seqlens("cu_seqlens_query", cu_seqlens_query, "query", query)
    check_cu_seqlens("cu_seqlens_key", cu_seqlens_key, "key", key)
    if (cu_seqlens_query is None) != (cu_seqlens_key is None):
        raise ValueError(
            "cu_seqlens_query and cu_seqlens_key must both be given or both be None, got only "
            f"cu_seqlens_{'query' if cu_seqlens_key is None else 'key'}; pass the same tensor twice for self-attention"
        )
    if cu_seqlens_query is not None and cu_seqlens_key is not None:
        entries = cu_seqlens_query.shape[0], cu_seqlens_key.shape[0]
        _check_equal_size("cu_seqlens_query", entries[0], "cu_seqlens_key", entries[1], "number of entries")


def check_scale(scale: Any, dtype: torch.dtype = torch.float64, *, power: int = 1) -> float:
    """The scale as a float; raise unless it is a number (a tensor would get no gradient) whose power is finite.

    That is, in the dtype that sums over inputs of `dtype` are kept in.
    """
    number = check_number("scale", scale, "; to learn it, multiply query and key by it instead")
    largest = torch.finfo(dtype if dtype == torch.float64 else torch.float32).max ** (1 / power)
    if abs(number) > largest:
        raise ValueError(f"scale must be at most {largest:.4g} for {dtype}, got {number}; multiply the inputs instead")
    return number


def check_number(name: str, value: Any, advice: str = "") -> float:
    """The value as a float; raise unless it is a finite number, of Python or of numpy."""
    if isinstance(value, bool) or not (isinstance(value, float | int | Real) or _is_number_of_numpy(value)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{advice}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _LARGEST:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def check_integer(name: str, value: SupportsIndex, least: int | None = 1) -> int:
    """The value as an int; raise unless it is one, of Python, numpy or a traced size, and large enough."""
    if not isinstance(value, torch.SymInt):
        try:
            integer = None if isinstance(value, bool) else operator.index(value)
        except TypeError:
            integer = None
        if integer is None:
            raise TypeError(f"{name} must be an integer, got {value!r}")
        value = integer
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if not isinstance(value, torch.SymInt) and value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, got {value}")
    return value  # pyright: ignore[reportReturnType] - a SymInt stands for an int


def _is_number_of_numpy(value: Any) -> bool:
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("f", "i", "u") and getattr(value, "shape", None) == ()


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raise unless `given` is one of the choices."""
    if given not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {given!r}")


def _check_equal_size(first: str, first_size: int, second: str, second_size: int, what: str) -> None:
    if first_size != second_size:
        raise ValueError(f"{first} and {second} must have the same {what}, got {first_size} and {second_size}")
