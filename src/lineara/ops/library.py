"""How this library registers operators with torch: with shapes for tracing, and formulas for gradients of any order."""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from lineara.ops.tracing import nothing_looks_on

LIBRARY = Library("lineara", "FRAGMENT")


def define(
    schema: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    gradients: tuple[Callable[..., Any], Callable[..., None]] | None = None,
) -> Any:
    """Register an operator of the namespace `lineara`, and return it.

    Args:
        schema: its name, arguments and results, in the language of torch's operators.
        compute: makes the results, which share no memory with the arguments; it sees neither autograd nor autocast.
        fake: makes empty results of the same shapes, dtypes and strides.
        gradients: the backward function, and what saves for it; None for an operator without gradients.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lineara::{name}", fake, lib=LIBRARY)
    if gradients is not None:
        backward, save = gradients
        torch.library.register_autograd(f"lineara::{name}", backward, setup_context=save, lib=LIBRARY)
    return getattr(torch.ops.lineara, name).default


def run(operator: Any, compute: Callable[..., Any], *arguments: Any) -> Any:
    """What the operator gives: by its arithmetic where nothing looks on, since to call an operator takes 15 us."""
    return compute(*arguments) if nothing_looks_on(arguments) else operator(*arguments)


def reference_gradients(
    forward: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, of what the reference computes, for the inputs that need one."""
    with torch.enable_grad():
        # Views, whose history ends here: inputs may be one tensor, or one made of another.
        inputs = [tensor.view_as(tensor) for tensor in inputs]
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
