"""The dtypes that the operations compute in."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.library import Library


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over inputs of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_autocast(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype that torch.autocast asks for, as its products have them; with float64, as they are.

    (For a list of tensors and Nones, which are kept: Any, because each is what the caller gave.)
    """
    there = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if not there or not _autocasts(there[0]) or any(tensor.dtype not in _CAST for tensor in there):
        return list(tensors)
    dtype = torch.get_autocast_dtype(there[0].device.type)
    return [tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in tensors]


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products inside an operation keep the precision of its inputs, as its docstring says."""
    return torch.autocast(tensor.device.type, enabled=False) if _autocasts(tensor) else nullcontext()


def register_autocast(name: str, operator: Callable[..., Any], num_inputs: int) -> None:
    """Let lineara::name cast its first inputs under torch.autocast, to the dtype asked for there and then.

    (torch.library.register_autocast knows one dtype for ever.)
    """

    def cast(*arguments: Any) -> Any:
        tensors = as_autocast(*arguments[:num_inputs])
        with without_autocast(arguments[0]):
            return operator(*tensors, *arguments[num_inputs:])

    for key in ("AutocastCPU", "AutocastCUDA"):
        _LIBRARY.impl(name, cast, key)  # pyright: ignore[reportUnknownMemberType] - torch types it in part


_CAST = (torch.float32, torch.bfloat16, torch.float16)
_LIBRARY = Library("lineara", "FRAGMENT")


def _autocasts(tensor: Tensor) -> bool:
    device_type = tensor.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
