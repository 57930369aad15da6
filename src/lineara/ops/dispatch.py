"""The names of the implementations and the one rule that picks one.

`impl` chooses the means, never the mathematics. An explicit choice that cannot run raises with the reason; it never
falls back to another one.
"""

from torch import Tensor

from lineara.ops.checks import check_choice

IMPLEMENTATIONS = ("reference", "streaming", "triton")

# What each operation has today.
_AVAILABLE = {
    "efficient_attention": ("reference", "streaming"),
    "kernel_attention": ("reference", "streaming"),
    "multiresolution_attention": ("reference", "streaming"),
    "softmax_attention": ("reference",),
}


def choose_implementation(operation: str, impl: str, query: Tensor) -> str:
    """The implementation that runs: `impl` itself where it is explicit, and the rule's choice for "auto"."""
    if impl == "auto":
        return _rule(operation, query)[0]
    check_choice("impl", impl, ("auto", *IMPLEMENTATIONS))
    available = _AVAILABLE[operation]
    if impl not in available:
        raise ValueError(
            f"impl must be an implementation that {operation} has ({_listed(available)}), got {impl!r}; use impl='auto'"
        )
    return impl


def explain_implementation(query: Tensor, key: Tensor, value: Tensor, *, operation: str = "efficient_attention") -> str:
    """Say which implementation `impl="auto"` picks for these tensors, and why.

    Args:
        query: the query that the operation would be given, (batch, heads, query positions, key channels).
        key: the key likewise, (batch, heads, key positions, key channels).
        value: the value likewise, (batch, heads, key positions, value channels).
        operation: the name of the operation, `"efficient_attention"` (also for the three operations on its context),
            `"kernel_attention"`, `"multiresolution_attention"` or `"softmax_attention"`.

    Returns:
        One sentence that begins with the implementation's name, such as `"streaming: ..."`.

    Raises:
        ValueError: for an operation that does not exist, or tensors on different devices.

    Cost: none; nothing is computed.

    Source: ours.
    """
    check_choice("operation", operation, tuple(_AVAILABLE))
    for name, tensor in (("key", key), ("value", value)):
        if tensor.device != query.device:
            raise ValueError(
                f"query and {name} must be on the same device, got {query.device} and {tensor.device}; move one of them"
            )
    implementation, reason = _rule(operation, query)
    return f"{implementation}: {reason}"


def _rule(operation: str, query: Tensor) -> tuple[str, str]:
    available = _AVAILABLE[operation]
    if len(available) == 1:
        return available[0], f"the only implementation of {operation}"
    if query.device.type == "cpu":
        return "streaming", "the tensors are on the CPU, where blocks that stay in its cache are fastest"
    return "reference", f"the tensors are on {query.device.type}, where few large operations beat many blocks"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
