"""The kernels against the reference: in Triton's interpreter, or on a GPU where there is one."""

import os
import subprocess
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch

from lineara.ops import (
    attend_context,
    efficient_attention,
    explain_implementation,
    kernel_attention,
    merge_contexts,
    multiresolution_attention,
    summarize_context,
)
from lineara.ops.linear import operators, tiles
from lineara.ops.linear import triton_kernels as kernels
from lineara.ops.linear.blocks import empty_like_query

pytestmark = pytest.mark.kernels

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter's bfloat16 is wrong.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
on_a_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA device")


def tensors(queries=129, keys=63, key_dim=17, value_dim=60, dtype=torch.float32, batch=2, heads=3):
    shapes = ((queries, key_dim), (keys, key_dim), (keys, value_dim))
    return tuple(torch.randn(batch, heads, *shape).to(DEVICE, dtype) for shape in shapes)


def mask_of(keys, batch=2):
    """Some positions hidden in the first item, and all of them in the last."""
    mask = torch.rand(batch, keys) > 0.4
    mask[-1] = False
    return mask.to(DEVICE)


def poisoned(key, value, mask):
    """NaN where the mask hides."""
    return tuple(tensor.masked_fill(~mask[:, None, :, None], torch.nan) for tensor in (key, value))


OPERATIONS = {
    "efficient": partial(efficient_attention, scale=0.7),
    "scaling": partial(efficient_attention, normalization="scaling", scale=0.7),
    "relu": partial(kernel_attention, feature_map="relu", scale=0.7),
    "elu": partial(kernel_attention, feature_map="elu", scale=0.7),
    "windows": partial(multiresolution_attention, resolutions=[1, 5, 5], scale=0.7),
    "elu windows": partial(multiresolution_attention, resolutions=[4, 4, 9], feature_map="elu", scale=0.7),
    "largest of windows": partial(multiresolution_attention, resolutions=[3, 1, 2], compression="max"),
}
operations = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@operations
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "masked"), [(129, 63, False), (1, 129, True), (63, 1, False)])
def test_output_and_gradients_are_as_exact_as_the_reference(
    operation, dtype, queries, keys, masked, nan_scratch, assert_as_exact_as
):
    mask = mask_of(keys) if masked else None
    call = partial(operation, key_mask=mask)
    inputs = tensors(queries, keys, dtype=dtype)
    if keys == 1 and dtype != torch.float32:  # gradients of queries are then 0 but for rounding, which is no measure
        exact = call(*(tensor.double() for tensor in inputs))
        error = call(*inputs, impl="triton").double() - exact
        assert error.norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
    else:
        assert_as_exact_as(partial(call, impl="triton"), partial(call, impl="reference"), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 3), (64, 128), (72, 40), (129, 65), (256, 300), (512, 17)], ids=str
)
@pytest.mark.parametrize("name", ["efficient", "elu"])
def test_any_widths(name, dtype, key_dim, value_dim, assert_as_exact_as):
    inputs = tensors(67, 71, key_dim, value_dim, dtype, batch=1, heads=1)
    call = OPERATIONS[name]
    assert_as_exact_as(partial(call, impl="triton"), partial(call, impl="reference"), inputs)


@pytest.mark.parametrize("layout", ["heads beside channels", "channels first", "every other", "one head for all"])
@pytest.mark.parametrize("name", ["efficient", "relu", "windows"])
def test_any_strides(name, layout, strided, with_gradients):
    inputs = tensors()
    same = tuple(strided(tensor, layout) for tensor in inputs)
    contiguous = tuple(tensor.contiguous() for tensor in same)
    grad_output = torch.randn(2, 3, 129, 60, device=DEVICE)
    call = partial(OPERATIONS[name], impl="triton")
    for given, expected in zip(
        with_gradients(call, same, strided(grad_output, layout)),
        with_gradients(call, contiguous, strided(grad_output, layout).contiguous()),
    ):
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "expected"), [((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 2, 1, 3), (0, 2, 1, 3)), ((0, 1, 3, 2), (0, 1, 3, 2))]
)
def test_the_output_lies_in_memory_as_the_query_does(axes, expected):
    query, key, value = tensors()
    inverse = [axes.index(axis) for axis in range(4)]
    query = query.permute(axes).contiguous().permute(inverse)
    output = efficient_attention(query, key, value, impl="triton")
    assert output.permute(expected).is_contiguous()
    assert output.stride() == empty_like_query(query, 60).stride()


