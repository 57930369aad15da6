"""How this library registers operators with torch: with shapes for tracing, and formulas for gradients of any order."""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from lineara.ops.tracing import is_watched

LIBRARY = Library("lineara", "FRAGMENT")
# The arithmetic of every operator, and the same followed by autograd.
_DIRECT: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {}


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
    operator = getattr(torch.ops.lineara, name).default
    _DIRECT[operator] = compute, compute if gradients is None else _followed(compute, *gradients)
    return operator


def run(operator: Any, *arguments: Any) -> Any:
    """What the operator gives: without the operator, whose call takes 15 us, 80 with gradients, where none watches."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if is_watched(tensors):
        return operator(*arguments)
    plain, followed = _DIRECT[operator]
    needs_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return followed(*arguments) if needs_gradients else plain(*arguments)


def _followed(
    compute: Callable[..., Any], backward: Callable[..., Any], save: Callable[..., None]
) -> Callable[..., Any]:
    def forward(ctx: Any, *arguments: Any) -> Any:
        results = compute(*arguments)
        save(ctx, arguments, results)
        return results

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(compute.__name__, (torch.autograd.Function,), methods).apply


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
