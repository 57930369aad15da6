"""The names of the implementations and the one rule that picks one.

`impl` chooses the means, never the mathematics. An explicit choice that cannot run raises with the reason; it never
falls back to another one.
"""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lineara.ops.checks import IMPLEMENTATIONS, check_choice, check_tensor
from lineara.ops.tracing import is_exporting, transform_of

_MODULES = {
    "reference": "lineara.ops.linear.reference",
    "streaming": "lineara.ops.linear.streaming",
    "triton": "lineara.ops.linear.triton_kernels",
}

# What each operation has.
_AVAILABLE = {
    "efficient_attention": tuple(_MODULES),
    "kernel_attention": tuple(_MODULES),
    "multiresolution_attention": tuple(_MODULES),
    "softmax_attention": ("reference",),
}
# Up to this many elements (8 MiB of float32) in query, key and value each, torch's own operations on whole tensors are
# as fast on a CPU as blocks that stay in its cache, and keep no more than this.
_ONE_BLOCK_ELEMENTS = 2 * 1024 * 1024
_WIDEST = 512
# Wider blocks of float32 do not fit into a multiprocessor's registers.
_WIDEST_FLOAT32 = 256


def choose_implementation(operation: str, impl: str, query: Tensor, value: Tensor, *others: Tensor | None) -> str:
    """The implementation that runs: `impl` itself where it is explicit, and the rule's choice for "auto".

    While compiling for a CPU that is "auto" again, so that no graph knows a size: the operators ask `means_of`.
    """
    if impl == "auto":
        return _rule(operation, query, value, *others)[0]
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
    return impl


def means_of(implementation: str, *tensors: Tensor) -> ModuleType:
    """The module that computes: for "auto", which a compiled graph leaves open, by size."""
    if implementation == "auto":
        implementation = "streaming" if _is_large(*tensors) else "reference"
    return import_module(_MODULES[implementation])


def explain_implementation(query: Tensor, key: Tensor, value: Tensor, *, operation: str = "efficient_attention") -> str:
    """Say which implementation `impl="auto"` picks for these tensors, and why.

    Args:
        query: the query that the operation would be given, (batch, heads, query positions, key channels).
        key: the key likewise, (batch, heads, key positions, key channels).
        value: the value likewise, (batch, heads, key positions, value channels).
        operation: the name of the operation, `"efficient_attention"` (also for the three operations on its context),
            `"kernel_attention"`, `"multiresolution_attention"` or `"softmax_attention"`.

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
        if _is_large(query, value, *others):
            return "streaming", "the tensors are on the CPU and large, where blocks that stay in its cache are fastest"
        return "reference", (
            "the tensors are on the CPU and of at most 2,097,152 elements each, where few operations on whole tensors "
            "are as fast as blocks"
        )
    if device != "cuda":
        return "reference", f"the tensors are on {device}, where few large operations beat many blocks"
    if obstacle := _obstacle(query, value):
        return "reference", f"the fused kernels need {obstacle}"
    if query.dtype == torch.float32 and _widest(query, value) > _WIDEST_FLOAT32:
        return "reference", f"in float32 the fused kernels are made for at most {_WIDEST_FLOAT32} channels per head"
    return "triton", "the tensors are on a GPU, where the fused kernels read and write each of them once"


def _is_large(*tensors: Tensor | None) -> bool:
    # Only tensors of 4 axes count, as explain_implementation sees no mask, gate or weight of windows.
    return any(tensor is not None and tensor.ndim == 4 and tensor.numel() > _ONE_BLOCK_ELEMENTS for tensor in tensors)


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
    if find_spec("triton") is None:
        return "the package triton, which is not installed"
    knobs: Any = import_module("triton.knobs")
    if device_type == "cpu" and knobs.runtime.interpret:
        return None
    if device_type != "cuda":
        return f"CUDA tensors, got {device_type}"
    if torch.version.hip is not None:
        return "an NVIDIA GPU, got one of AMD"
    if (capability := torch.cuda.get_device_capability(index)) < (8, 0):
        return "a GPU of compute capability 8.0 or newer, got {}.{}".format(*capability)
    return None


# What torch.compiler.assume_constant_result does, which takes a second to import.
_lacking_on._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def _widest(query: Tensor, value: Tensor) -> int:
    return max(query.shape[3], value.shape[3])