@operations
def test_what_is_masked_never_leaks(operation, with_gradients):
    query, key, value = tensors()
    mask = mask_of(63)
    grad_output = torch.randn(2, 3, 129, 60, device=DEVICE)
    call = partial(operation, key_mask=mask)
    given = with_gradients(partial(call, impl="triton"), (query, *poisoned(key, value, mask)), grad_output)
    expected = with_gradients(partial(call, impl="reference"), (query, key, value), grad_output)
    for one, other in zip(given, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (given[0][-1] == 0).all()


def test_gates_and_weighted_windows(assert_as_exact_as):
    query, key, value = tensors()
    gate = torch.rand(2, 3, 129, device=DEVICE)
    weights = [torch.rand(3, channels, 4, device=DEVICE) for channels in (17, 60)]

    def call(query, key, value, gate, key_weight, value_weight, *, impl):
        return multiresolution_attention(
            query,
            key,
            value,
            gate=gate,
            key_weight=key_weight,
            value_weight=value_weight,
            compression="conv",
            resolutions=[4, 2, 2],
            impl=impl,
        )

    inputs = (query, key, value, gate, *weights)
    assert_as_exact_as(partial(call, impl="triton"), partial(call, impl="reference"), inputs)

    def gated(query, key, value, gate, *, impl):
        return multiresolution_attention(query, key, value, gate=gate, resolutions=[7, 1, 2], impl=impl)

    assert_as_exact_as(partial(gated, impl="triton"), partial(gated, impl="reference"), inputs[:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "factor"), [("efficient", 1e4), ("scaling", 3e-5), ("scaling", 1e3), ("elu", 1e3)])
def test_large_and_small_numbers(name, factor, dtype, with_gradients):
    query, key, value = (tensor.to(dtype) for tensor in tensors())
    inputs = (query * factor, key * factor, value) if name == "efficient" else (query, key, value * factor)
    grad_output = torch.randn(2, 3, 129, 60, device=DEVICE).to(dtype)
    call = partial(OPERATIONS[name], scale=1.0)  # which would round large keys
    given = with_gradients(partial(call, impl="triton"), inputs, grad_output)
    exact = with_gradients(partial(call, impl="reference"), [t.double() for t in inputs], grad_output)
    # (One key that takes all the weight leaves the difference of two equal numbers in its gradient.)
    largest = max(result.abs().max() for result in exact) if name == "efficient" else None
    for one, other in zip(given, exact):
        allowed = 16 * torch.finfo(dtype).eps * (largest or other.abs().max())
        assert (one.double() - other).abs().max() <= allowed


@pytest.mark.parametrize(("queries", "keys"), [(0, 63), (129, 0), (0, 0)])
def test_no_positions(queries, keys, with_gradients):
    inputs = tensors(queries, keys)
    grad_output = torch.randn(2, 3, queries, 60, device=DEVICE)
    for call in (efficient_attention, kernel_attention):
        output, *gradients = with_gradients(partial(call, impl="triton"), inputs, grad_output)
        assert (output == 0).all()
        assert all((gradient == 0).all() for gradient in gradients)
    assert efficient_attention(*tensors(batch=0), impl="triton").shape == (0, 3, 129, 60)


def test_several_programs_share_the_positions_and_every_run_gives_the_same(with_gradients, monkeypatch):
    inputs = tensors(1100, 2100, batch=1, heads=2)
    grad_output = torch.randn(1, 2, 1100, 60, device=DEVICE)
    launched = []
    launch = kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, programs, *rest, **options: launched.append((kernel, programs)) or launch(
            kernel, programs, *rest, **options
        )
    )  # fmt: skip
    call = partial(efficient_attention, impl="triton")
    first = with_gradients(call, inputs, grad_output)
    programs = dict(launched)
    assert programs[kernels._summarize_kernel] > 2
    assert programs[kernels._attend_backward_kernel] > 2
    for one, other in zip(first, with_gradients(call, inputs, grad_output)):
        assert torch.equal(one, other)


