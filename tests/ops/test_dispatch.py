"""Which implementation runs, and why."""

import re
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lineara.ops import (
    attend_context,
    efficient_attention,
    explain_implementation,
    kernel_attention,
    multiresolution_attention,
    summarize_context,
)
from lineara.ops.dispatch import choose_implementation
from lineara.ops.linear import reference, streaming, triton_kernels

QUERY, KEY, VALUE = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 13, 5), torch.randn(2, 3, 13, 11)
CALLS = {
    "efficient_attention": efficient_attention,
    "kernel_attention": kernel_attention,
    "multiresolution_attention": partial(multiresolution_attention, resolutions=[2, 1, 1]),
}
MODULES = {"reference": reference, "streaming": streaming, "triton": triton_kernels}


@pytest.fixture
def ran(monkeypatch):
    """The implementations that have computed anything since the test began."""
    found = set()

    def watch(name, compute):
        return lambda *inputs, **options: found.add(name) or compute(*inputs, **options)

    for name, module in MODULES.items():
        for function in ("efficient_attention", "summarize", "attend", "context_of"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, watch(name, getattr(module, function)))
    return found


@pytest.mark.parametrize("impl", MODULES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_explicit_choice_runs_whatever_the_size(call, impl, ran):
    if impl == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without a GPU")
    call(QUERY, KEY, VALUE, impl=impl)
    assert ran == {impl}


@pytest.mark.parametrize("impl", ["reference", "streaming"])
def test_so_it_does_in_the_parts(impl, ran):
    attend_context(QUERY, summarize_context(KEY, VALUE, impl=impl), impl=impl)
    assert ran == {impl}


@pytest.mark.parametrize(("limit", "picked"), [(KEY.numel(), "streaming"), (VALUE.numel(), "reference")])
@pytest.mark.parametrize("operation", CALLS)
def test_what_is_explained_runs(operation, limit, picked, ran, monkeypatch):
    monkeypatch.setattr("lineara.ops.dispatch._ONE_BLOCK_ELEMENTS", limit)
    monkeypatch.setattr("lineara.ops.dispatch._FORMULA_ELEMENTS", limit)
    monkeypatch.setattr("lineara.ops.dispatch._LONG", 1)
    said = explain_implementation(QUERY, KEY, VALUE, operation=operation)
    CALLS[operation](QUERY, KEY, VALUE)
    assert said.startswith(f"{picked}: the tensors are on the CPU and ")
    assert ran == {picked}


def test_a_short_call_takes_the_shortest_way(ran, monkeypatch):
    monkeypatch.setattr(reference, "context_of", None)
    efficient_attention(QUERY, KEY, VALUE)
    assert ran == {"reference"}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor,
        lambda tensor: tensor.mT.contiguous().mT,
        lambda tensor: tensor[:, :, ::2],
        lambda tensor: tensor.index_fill(3, torch.tensor([1]), -torch.inf),
        lambda tensor: tensor.index_fill(3, torch.tensor([1]), torch.nan),
        lambda tensor: tensor[:, :, :0],
        lambda tensor: tensor[:0],
        lambda tensor: tensor.double(),
        lambda tensor: tensor.bfloat16(),
    ],
    ids=["plain", "maps", "strided", "-inf", "nan", "no positions", "empty batch", "float64", "bfloat16"],
)
@pytest.mark.parametrize("gradients", [False, True])
def test_the_shortest_way_is_the_reference(change, gradients):
    results = []
    for impl in ("auto", "reference"):
        inputs = [change(tensor).detach().requires_grad_(gradients) for tensor in (QUERY, KEY, VALUE)]
        output = efficient_attention(*inputs, impl=impl)
        results.append([output, *torch.autograd.grad(output.sum(), inputs)] if gradients else [output])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="needs a CPU with instructions for bfloat16")
@pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"key_mask": torch.arange(600).expand(2, -1) < 500}], ids=str)
@pytest.mark.parametrize("gradients", [False, True])
def test_bfloat16_loses_no_more_than_torch_does(ran, options, gradients):
    """From 2^18 elements on, where float32 has formulas of its own for gradients."""
    inputs = [torch.randn(2, 4, 600, 64).bfloat16().requires_grad_(gradients) for _ in range(3)]
    assert explain_implementation(*inputs).startswith("reference")
    output = efficient_attention(*inputs, **options)
    assert ran == {"reference"}
    wide = [tensor.detach().double().requires_grad_(gradients) for tensor in inputs]
    expected = efficient_attention(*wide, impl="reference", **options)
    found, right = [output], [expected]
    if gradients:
        found += torch.autograd.grad(output.sum(), inputs)
        right += torch.autograd.grad(expected.sum(), wide)
    for tensor, truth in zip(found, right):
        assert tensor.dtype == torch.bfloat16
        assert (tensor.double() - truth).norm() <= 0.02 * truth.norm() + 1e-6


