"""How this library registers operators with torch: every one has shapes for tracing, and formulas for its gradients."""

# pyright: reportUnknownMemberType=false
# (torch.library types its registrations only in part)

from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library

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
