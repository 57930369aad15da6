"""Initial values that differ within a weight, also where torch has distributed it over processes."""

from typing import Any

import torch
from torch import Tensor


def assign(weight: Tensor, values: Tensor) -> None:
    """Write values of the weight's shape into it, or what broadcasts to that."""
    with torch.no_grad():
        weight.copy_(_laid_out_as(weight, values))


def multiply(weight: Tensor, factors: Tensor) -> None:
    """Multiply the weight in place by factors of its shape, or by what broadcasts to that."""
    with torch.no_grad():
        weight.mul_(_laid_out_as(weight, factors))


def _laid_out_as(weight: Tensor, values: Tensor) -> Tensor:
    values = values.to(weight.device, weight.dtype)
    if not hasattr(weight, "device_mesh"):
        return values
    # Rows of a DTensor are copies: what is written into them is lost.
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = weight
    whole = values.expand(weight.shape).contiguous()
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
