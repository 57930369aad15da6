"""The names of the implementations and the one rule that picks one.

`impl` chooses the means, never the mathematics. An explicit choice that cannot run raises with the reason; it never
falls back to another one.
"""

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lineara.ops.checks import IMPLEMENTATIONS, check_choice, check_tensor
from lineara.ops.tracing import is_exporting, is_traced, multiplies_bfloat16, needs_gradients_alone, transform_of

# "one block" is how "streaming" computes what is to be differentiated and fits into one block.
_MODULES = {
    "reference": "lineara.ops.linear.reference",
    "one block": "lineara.ops.linear.one_block",
    "streaming": "lineara.ops.linear.streaming",
    "triton": "lineara.ops.linear.triton_kernels",
}

# What each operation has.
_LINEAR = ("reference", "streaming", "triton")
_AVAILABLE = {
    "efficient_attention": _LINEAR,
    "kernel_attention": _LINEAR,
    "multiresolution_attention": _LINEAR,
    "softmax_attention": ("reference",),
}
# Up to this many elements (8 MiB of float32) in query, key and value each, torch's own operations on whole tensors are
# as fast on a CPU as blocks that stay in its cache, and keep no more than this.
_ONE_BLOCK_ELEMENTS = 2 * 1024 * 1024
# From this many on, with gradients, formulas on whole tensors are faster than autograd's.
_FORMULA_ELEMENTS = 256 * 1024
# Of shorter sequences, however many, a summary is about as large as they are, and the reference the fastest.
_LONG = 256
_WIDEST = 512
# Wider blocks of float32 do not fit into a multiprocessor's registers.
_WIDEST_FLOAT32 = 256


def choose_implementation(operation: str, impl: str, query: Tensor, value: Tensor, *others: Tensor | None) -> str:
    """The implementation that runs: `impl` itself where it is explicit, and the rule's choice for "auto".

    Where that is "streaming", it is "one block" for what fits into one and is to be differentiated. While compiling for
    a CPU the choice is "auto" again, so that no graph knows a size: the operators ask `means_of`.
    """
    if impl == "auto":
        impl = _rule(operation, query, value, *others)[0]
        return "one block" if impl == "streaming" and _is_one_block(_seen(query, value, *others)) else impl
    check_choice("impl", impl, IMPLEMENTATIONS)
    available = _AVAILABLE[operation]
    if impl not in available:
        has = ", ".join(map(repr, available))
        raise ValueError(f"impl must be an implementation that {operation} has ({has}), got {impl!r}; use impl='auto'")
    if impl == "triton" and (obstacle := _obstacle(query, value)):
        move = "" if query.device.type == "cuda" else " or move the tensors"
        raise ValueError(f"impl='triton' needs {obstacle}; use impl='auto'{move}")
    if impl != "reference" and (transform := transform_of(query, value, *others)):
        raise ValueError(f"impl must be 'reference' or 'auto' under {transform}, got {impl!r}")
    return "one block" if impl == "streaming" and _is_one_block(_seen(query, value, *others)) else impl


