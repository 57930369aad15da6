"""Inputs of the attention suite, the calls made of them, and the check that comes before any timing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attention.contenders import SAME, Contender, chosen
from attention.rounds import Step
from attention.shapes import Shape
from lineara.ops import efficient_attention

# The largest relative error (norm of the difference over norm) that is timed: a few times what plain PyTorch loses in
# that dtype, and less than a float32 product through TF32 does.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 1e-2}
_RESULTS = ("output", "gradient of query", "gradient of key", "gradient of value")
_QUADRATIC_WARM_UP_LEN = 1024
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prepared:
    """A contender at one shape: what is called, and the sets of tensors that it is called with.

    `sets` are its inputs in its layout, `grad_outputs` the gradients of its outputs (of the first one alone, where no
    gradient is asked for), `weights` what it trains besides.
    """

    contender: Contender
    shape: Shape
    call: Callable[..., Tensor]
    sets: Sequence[Sequence[Tensor]]
    grad_outputs: Sequence[Tensor]
    weights: Sequence[Tensor]

    def step(self, name: str) -> Step:
        """What is timed in a pass."""
        prepare = {"forward": self._forward, "backward": self._backward, "forward + backward": self._both}[name]
        around = partial(_without_gradients, self.contender.around) if name == "forward" else self.contender.around
        return Step(prepare, around, len(self.sets))

    def results(self, name: str) -> list[Tensor]:
        """The output of the first set of inputs, and the gradients where the pass has them, once."""
        with self.step("forward" if name == "forward" else "forward + backward").around():
            if name == "forward":
                return [self.call(*self.sets[0])]
            return list(self._both(0)())

    def _forward(self, turn: int) -> Callable[[], object]:
        return partial(self.call, *self.sets[turn % len(self.sets)])

    def _backward(self, turn: int) -> Callable[[], object]:
        inputs, grad_output = self._at(turn)
        output = self.call(*inputs)
        return partial(torch.autograd.grad, output, [*inputs, *self.weights], grad_output)

    def _both(self, turn: int) -> Callable[[], tuple[Tensor, ...]]:
        inputs, grad_output = self._at(turn)
        return partial(_output_and_gradients, self.call, inputs, self.weights, grad_output)

    def _at(self, turn: int) -> tuple[Sequence[Tensor], Tensor]:
        number = turn % len(self.sets)
        return self.sets[number], self.grad_outputs[number]


def random_inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Query, key, value and the gradient of the output."""
    generator = torch.Generator(device).manual_seed(seed)
    before = (shape.batch, shape.heads, shape.positions)
    widths = (shape.key_dim, shape.key_dim, shape.value_dim, shape.value_dim)
    query, key, value, grad_output = (
        torch.randn((*before, width), generator=generator, dtype=dtype, device=device) for width in widths
    )
    return query, key, value, grad_output


def prepare(
    contender: Contender, call: Callable[..., Tensor], shape: Shape, inputs: Sequence[Inputs], *, backward: bool
) -> Prepared:
    """Lay out a contender's inputs, as leaves that take gradients where there is a backward pass."""
    convert, sets, grad_outputs = contender.layout.convert, [], []
    for one in inputs:
        sets.append([tensor.detach().requires_grad_(backward) for tensor in convert(*one[:3])])
        # Laid out as values are, which every layout gives last.
        grad_outputs.append(convert(*one[:2], one[3])[-1].detach())
    weights = list(call.parameters()) if backward and isinstance(call, nn.Module) else []
    return Prepared(contender, shape, call, sets, grad_outputs, weights)


def check(prepared: Prepared, expected: Sequence[Tensor], name: str) -> float | None:
    """Compare a contender's results with the expected ones; the largest relative error.

    A contender of another formula is checked for finite numbers only, and has no error: None.

    Raises:
        ArithmeticError: for results that are wrong.
    """
    results = prepared.results(name)
    contender = prepared.contender
    if contender.formula != SAME:
        if not all(bool(tensor.isfinite().all()) for tensor in results):
            raise ArithmeticError("its results must be finite, got inf or NaN")
        return None
    factor = contender.factor(prepared.shape)
    tolerance, largest = TOLERANCES[results[0].dtype], 0.0
    for label, given, right in zip(_RESULTS, results, expected):
        difference = contender.layout.restore(given).to(right.dtype) / factor - right
        error = (difference.norm() / right.norm()).item()
        if not error <= tolerance:
            raise ArithmeticError(f"its {label} must be within {tolerance:.0e} of the reference's, got {error:.2g}")
        largest = max(largest, error)
    return largest


def expected_results(inputs: Inputs, name: str) -> list[Tensor]:
    """The reference's output, and its gradients: in float32 for half precision, else in float64."""
    wide = torch.float32 if inputs[0].dtype.itemsize < 4 else torch.float64
    *leaves, grad_output = (tensor.to(wide) for tensor in inputs)
    if name == "forward":
        return [efficient_attention(*leaves, impl="reference")]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    output = efficient_attention(*leaves, impl="reference")
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output)]


def weighed_call(contender: str, shape: Shape, dtype: str, name: str) -> Callable[[], object]:
    """For a fresh process: a contender's call, after one that warms it up, shorter where it is quadratic."""
    [one] = chosen([contender])
    positions = min(shape.positions, _QUADRATIC_WARM_UP_LEN) if one.quadratic else shape.positions
    _prepared_on_cpu(one, replace(shape, positions=positions), dtype, name).results(name)
    return partial(_call_once, _prepared_on_cpu(one, shape, dtype, name).step(name))


def _prepared_on_cpu(contender: Contender, shape: Shape, dtype: str, name: str) -> Prepared:
    inputs = random_inputs(shape, getattr(torch, dtype), "cpu")
    call = contender.make(shape, inputs[0].dtype, "cpu")
    return prepare(contender, call, shape, [inputs], backward=name != "forward")


def _call_once(step: Step) -> object:
    with step.around():
        return step.prepare(0)()


def _output_and_gradients(
    call: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor], grad_output: Tensor
) -> tuple[Tensor, ...]:
    output = call(*inputs)
    return output, *torch.autograd.grad(output, [*inputs, *weights], grad_output)


@contextmanager
def _without_gradients(around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    with torch.no_grad(), around():
        yield