@pytest.mark.parametrize(("positions", "picked"), [(255, "reference"), (256, "streaming")])
def test_many_short_sequences_run_the_reference(positions, picked, ran):
    query, key, value = (torch.randn(33, 8, positions, 32) for _ in range(3))
    assert explain_implementation(query, key, value).startswith(picked)
    efficient_attention(query, key, value)
    assert ran == {picked}


# torch's own forward mode calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_explanation_knows_devices_and_transforms():
    on_meta = [tensor.to("meta") for tensor in (QUERY, KEY, VALUE)]
    assert explain_implementation(*on_meta).startswith("reference: the tensors are on meta")
    assert explain_implementation(QUERY, KEY, VALUE, operation="softmax_attention").startswith("reference: ")
    said = []
    torch.func.grad(lambda key: said.append(explain_implementation(QUERY, key, VALUE)) or key.sum())(KEY)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(VALUE, VALUE)
        said.append(explain_implementation(QUERY, KEY, dual))
    assert said[0] == "reference: a torch.func transform sees standard operators alone"
    assert said[1] == "reference: forward-mode differentiation sees standard operators alone"


def test_wrong_questions_are_named():
    with pytest.raises(ValueError, match=r"operation must be one of 'efficient_attention', .*got 'attention'"):
        explain_implementation(QUERY, KEY, VALUE, operation="attention")
    with pytest.raises(TypeError, match=r"key must be a torch\.Tensor, got NoneType"):
        explain_implementation(QUERY, None, VALUE)
    with pytest.raises(ValueError, match="query and value must be on the same device, got cpu and meta"):
        explain_implementation(QUERY, KEY, VALUE.to("meta"))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Tensors that say that they lie on a GPU, of a capability that a test chooses."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("lineara.ops.dispatch._knobs", object)

    def tensors(*shape_and_dtype, capability=(9, 0)):
        monkeypatch.setattr("lineara.ops.dispatch._capability", lambda index: capability)
        *shape, dtype = shape_and_dtype
        with FakeTensorMode():
            return [torch.empty(*shape, dtype=dtype, device="cuda") for _ in range(3)]

    return tensors


@pytest.mark.parametrize(
    ("channels", "dtype", "capability", "said"),
    [
        (64, torch.bfloat16, (9, 0), "triton: the tensors are on a GPU, where the fused kernels read and write each"),
        (512, torch.float16, (8, 0), "triton: "),
        (256, torch.float32, (8, 0), "triton: "),
        (257, torch.float32, (9, 0), "reference: in float32 the fused kernels are made for at most 256 channels"),
        (513, torch.bfloat16, (9, 0), "reference: the fused kernels need at most 512 .* channels per head, got 513"),
        (64, torch.float64, (9, 0), "reference: the fused kernels need float32, float16 or bfloat16 .* torch.float64"),
        (64, torch.bfloat16, (7, 5), "reference: the fused kernels need a GPU of compute capability 8.0 .*, got 7.5"),
    ],
)
def test_auto_picks_the_kernels_on_a_gpu_that_can_run_them_and_says_so(on_a_gpu, channels, dtype, capability, said):
    query, key, value = on_a_gpu(2, 3, 7, channels, dtype, capability=capability)
    for operation in ("efficient_attention", "kernel_attention", "multiresolution_attention"):
        assert re.match(said, explain_implementation(query, key, value, operation=operation))
    assert explain_implementation(query, key, value, operation="softmax_attention").startswith("reference: ")
    assert choose_implementation("efficient_attention", "auto", query, value) == said.partition(":")[0]


def test_a_gpu_of_amd_and_a_missing_package_leave_the_reference(on_a_gpu, monkeypatch):
    tensors = on_a_gpu(2, 3, 7, 64, torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "an NVIDIA GPU, got one of AMD" in explain_implementation(*tensors)
    monkeypatch.setattr("lineara.ops.dispatch._knobs", lambda: None)
    assert "the package triton, which is not installed" in explain_implementation(*tensors)


def test_weights_of_windows_do_not_decide_what_runs(ran):
    """Which explain_implementation does not see."""
    x, weight = torch.randn(1, 1, 8, 8), torch.randn(1, 8, 2**19)
    options = {"feature_map": "softmax", "compression": "conv", "key_weight": weight, "value_weight": weight}
    multiresolution_attention(x, x, x, resolutions=[2**19], **options)
    assert ran == {"reference"}
