"""Initial values that differ within a weight; on several processes see `test_tensor_parallel.py`."""

import torch
from torch import nn

from lineara.nn.initial_values import assign, multiply


def test_values_are_broadcast_and_converted_and_leave_no_graph():
    weight = nn.Parameter(torch.full((2, 3), torch.nan, dtype=torch.float16))
    assign(weight, torch.tensor([[1.0], [0.5]]))
    multiply(weight, torch.tensor([False, True, True]))
    assert weight.tolist() == [[0.0, 1.0, 1.0], [0.0, 0.5, 0.5]]
    assert weight.grad_fn is None
    assert weight.dtype == torch.float16
