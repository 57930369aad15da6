"""What the tests of the operations share: inputs, gradients, and the one tolerance."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def nan_scratch():
    """Memory that is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def _with_gradients(call: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The output of call(*tensors) and the gradient of every tensor."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = call(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad_output.to(output.dtype))]


@pytest.fixture
def with_gradients():
    return _with_gradients


@pytest.fixture
def assert_as_exact_as():
    """Assert that `call` is as exact as `reference`.

    Measured against the reference in float64 on the same (rounded) inputs, its output and each of its gradients may be
    off by four times what the reference in the inputs' own dtype is off, or by four times the dtype's rounding of the
    largest number among output and gradients, whichever is more.
    """

    def check(call: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Sequence[Tensor]) -> None:
        dtype = tensors[0].dtype
        exact_inputs = [tensor.double() for tensor in tensors]
        exact_output = reference(*exact_inputs)
        grad_output = torch.randn_like(exact_output).to(dtype)
        exact = _with_gradients(reference, exact_inputs, grad_output.double())
        lost = _with_gradients(reference, tensors, grad_output)
        given = _with_gradients(call, tensors, grad_output)
        largest = max(result.abs().max() for result in exact)
        for name, e, r, g in zip(("output", *(f"gradient {i}" for i in range(len(tensors)))), exact, lost, given):
            assert g.dtype == dtype, name
            assert g.shape == e.shape, name
            allowed = 4 * max((r.double() - e).abs().max(), torch.finfo(dtype).eps * largest)
            assert (g.double() - e).abs().max() <= allowed, name

    return check
