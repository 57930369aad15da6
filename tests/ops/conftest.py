"""What the tests of the operations share: inputs, gradients, and the one tolerance."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items):
    """Skip what runs kernels in an interpreter that cannot: that of Triton 3.6 beside NumPy 2.4 or newer."""
    triton = pytest.importorskip("triton")
    versions = [tuple(map(int, module.__version__.split(".")[:2])) for module in (triton, np)]
    if torch.cuda.is_available() or versions[0] >= (3, 7) or versions[1] < (2, 4):
        return
    skip = pytest.mark.skip(reason="Triton 3.6's interpreter does not run beside NumPy 2.4 or newer")
    for item in items:
        parameters = getattr(item, "callspec", None)
        if item.get_closest_marker("kernels") or (parameters and "triton" in parameters.params.values()):
            item.add_marker(skip)


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


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that these tests walk several, in positions and in rows."""
    monkeypatch.setattr("lineara.ops.linear.blocks._BLOCK_ELEMENTS", 700)
    monkeypatch.setattr("lineara.ops.linear.blocks._BLOCK_LEN", 11)


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
    largest number among output and gradients, whichever is more. In float64, where no finer number tells how much the
    reference is off, it is sixteen times that rounding.
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
            rounding = torch.finfo(dtype).eps * largest * (4 if dtype == torch.float64 else 1)
            allowed = 4 * max((r.double() - e).abs().max(), rounding)
            assert (g.double() - e).abs().max() <= allowed, name

    return check


def _strided(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, laid out otherwise."""
    batch, heads, positions, channels = tensor.shape
    if layout == "heads beside channels":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels first":
        return tensor.mT.contiguous().mT
    if layout == "every other":
        room = torch.full((batch, heads, 2 * positions, 2 * channels), torch.nan, dtype=tensor.dtype)
        room[:, :, ::2, 1::2] = tensor
        return room[:, :, ::2, 1::2]
    return tensor[:, :1].expand(-1, heads, -1, -1)  # "one head for all"


@pytest.fixture
def strided():
    return _strided