PACKED = {
    "efficient": partial(efficient_attention, scale=0.7),
    "scaling": partial(efficient_attention, normalization="scaling"),
    "elu": kernel_attention,
    "windows": partial(multiresolution_attention, resolutions=[1, 5, 3], compression="max"),
}


@pytest.mark.parametrize("impl", ["reference", "streaming", "triton"])
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences_equal_each_alone(name, impl, with_gradients):
    query, key, value = tensors(130, 150, batch=1)
    starts = {"query": [0, 7, 7, 68, 130], "key": [0, 71, 73, 73, 150]}
    cu_seqlens = {
        f"cu_seqlens_{name}": torch.tensor(at, dtype=torch.int32, device=DEVICE) for name, at in starts.items()
    }
    mask = (torch.rand(1, 150) > 0.3).to(DEVICE)
    grad_output = torch.randn(1, 3, 130, 60, device=DEVICE)

    def together(*inputs):
        return PACKED[name](*inputs, key_mask=mask, impl=impl, **cu_seqlens)

    def alone(query, key, value):
        parts = zip(pairwise(starts["query"]), pairwise(starts["key"]))
        return torch.cat(
            [
                PACKED[name](
                    query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], key_mask=mask[:, c:d], impl="reference"
                )
                for (a, b), (c, d) in parts
            ],
            dim=2,
        )

    given = with_gradients(together, (query, key, value), grad_output)
    expected = with_gradients(alone, (query, key, value), grad_output)
    for one, other in zip(given, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "streaming", "triton"])
def test_packed_contexts(impl):
    query, key, value = tensors(130, 150, batch=1)
    cu_seqlens = torch.tensor([0, 71, 150], device=DEVICE)
    context = summarize_context(key, value, cu_seqlens=cu_seqlens, impl=impl)
    assert context.total.shape == (2, 3, 17)
    given = attend_context(query, context, cu_seqlens=torch.tensor([0, 50, 130], device=DEVICE), impl=impl)
    for a, b, c, d in ((0, 50, 0, 71), (50, 130, 71, 150)):
        alone = efficient_attention(query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], impl="reference")
        torch.testing.assert_close(given[:, :, a:b], alone, rtol=1e-4, atol=1e-5)


def test_the_kernels_never_read_beyond_the_positions_and_give_zeros_where_no_sequence_is(with_gradients):
    inputs = tensors(20, 20, batch=1)
    packing = torch.tensor([0, 7, 1000], device=DEVICE)
    call = partial(efficient_attention, cu_seqlens_query=packing, cu_seqlens_key=packing, impl="triton")
    assert call(*inputs).isfinite().all()
    packing = torch.tensor([3, 7], device=DEVICE)
    call = partial(efficient_attention, cu_seqlens_query=packing, cu_seqlens_key=packing, impl="triton")
    for result in with_gradients(call, inputs, torch.randn(1, 3, 20, 60, device=DEVICE)):
        assert (result[:, :, :3] == 0).all()
        assert (result[:, :, 3:7] != 0).any()
        assert (result[:, :, 7:] == 0).all()


@pytest.mark.parametrize("starts", [[0, 7], [1, 20], [0, 9, 7, 20], [0, 21], [0, 2**40, 20], [0, -1, 20]])
def test_packing_that_does_not_cover_the_positions_is_named(starts):
    inputs = tensors(20, 20, batch=1)
    packing = torch.tensor(starts, device=DEVICE)
    for impl in ("reference", "streaming"):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the number of positions, 20, got"):
            efficient_attention(*inputs, cu_seqlens_query=packing, cu_seqlens_key=packing, impl=impl)


