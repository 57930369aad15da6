"""The dtypes that the operations compute in."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lineara.ops.library import LIBRARY
from lineara.ops.tracing import multiplies_bfloat16


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over inputs of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of sums."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def as_factor(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """scale * tensor, of bfloat16 where this processor multiplies it, summing in float32, else in the dtype of sums."""
    return tensor if scale == 1.0 and multiplies_bfloat16(tensor) else times_scale(tensor, scale)


def times_scale(tensor: Tensor, scale: float) -> Tensor:
    """scale * tensor in the dtype of sums."""
    return widened(tensor) if scale == 1.0 else widened(tensor) * scale


def as_autocast(*tensors: Tensor | None) -> Sequence[Any]:
    """The tensors in the dtype that torch.autocast asks for, as its products have them; with float64, as they are.

    (For tensors, the first of which decides, and Nones, which are kept: Any, because each is what the caller gave.)
    """
    if not isinstance(tensors[0], Tensor) or not _autocasts(tensors[0]):
        return tensors
    if any(isinstance(tensor, Tensor) and tensor.dtype not in _CAST for tensor in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return [tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products inside an operation keep the precision of its inputs, as its docstring says."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


def register_autocast(name: str, operator: Callable[..., Any], inputs: Sequence[int]) -> None:
    """Let lineara::name cast some of its arguments under torch.autocast, to the dtype asked for there and then.

    (torch.library.register_autocast knows one dtype for ever.)
    """

    def cast(*arguments: Any) -> Any:
        given = list(arguments)
        for i, tensor in zip(inputs, as_autocast(*(arguments[i] for i in inputs))):
            given[i] = tensor
        with without_autocast(arguments[0]):
            return operator(*given)

    for key in ("AutocastCPU", "AutocastCUDA"):
        LIBRARY.impl(name, cast, key)  # pyright: ignore[reportUnknownMemberType] - torch types it in part


_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu")
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _autocasts(tensor: Tensor) -> bool:
    # (torch.amp.is_autocast_available, which would do, cannot be compiled by torch 2.11.)
    device_type = tensor.device.type
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)
