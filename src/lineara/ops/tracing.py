"""How a call reaches us: plainly, under torch.compile, torch.export or torch.jit.trace, or under a transform.

Private names of torch stand here alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_exporting() -> bool:
    """Whether a graph of standard operators is being recorded, to run without this library."""
    # (torch.compiler.is_exporting, which reads the same flag, is always true in what torch 2.11 compiles, and
    # torch.jit.is_tracing takes longer than its question.)
    if torch.compiler._is_exporting_flag:  # pyright: ignore - private
        return True
    return not torch.compiler.is_compiling() and torch._C._is_tracing()  # pyright: ignore - private


def is_traced() -> bool:
    """Whether sizes are symbols, and a comparison of one would bind the graph to this length."""
    return torch.compiler.is_compiling() or is_exporting()


def transform_of(*tensors: Tensor | None) -> str | None:
    """What differentiates or maps this call from outside, which operators with formulas of their own do not see."""
    if torch._C._are_functorch_transforms_active():  # pyright: ignore - private
        return "a torch.func transform"
    under = forward_ad._current_level >= 0  # pyright: ignore - private
    if under and any(tensor is not None and _has_tangent(tensor) for tensor in tensors):
        return "forward-mode differentiation"
    return None


def is_plain(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be looked at here and now, and cost nothing to look at."""
    return (
        type(tensor) is Tensor and tensor.is_cpu and not is_traced() and not torch._C._are_functorch_transforms_active()  # pyright: ignore - private
    )


def may_overwrite(*tensors: Tensor) -> bool:
    """Whether a formula may write over what it has just made: nothing else follows its operations.

    They are followed where they are differentiated again, mapped by a transform, or seen by a mode, such as that of
    selective activation checkpointing, which refuses that what it may keep is written to.
    """
    if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():  # pyright: ignore - private
        return False
    functorch = torch._C._functorch  # pyright: ignore - private
    return not any(functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t) for t in tensors)  # pyright: ignore - private


def multiplies_bfloat16(tensor: Tensor) -> bool:
    """Whether a tensor is of bfloat16 on a processor with instructions for it; an exported graph knows no processor."""
    return tensor.dtype is torch.bfloat16 and tensor.is_cpu and _HAS_BFLOAT16 and not is_exporting()


def is_watched(tensors: Sequence[Tensor]) -> bool:
    """Whether anyone but autograd would notice if an operator's arithmetic ran without the operator."""
    if is_traced() or torch._C._len_torch_dispatch_stack():  # pyright: ignore - private
        return True
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:  # pyright: ignore - private
        return True
    return not all(type(tensor) in _PLAIN_TYPES and (tensor.is_cpu or tensor.is_cuda) for tensor in tensors)


def needs_gradients_alone(tensors: Sequence[Tensor]) -> bool:
    """Whether gradients are wanted of dense tensors on the CPU, by autograd and without a transform."""
    return (
        torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in tensors)
        and all(type(tensor) in _PLAIN_TYPES and tensor.device.type == "cpu" for tensor in tensors)
        and not is_traced()
        and transform_of(*tensors) is None
    )


_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_HAS_BFLOAT16: bool = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # pyright: ignore[reportUnknownMemberType]