GOOD = torch.tensor([0, 129])


@pytest.mark.parametrize(
    ("query", "key", "error", "message"),
    [
        (GOOD, None, ValueError, "must both be given or both be None, got only cu_seqlens_query"),
        ([0, 129], GOOD, TypeError, "cu_seqlens_query must be a torch.Tensor or None, got list"),
        (GOOD.float(), GOOD, TypeError, "cu_seqlens_query must be int32 or int64, got torch.float32"),
        (GOOD[None], GOOD, ValueError, r"cu_seqlens_query must have the shape .* got \(1, 2\)"),
        (GOOD[:1], GOOD, ValueError, r"with at least one sequence, got \(1,\)"),
        (GOOD, torch.tensor([0, 5, 63]), ValueError, "must have the same number of entries, got 2 and 3"),
    ],
)
def test_wrong_packing_is_named(query, key, error, message):
    inputs = tensors(batch=1)
    for call in (efficient_attention, kernel_attention, partial(multiresolution_attention, resolutions=[1, 2, 2])):
        with pytest.raises(error, match=message):
            call(*(tensor.cpu() for tensor in inputs), cu_seqlens_query=query, cu_seqlens_key=key)
    with pytest.raises(ValueError, match="query must have a batch size of 1 with cu_seqlens_query, got 2"):
        efficient_attention(*(t.cpu() for t in tensors()), cu_seqlens_query=GOOD, cu_seqlens_key=GOOD)


@pytest.mark.parametrize("impl", ["streaming", "triton"])
@pytest.mark.parametrize("call", [efficient_attention, kernel_attention])
def test_packing_of_any_layout_is_read_and_compiled(call, impl, with_gradients):
    query, key, value = (tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors(20, 20, batch=1))
    apart = torch.tensor([0, 99, 7, 99, 20, 99], device=DEVICE)[::2]
    packing = {"cu_seqlens_query": apart, "cu_seqlens_key": apart}
    grad_output = torch.randn(1, 20, 3, 60, device=DEVICE).transpose(1, 2)

    def heads_together(*inputs):
        output = call(*inputs, **packing, impl=impl).transpose(1, 2).reshape(1, 20, 180)
        return output.view(1, 20, 3, 60).transpose(1, 2)

    expected = with_gradients(partial(call, **packing, impl="reference"), (query, key, value), grad_output)
    compiled = torch.compile(heads_together, fullgraph=True, backend="aot_eager")
    for given in (heads_together, compiled):
        for one, other in zip(with_gradients(given, (query, key, value), grad_output), expected):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["scaling", "relu", "elu"])
def test_one_large_query_or_channel_leaves_the_others_their_digits_in_float16(name):
    query, key, value = (tensor.half() for tensor in tensors(64, 64, 20, 17, batch=1))
    query[:, :, 1:] *= 0.01
    call = partial(OPERATIONS[name], scale=1.0)
    before = call(query, key, value, impl="triton")[:, :, 1:]
    query[:, :, 0] = 6_000
    after = call(query, key, value, impl="triton")[:, :, 1:]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    query[..., 0], key[..., 0], key[..., 1:] = 0, 30_000 if name == "scaling" else -9, 0.01 * key[..., 1:]
    exact = call(query.double(), key.double(), value.double())[:, :, 1:]
    given = call(query, key, value, impl="triton").double()[:, :, 1:]
    assert (given - exact).norm() <= 2e-3 * exact.norm()


@pytest.mark.parametrize("channels", [17, 20, 32])
def test_padding_of_channels_takes_no_digits_from_small_weights(channels):
    key = (torch.randn(1, 1, 100, channels) * 0.3 - 14).half().to(DEVICE)  # elu + 1 is about 1e-6
    query, value = (torch.randn(1, 1, 100, channels).half().to(DEVICE) for _ in range(2))
    exact = kernel_attention(query.double(), key.double(), value.double())
    given = kernel_attention(query, key, value, impl="triton").double()
    assert (given - exact).norm() <= 2e-3 * exact.norm()


