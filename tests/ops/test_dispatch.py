"""Which implementation runs, and why."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lineara.ops import efficient_attention, explain_implementation
from lineara.ops.dispatch import choose_implementation
from lineara.ops.efficient import operators

QUERY, KEY, VALUE = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 13, 5), torch.randn(2, 3, 13, 11)


def test_the_explanation_names_what_auto_picks():
    assert explain_implementation(QUERY, KEY, VALUE).startswith("streaming: the tensors are on the CPU")
    assert choose_implementation("efficient_attention", "auto", QUERY, VALUE) == "streaming"
    on_meta = [tensor.to("meta") for tensor in (QUERY, KEY, VALUE)]
    assert explain_implementation(*on_meta).startswith("reference: the tensors are on meta")
    assert choose_implementation("efficient_attention", "auto", on_meta[0], on_meta[2]) == "reference"
    assert explain_implementation(QUERY, KEY, VALUE, operation="softmax_attention").startswith("reference: ")


@pytest.mark.parametrize(("impl", "streams"), [("auto", True), ("streaming", True), ("reference", False)])
def test_what_is_chosen_runs(impl, streams, monkeypatch):
    monkeypatch.setattr("lineara.ops.blocks._ONE_BLOCK_ELEMENTS", 0)
    ran = []
    operator = operators.efficient_attention
    monkeypatch.setattr(operators, "efficient_attention", lambda *inputs: ran.append(1) or operator(*inputs))
    efficient_attention(QUERY, KEY, VALUE, impl=impl)
    assert bool(ran) == streams


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
    monkeypatch.setattr("lineara.ops.dispatch.find_spec", lambda name: object())

    def tensors(*shape_and_dtype, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
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
    monkeypatch.setattr("lineara.ops.dispatch.find_spec", lambda name: None)
    assert "the package triton, which is not installed" in explain_implementation(*tensors)
