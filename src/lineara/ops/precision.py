"""The dtypes that the operations compute in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over inputs of `dtype` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """The products keep the precision of the inputs, as their docstrings say; inputs come cast already."""
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