def test_the_users_precision_of_float32_is_asked_for_in_either_way():
    program = (
        "import torch\n"
        "from lineara.ops import efficient_attention\nfrom lineara.ops.linear import triton_kernels\n"
        "key = torch.randn(1, 1, 5, 16)\n"
        "print(triton_kernels._precision(key))\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "efficient_attention(key, key, key, impl='triton')\n"
        "print(triton_kernels._precision(key))\n"
    )
    environment = os.environ | ({} if GPU else {"TRITON_INTERPRET": "1"})
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert answer.stdout.split() == ["tf32x3", "tf32"], answer.stderr[-500:]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    assert kernels._precision(torch.ones(1)) == "tf32"
    torch.set_float32_matmul_precision(before)
    assert kernels._precision(torch.ones(1)) == "tf32x3"


def test_many_splits_are_merged(monkeypatch, assert_as_exact_as):
    monkeypatch.setattr(tiles, "_LEAST_BLOCKS", 1)
    monkeypatch.setattr(tiles, "describe", lambda device: tiles.Device(100, 233472, 232448, 9))
    tiles._splits.cache_clear()
    call = partial(efficient_attention, scale=0.7)
    inputs = tensors(2_500, 2_600, 17, 19, batch=1, heads=1)
    assert_as_exact_as(partial(call, impl="triton"), partial(call, impl="reference"), inputs)


def test_contexts_of_kernels_merge():
    query, key, value = tensors()
    parts = [summarize_context(key[:, :, a:b], value[:, :, a:b], impl="triton") for a, b in ((0, 5), (5, 63))]
    given = attend_context(query, merge_contexts(*parts), impl="triton")
    torch.testing.assert_close(given, efficient_attention(query, key, value, impl="reference"), rtol=1e-4, atol=1e-5)


def test_gradients_of_gradients():
    inputs = [tensor.requires_grad_() for tensor in tensors(7, 5)]

    def second(impl):
        output = efficient_attention(*inputs, impl=impl)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)

    for one, other in zip(second("triton"), second("reference")):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# torch's own checker looks at .grad where there is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("packed", [False, True])
def test_the_operators_keep_the_contract_of_torch_library(packed):
    query, key, value = (tensor.requires_grad_() for tensor in tensors(11, 13, 5, 7, batch=1))
    packing = [torch.tensor([0, 4, n], device=DEVICE) for n in (11, 13)] if packed else [None, None]
    name_and_scale, positions = ("softmax", 0.7), ([], [], "mean")
    torch.library.opcheck(
        operators.SUMMARIZE, (key, value, None, packing[1], None, None, *name_and_scale, *positions, "triton")
    )
    items = 2 if packed else 1
    sums = [torch.rand(items, 3, *shape, device=DEVICE).requires_grad_() for shape in ((5,), (5, 7))]
    for laid_out in (query, query.mT.contiguous().mT):
        torch.library.opcheck(operators.ATTEND, (laid_out, *sums, None, packing[0], *name_and_scale, "triton"))


def test_compiled_calls_equal_eager_ones_for_any_length_without_compiling_again(with_gradients):
    torch.compiler.reset()
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    call = partial(efficient_attention, impl="triton")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    for first, keys in ((True, 13), (False, 17), (False, 131)):
        inputs = tensors(7, keys)
        grad_output = torch.randn(2, 3, 7, 60, device=DEVICE)
        for one, other in zip(with_gradients(compiled, inputs, grad_output), with_gradients(call, inputs, grad_output)):
            torch.testing.assert_close(one, other)
        assert bool(compilations) == first
        compilations.clear()