def is_short(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the reference runs on tensors as they are: all questions above and in `checks`, answered at once.

    To ask them one by one takes longer than the arithmetic of a short sequence.
    """
    if not (type(query) is type(key) is type(value) is Tensor) or is_traced() or transform_of(query, key, value):
        return False
    if not (query.is_cpu and key.is_cpu and value.is_cpu) or query.is_nested or key.is_nested or value.is_nested:
        return False
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if not len(shape) == len(key_shape) == len(value_shape) == 4:
        return False
    batch, heads, num_queries, key_dim = shape
    num_keys, value_dim = value_shape[2:]
    bfloat16 = multiplies_bfloat16(query)
    limit = _ONE_BLOCK_ELEMENTS if bfloat16 else _FORMULA_ELEMENTS
    return (
        key_shape == (batch, heads, num_keys, key_dim)
        and value_shape[:2] == shape[:2]
        and key_dim > 0 < value_dim
        and 0 < max(key_dim * num_queries, key_dim * num_keys, value_dim * num_keys) * batch * heads < limit
        and query.dtype is key.dtype is value.dtype
        and (query.dtype is torch.float32 or bfloat16)
        and query.layout is key.layout is value.layout is torch.strided
        and not torch.is_autocast_enabled("cpu")
    )


def means_of(implementation: str, *tensors: Tensor) -> ModuleType:
    """The module that computes: for "auto", which a compiled graph leaves open, by size."""
    if implementation == "auto":
        implementation = "streaming" if _is_large(_seen(*tensors)) else "reference"
    name = _MODULES[implementation]
    return sys.modules.get(name) or import_module(name)


def explain_implementation(query: Tensor, key: Tensor, value: Tensor, *, operation: str = "efficient_attention") -> str:
    """Say which implementation `impl="auto"` picks for these tensors, and why.

    Args:
        query: the query that the operation would be given, (batch, heads, query positions, key channels).
        key: the key likewise, (batch, heads, key positions, key channels).
        value: the value likewise, (batch, heads, key positions, value channels).
        operation: the name of the operation, `"efficient_attention"`, `"kernel_attention"`,
            `"multiresolution_attention"` or `"softmax_attention"`. (Functions of a context follow the same rule for the
            tensors that they are given; under forward-mode differentiation of a gate or of weights of windows alone,
            which are not given here, the reference runs.)

    Returns:
        One sentence that begins with the implementation's name, such as `"streaming: ..."`.

    Raises:
        ValueError: for an operation that does not exist, tensors of another shape, or tensors on different devices.
        TypeError: for what is no floating-point tensor.

    Cost: none; nothing is computed.

    Source: ours.
    """
    check_choice("operation", operation, tuple(_AVAILABLE))
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, tensor)
        if tensor.device != query.device:
            raise ValueError(
                f"query and {name} must be on the same device, got {query.device} and {tensor.device}; move one of them"
            )
    implementation, reason = _rule(operation, query, value, key)
    return f"{implementation}: {reason}"


def _rule(operation: str, query: Tensor, value: Tensor, *others: Tensor | None) -> tuple[str, str]:
    available = _AVAILABLE[operation]
    if len(available) == 1:
        return available[0], f"the only implementation of {operation}"
    if is_exporting():
        return "reference", "the call is exported, in standard operators alone"
    if transform := transform_of(query, value, *others):
        return "reference", f"{transform} sees standard operators alone"
    device = query.device.type
    if device == "cpu":
        if torch.compiler.is_compiling():
            return "auto", "the compiled operator chooses by size"
        seen = _seen(query, value, *others)
        if _is_large(seen):
            return "streaming", "the tensors are on the CPU and large, where blocks that stay in its cache are fastest"
        if _is_one_block(seen):
            return (
                "streaming",
                "the tensors are on the CPU, need gradients and fit into one block, whose weights are kept",
            )
        return "reference", (
            "the tensors are on the CPU and of at most 2,097,152 elements each or fewer than 256 positions, where few "
            "operations on whole tensors are as fast as blocks"
        )
    if device != "cuda":
        return "reference", f"the tensors are on {device}, where few large operations beat many blocks"
    if obstacle := _obstacle(query, value):
        return "reference", f"the fused kernels need {obstacle}"
    if query.dtype == torch.float32 and _widest(query, value) > _WIDEST_FLOAT32:
        return "reference", f"in float32 the fused kernels are made for at most {_WIDEST_FLOAT32} channels per head"
    return "triton", "the tensors are on a GPU, where the fused kernels read and write each of them once"


def _is_one_block(seen: Sequence[Tensor]) -> bool:
    if is_traced():  # when no size may be looked at
        return False
    if multiplies_bfloat16(seen[0]):
        return False  # formulas are for float32
    return _FORMULA_ELEMENTS <= _elements(seen) <= _ONE_BLOCK_ELEMENTS and needs_gradients_alone(seen)


def _is_large(seen: Sequence[Tensor]) -> bool:
    return _elements(seen) > _ONE_BLOCK_ELEMENTS


def _elements(seen: Sequence[Tensor]) -> int:
    """Of the largest tensor; 0 where all sequences are short."""
    largest = max([tensor.numel() for tensor in seen])
    return largest if any(tensor.shape[2] >= _LONG for tensor in seen) else 0


def _seen(*tensors: Tensor | None) -> list[Tensor]:
    """Those that explain_implementation sees too: not a mask, a gate or weights of windows."""
    return [tensor for tensor in tensors if tensor is not None and tensor.ndim == 4]


def _obstacle(query: Tensor, value: Tensor) -> str | None:
    """What the Triton kernels need and these tensors lack, as the rest of a sentence; None where they can run."""
    if lacking := _lacking_on(query.device.type, query.device.index):
        return lacking
    if query.dtype == torch.float64:
        return "float32, float16 or bfloat16 tensors, got torch.float64"
    if query.dtype == torch.bfloat16 and query.device.type == "cpu":
        return "float32 or float16 tensors in Triton's interpreter, which gets bfloat16 wrong, got torch.bfloat16"
    if (widest := _widest(query, value)) > _WIDEST:
        return f"at most {_WIDEST} key and value channels per head, got {widest}"
    return None


def _lacking_on(device_type: str, index: int | None) -> str | None:
    """What a device lacks."""
    if (knobs := _knobs()) is None:
        return "the package triton, which is not installed"
    if device_type == "cpu" and knobs.runtime.interpret:
        return None
    if device_type != "cuda":
        return f"CUDA tensors, got {device_type}"
    if torch.version.hip is not None:
        return "an NVIDIA GPU, got one of AMD"
    if (capability := _capability(index)) < (8, 0):
        return "a GPU of compute capability 8.0 or newer, got {}.{}".format(*capability)
    return None


@cache
def _knobs() -> Any:
    return None if find_spec("triton") is None else import_module("triton.knobs")


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


# What torch.compiler.assume_constant_result does, which takes a second to import.
_lacking_on._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _widest(query: Tensor, value: Tensor) -> int:
    return max(query.shape[3], value.shape[3])
