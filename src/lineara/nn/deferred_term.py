"""The gradient of a router's load balancing term where the forward pass is computed a second time.

`torch.utils.checkpoint` with use_reentrant=True computes a layer without a graph, and once more, with one, inside the
backward pass. A term read after the first time has no graph to go back through. So it is given one that ends in a slot:
its backward leaves the gradient there, and the second computation of the same call adds it to what it differentiates.
"""

from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

_NO_TASK = -1  # torch's number of the backward pass outside of any
_MOST_SLOTS = 256  # calls of one router between a forward pass and its backward pass

_TOGETHER = (
    "load_balancing of a layer under checkpoint(use_reentrant=True) must be differentiated once, in the backward pass "
    "of the layer's output, got {}; add it to the loss before backward(), or use use_reentrant=False"
)
_AFTER = "a backward pass of the output before it"


class DeferredTerms:
    """The terms of those calls of one router that may be computed a second time. It keeps no graph."""

    def __init__(self) -> None:
        self._slots: deque[_Slot] = deque(maxlen=_MOST_SLOTS)

    def in_place_of(self, term: Tensor, probability: Tensor, slope: Tensor, hidden: Tensor | None) -> Tensor:
        """The term, or one in place of it whose gradient waits for the second computation of this call.

        Args:
            term: (), linear in the probabilities.
            probability: (batch, heads, positions).
            slope: (heads,), the derivative of the term by a probability.
            hidden: boolean (batch, 1, positions), True = not counted in the term.
        """
        task: int = torch._C._current_graph_task_id()  # pyright: ignore[reportPrivateUsage]
        slot = None if task == _NO_TASK else self._slot_of_first_call(task)
        if torch.is_grad_enabled():
            if slot is not None and slot.gradient is not None:
                slot.deliver(probability, slope, hidden)
            return term
        if torch.is_inference_mode_enabled():
            return term
        while task == _NO_TASK and self._slots and self._slots[-1].task != _NO_TASK:
            self._slots.pop()  # what an earlier backward pass has left
        # In a second computation without gradients, that of a checkpoint inside another, the slot waits on.
        slot = _Slot() if slot is None or slot.gradient is None else slot
        with torch.enable_grad():
            deferred: Any = _Deferred.apply(torch.zeros_like(term, requires_grad=True), term, slot)
        slot.number, slot.task = deferred.grad_fn._sequence_nr(), task
        if len(self._slots) == _MOST_SLOTS:
            self._slots[0].closed = "more calls after it than are remembered"
        self._slots.append(slot)
        return deferred

    def _slot_of_first_call(self, task: int) -> "_Slot | None":
        """That of the call which is being computed again, in the backward of a node that is older than the call.

        The calls of one checkpoint come again in their order, after those of all later checkpoints.
        """
        node: Any = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType] - untyped
        if node is None:
            return None
        # What was left in this backward pass itself is of calls without gradients, for a pass inside this one.
        later = [slot for slot in self._slots if slot.number > node._sequence_nr() and slot.task != task]
        # (Threads count by themselves; what a backward pass has left here, it takes from here.)
        slot = next((slot for slot in later if slot.task != _NO_TASK), next(iter(later), None))
        if slot is not None:
            self._slots.remove(slot)
            if slot.gradient is None:
                slot.closed = _AFTER
        return slot


def lost(term: Tensor) -> Tensor:
    """The term, with a gradient that raises an error: there is nothing left that it could reach."""
    return _Lost.apply(torch.zeros_like(term, requires_grad=True), term) if torch.is_grad_enabled() else term  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportReturnType] - torch has no types for it


class _Slot:
    """Where the gradient of a term waits."""

    def __init__(self) -> None:
        self.number = 0  # among the nodes of autograd, in order of creation
        self.task = _NO_TASK  # the backward pass in which it was made
        self.gradient: Tensor | None = None
        self.delivered = False
        self.closed = ""

    def put(self, gradient: Tensor) -> None:
        if self.closed:
            raise RuntimeError(_TOGETHER.format(self.closed))
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        engine: Any = torch.autograd.Variable._execution_engine  # pyright: ignore[reportPrivateUsage, reportUnknownMemberType, reportAttributeAccessIssue, reportUnknownVariableType] - untyped
        engine.queue_callback(self._check_delivered)

    def deliver(self, probability: Tensor, slope: Tensor, hidden: Tensor | None) -> None:
        """Add the gradient to that of the probabilities, once it is computed."""
        gradient = self.gradient
        assert gradient is not None
        self.closed = _AFTER
        if not probability.requires_grad:  # nothing learns: the term has no gradient without a checkpoint either
            self.delivered = True
            return

        def add(given: Tensor) -> Tensor:
            self.delivered = True
            more = (gradient * slope)[:, None].expand_as(given)  # (B, H, N)
            return given + (more if hidden is None else more.masked_fill(hidden, 0.0))

        probability.register_hook(add)  # pyright: ignore[reportUnknownMemberType] - torch has no types for it

    def _check_delivered(self) -> None:
        self.gradient = None
        if not self.delivered:
            self.closed = "a backward pass without the output"
            raise RuntimeError(_TOGETHER.format(self.closed))


class _Deferred(Function):
    """The value of a term; its gradient goes into a slot."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, term: Tensor, slot: _Slot) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slot = slot
        return term.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.slot.put(gradient)
        return None, None, None


class _Lost(Function):
    """The value of a term whose graph is gone."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, term: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return term.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            "load_balancing must be read while the output of its call is kept, got it after that was gone; "
            "keep the output until last_routing.load_balancing is part of the loss"
        )
