"""Gradients of any order for the operators: where gradients of gradients are asked for, those of the reference."""

# pyright: reportUnknownMemberType=false
# (torch.autograd types its functions only in part)

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def reference_gradients(
    forward: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, for the inputs that need one."""
    with torch.enable_grad():
        outputs = forward(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        pairs = [(output, grad) for output, grad in zip(outputs, grad_outputs) if output.requires_grad]
        gradients = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                wanted,
                [grad for _, grad in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(gradients) if tensor.requires_grad else None for tensor in inputs]