def test_autocast_casts_mixed_inputs():
    query, key, value = tensors(7, 13)
    gate = torch.rand(2, 3, 7, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        given = efficient_attention(query.bfloat16(), key, value, impl="reference")
        gated = multiresolution_attention(
            query.bfloat16(), key, value, resolutions=[1, 2, 2], gate=gate, impl="reference"
        )
    assert given.dtype == gated.dtype == torch.bfloat16


def test_autocast_reaches_the_operators_called_directly():
    _, key, value = tensors(7, 13)
    dtype = torch.bfloat16
    arguments = (None, None, None, None, "softmax", 1.0, [], [], "mean", "streaming")
    with torch.autocast(DEVICE, dtype):
        given = torch.ops.lineara.summarize(key, value, *arguments)
    expected = torch.ops.lineara.summarize(key.to(dtype), value.to(dtype), *arguments)
    for one, other in zip(given, expected):
        assert torch.equal(one, other)


# What cannot run.


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, v: efficient_attention(q.double(), k.double(), v.double(), impl="triton"), "got torch.float64"),
        (lambda q, k, v: kernel_attention(q, k, v.repeat(1, 1, 1, 9), impl="triton"), "at most 512 .* got 540"),
    ],
)
def test_what_the_kernels_cannot_take_is_named(call, message):
    with pytest.raises(ValueError, match=rf"impl='triton' needs .*{message}.*; use impl='auto'"):
        call(*tensors())


@pytest.mark.skipif(GPU, reason="is about machines without one")
def test_without_a_gpu_only_the_interpreter_takes_cpu_tensors(monkeypatch):
    inputs = tensors()
    with pytest.raises(ValueError, match="in Triton's interpreter, which gets bfloat16 wrong"):
        efficient_attention(*(tensor.bfloat16() for tensor in inputs), impl="triton")
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    sentence = "impl='triton' needs CUDA tensors, got cpu; use impl='auto' or move the tensors"
    for call in (efficient_attention, kernel_attention, partial(multiresolution_attention, resolutions=[1, 2, 2])):
        with pytest.raises(ValueError, match=f"^{sentence}$"):
            call(*inputs, impl="triton")
    monkeypatch.setattr("lineara.ops.dispatch._knobs", lambda: None)
    with pytest.raises(ValueError, match="impl='triton' needs the package triton, which is not installed"):
        efficient_attention(*inputs, impl="triton")


def test_an_error_of_a_kernel_is_not_swallowed(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(kernels, "_launch", broken)
    with pytest.raises(RuntimeError, match="out of registers"):
        efficient_attention(*tensors(), impl="triton")


# On a GPU alone.


@pytest.mark.gpu
@on_a_gpu
def test_auto_picks_the_kernels_on_a_gpu_and_says_so():
    assert explain_implementation(*tensors(dtype=torch.bfloat16)).startswith("triton: ")
    assert explain_implementation(*(t.double() for t in tensors())).startswith(
        "reference: the fused kernels need float32"
    )


@pytest.mark.gpu
@on_a_gpu
def test_nothing_waits_for_the_gpu_and_a_graph_replays(with_gradients):
    inputs = tensors(4099, 4099, 64, 64, torch.bfloat16)
    grad_output = torch.randn(2, 3, 4099, 64, device=DEVICE)
    call = partial(efficient_attention, impl="triton")
    expected = with_gradients(call, inputs, grad_output)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with_gradients(call, inputs, grad_output)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradients(call, inputs, grad_output)
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    for one, other in zip(captured, expected):
        assert torch.equal(one, other)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize(("heads", "positions", "channels"), [(1, 2**24, 128), (4096, 1031, 64), (1, 65_536, 256)])
def test_large_sizes(heads, positions, channels):
    inputs = [torch.randn(1, heads, positions, channels, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)]
    given = efficient_attention(*inputs, impl="triton")
    context = summarize_context(*inputs[1:], impl="reference")
    for at in (0, positions - 129):  # beyond 2 Gi elements, 32-bit offsets would have gone round
        expected = attend_context(inputs[0][:, :, at : at + 129].float(), context, impl="reference")
        torch.testing.assert_close(given[:, :, at : at + 129].float(), expected, rtol=2e-2, atol=1e-3)
