"""Properties that hold for any call, drawn by hypothesis, against a loop over single heads in float64."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineara.ops import (
    attend_context,
    efficient_attention,
    kernel_attention,
    merge_contexts,
    multiresolution_attention,
    softmax_attention,
    summarize_context,
)

GPU = torch.cuda.is_available()
DEVICE = {"triton": "cuda" if GPU else "cpu"}
LAYOUTS = ("contiguous", "heads beside channels", "channels first", "every other", "one item for all")

pytestmark = pytest.mark.usefixtures("nan_scratch")


def drawn(count: int, *, shrink: bool = True, **strategies: Any) -> Callable[..., Any]:
    """So many examples, the same in every run; shrinking what fails takes many runs, and minutes in the interpreter."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    phases = [Phase.generate, *([Phase.shrink] if shrink else [])]
    options = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=slow, phases=phases
    )
    return lambda test: options(given(**strategies)(test))


class Case(NamedTuple):
    """All that a call is made of but the numbers, which follow from the seed."""

    kind: str  # a feature map, "scaling", or the two of exact attention
    dtype: torch.dtype
    batch: int
    key_heads: int
    shared_by: int  # heads of queries per head of keys
    num_queries: int
    num_keys: int
    key_dim: int
    value_dim: int
    scale: float
    layouts: tuple[str, ...]  # of query, key, value and the gradient of the output
    mask: str  # "none", "some" or "items": whole items hidden too
    sequences: int  # 0: not packed
    silent: str  # keys of -inf: "none", "some", or "channels" as a whole
    seed: int
    resolutions: tuple[int, ...] = ()
    key_shape: tuple[int, ...] | None = None
    compression: str = "mean"
    gated: bool = False
    apart: bool = False  # whether the two parts of a quotient's gradient, which may cancel, are seen apart


@st.composite
def cases(draw: Any, kind: str, *, impl: str, silent: Sequence[str] = ("none",)) -> Case:
    kind, _, windowed = kind.partition(" over ")

    def one_of(*choices: Any) -> Any:
        return draw(st.sampled_from(choices))

    silence = one_of(*silent)
    few = impl == "triton"  # the interpreter runs one program after the other
    sequences = one_of(0, 0, 1, 3) if few else one_of(0, 0, 1, 3, 5)
    key_heads = one_of(1, 2) if few else one_of(1, 2, 3, 4)
    compression = one_of("mean", "max", *(["conv"] if silence == "none" else [])) if windowed else "mean"
    key_shape, num_keys = None, one_of(0, 1, 2, 7, 13, 31, 67)
    if windowed and not sequences and one_of(False, True):
        key_shape = one_of((1, 1), (3, 7), (5, 4), (11, 3), (1, 13), (0, 3))
        num_keys = key_shape[0] * key_shape[1]
    sizes = (1, 2, 3, 5) if compression == "conv" else (1, 2, 3, 5, 100)
    return Case(
        kind=kind,
        dtype=torch.float32 if few else one_of(torch.float32, torch.float64),
        batch=1 if sequences else one_of(1, 2) if few else one_of(1, 2, 3),
        key_heads=key_heads,
        shared_by=one_of(1, 1, 2) if few else one_of(1, 1, 2, 3) if key_heads < 3 else 1,
        num_queries=one_of(0, 1, 5, 17, 41),
        num_keys=num_keys,
        key_dim=one_of(1, 2, 3, 5, 7, 17),
        value_dim=one_of(1, 2, 3, 5, 11, 19),
        scale=one_of(1.0, 0.7, 2.0) if silence != "none" else one_of(1.0, 0.7, 2.0, -0.7, 0.0),
        layouts=tuple(one_of(*LAYOUTS) for _ in range(4)),
        mask=one_of("none", "some", "items"),
        sequences=sequences,
        silent=silence,
        seed=draw(st.integers(0, 9999)),
        resolutions=tuple(one_of(*sizes) for _ in range(key_heads)) if windowed else (),
        key_shape=key_shape,
        compression=compression,
        gated=bool(windowed) and one_of(False, True),
    )


class Inputs(NamedTuple):
    """The numbers of a case."""

    tensors: list[Tensor]  # query, key, value; gate; weights of keys and values: those that there are
    mask: Tensor | None
    starts: list[list[int]]  # of sequences, in queries and in keys; empty where nothing is packed
    grad_output: Tensor


def numbers(case: Case, device: str = "cpu") -> Inputs:
    chance = torch.Generator().manual_seed(case.seed)
    heads = case.key_heads * case.shared_by

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance).to(case.dtype)

    mask = None
    if case.mask != "none":
        mask = torch.rand(case.batch, case.num_keys, generator=chance) > 0.4
        if case.mask == "items":
            mask[torch.randint(case.batch, (1,), generator=chance)] = False
    tensors: list[Tensor] = []
    for layout, (of_heads, positions, channels) in zip(
        case.layouts,
        (
            (heads, case.num_queries, case.key_dim),
            (case.key_heads, case.num_keys, case.key_dim),
            (case.key_heads, case.num_keys, case.value_dim),
            (heads, case.num_queries, case.value_dim),
        ),
    ):
        items = 1 if layout == "one item for all" else case.batch
        tensor = normal(items, of_heads, positions, channels)
        if len(tensors) == 1 and case.silent != "none":
            where = (1, 1, 1, channels) if case.silent == "channels" else tensor.shape
            tensor = tensor.masked_fill(torch.rand(where, generator=chance) < 0.4, -torch.inf)
        if mask is not None and len(tensors) in (1, 2):  # NaN where no item looks
            hidden = ~mask if items > 1 else (~mask).all(dim=0, keepdim=True)
            tensor = tensor.masked_fill(hidden[:, None, :, None], torch.nan)
        tensors.append(laid_out(tensor.to(device), layout, case.batch))
    *tensors, grad_output = tensors
    if case.gated:
        tensors.append(torch.rand(case.batch, heads, case.num_queries, generator=chance).to(device, case.dtype))
    if case.compression == "conv":
        size = max(case.resolutions) ** (len(case.key_shape) if case.key_shape else 1)
        tensors += [normal(case.key_heads, dim, size).to(device) for dim in (case.key_dim, case.value_dim)]
    starts = [parts(length, case.sequences, chance) for length in (case.num_queries, case.num_keys)]
    return Inputs(tensors, mask, starts if case.sequences else [], grad_output)


def parts(length: int, count: int, chance: torch.Generator) -> list[int]:
    """Where each of so many consecutive parts begins, and last the length; some are empty."""
    inner = torch.randint(length + 1, (max(count - 1, 0),), generator=chance)
    return [0, *sorted(inner.tolist()), length]


def laid_out(tensor: Tensor, layout: str, batch: int) -> Tensor:
    items, heads, positions, channels = tensor.shape
    if layout == "heads beside channels":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "channels first":
        return tensor.mT.contiguous().mT
    if layout == "every other" and tensor.numel() > 1:  # a single number has a test of its own
        room = tensor.new_full((items, heads, 2 * positions, 2 * channels), torch.nan)
        room[:, :, ::2, 1::2] = tensor
        return room[:, :, ::2, 1::2]
    return tensor.expand(batch, -1, -1, -1) if layout == "one item for all" else tensor


# What is tested.


def call(case: Case, inputs: Inputs, impl: str, tensors: Sequence[Tensor]) -> Tensor:
    query, key, value, *rest = tensors
    device = query.device
    options: dict[str, Any] = {"impl": impl, "scale": case.scale}
    if inputs.mask is not None:
        options["key_mask"] = inputs.mask.to(device)
    if inputs.starts:
        of_query, of_key = (torch.tensor(starts, dtype=torch.int32, device=device) for starts in inputs.starts)
        options |= {"cu_seqlens_query": of_query, "cu_seqlens_key": of_key}
    if case.resolutions:
        options |= {"resolutions": case.resolutions, "compression": case.compression, "key_shape": case.key_shape}
        options |= {"gate": rest.pop(0)} if case.gated else {}
        options |= dict(zip(("key_weight", "value_weight"), rest))
        return multiresolution_attention(query, key, value, feature_map=case.kind, **options)
    if case.kind in ("relu", "elu"):
        return kernel_attention(query, key, value, feature_map=case.kind, **options)
    if case.kind in ("softmax", "scaling"):
        return efficient_attention(query, key, value, normalization=case.kind, **options)
    normalization = "scaling" if case.kind == "exact scaling" else "softmax"
    return softmax_attention(query, key, value, normalization=normalization, **options)


# What is right.


def loop(case: Case, inputs: Inputs, tensors: Sequence[Tensor]) -> Tensor:
    """The definition, one head of one item after the other; positions that take no part are left out."""
    query, key, value, *rest = tensors
    gate = rest.pop(0) if case.gated else None
    weights = rest or [None, None]
    if inputs.starts:
        places = [(0, range(*q), range(*k)) for q, k in zip(*map(pairwise, inputs.starts))]
    else:
        places = [(item, range(case.num_queries), range(case.num_keys)) for item in range(case.batch)]
    outputs = []
    for item, queries, keys in places:
        shape = case.key_shape or (len(keys),)
        shown = [inputs.mask is None or bool(inputs.mask[item, place]) for place in keys]
        of_heads = []
        for head in range(query.shape[1]):
            shared = head // case.shared_by
            k, v = (
                windows(case, tensor[item, shared, keys.start : keys.stop], shape, shown, shared, weight)
                for tensor, weight in zip((key, value), weights)
            )
            output = one_head(query[item, head, queries.start : queries.stop], k, v, case)
            if gate is not None:
                output = output * gate[item, head, queries.start : queries.stop, None]
            of_heads.append(output)
        outputs.append(torch.stack(of_heads))
    return torch.cat(outputs, dim=1)[None] if inputs.starts else torch.stack(outputs)


def windows(
    case: Case, tensor: Tensor, shape: Sequence[int], shown: list[bool], head: int, weight: Tensor | None
) -> Tensor:
    """What stands for the positions (M, D) of one head that take part: (J, D)."""
    if not case.resolutions:
        return tensor[torch.tensor(shown, dtype=torch.bool)]
    size = case.resolutions[head]
    found = []
    for corner in product(*(range(0, length, size) for length in shape)):
        inside = []  # (place in the window, position)
        reach = [range(min(size, length - start)) for start, length in zip(corner, shape)]
        for offset in product(*reach):
            place = position = 0
            for step, start, length in zip(offset, corner, shape):
                place, position = place * size + step, position * length + start + step
            if shown[position]:
                inside.append((place, position))
        if not inside:
            continue
        rows = tensor[[position for _, position in inside]]
        if weight is not None:
            factors = weight[head][:, [place for place, _ in inside]].mT
            found.append((factors * rows).sum(dim=0) * size ** len(shape) / len(inside))
        else:
            found.append(rows.amax(dim=0) if case.compression == "max" else rows.mean(dim=0))
    return torch.stack(found) if found else tensor[:0]


def one_head(query: Tensor, key: Tensor, value: Tensor, case: Case) -> Tensor:
    """Through the whole matrix of attention, (N, J)."""
    if len(key) == 0:
        return query.new_zeros(len(query), value.shape[1])
    query, key = case.scale * query, case.scale * key
    if case.kind in ("scaling", "exact scaling"):
        return query @ key.mT / len(key) @ value
    if case.kind == "exact":
        return (query @ key.mT).softmax(dim=1) @ value
    if case.kind == "softmax":
        heard = (key > -torch.inf).any(dim=0)  # a channel of -inf alone weighs nothing
        of_keys = torch.where(heard, key, 0.0).softmax(dim=0) * heard
        return query.softmax(dim=1) @ of_keys.mT @ value
    phi = torch.relu if case.kind == "relu" else lambda x: torch.where(x > 0, x + 1, x.clamp(max=0.0).exp())
    weights = phi(query) @ phi(key).mT
    total = weights.sum(dim=1, keepdim=True)
    total = total.detach() if case.apart else total
    return weights @ value / torch.where(total > 0, total, 1.0)


# How they are compared.


def assert_right(function: Callable[..., Tensor], case: Case, inputs: Inputs) -> None:
    """The output and every gradient are as exact as the definition computed in the inputs' own dtype.

    Like `assert_as_exact_as`, but with room for the worst of many calls: sixteen times what that is off, or sixteen
    times the dtype's rounding of the largest number (also of those that cancel in the gradient of a quotient; sixteen
    times more in float64, where nothing finer tells how much is lost). What is masked gets a gradient of exactly 0.
    """
    dtype = inputs.grad_output.dtype
    grad_output = inputs.grad_output.cpu()

    def right(dtype: torch.dtype, apart: bool = False) -> list[Tensor]:
        tensors = [tensor.cpu().to(dtype) for tensor in inputs.tensors]
        return results(lambda tensors: loop(case._replace(apart=apart), inputs, tensors), tensors, grad_output)

    exact, lost = right(torch.float64), right(dtype)
    found = results(function, inputs.tensors, inputs.grad_output)
    sizes = [*exact, *(right(torch.float64, apart=True) if case.kind in ("relu", "elu") else [])]
    largest = max((result.abs().max().item() for result in sizes if result.numel()), default=0.0)
    rounding = torch.finfo(dtype).eps * largest * (16 if dtype == torch.float64 else 1)
    for index, (e, r, f) in enumerate(zip(exact, lost, found, strict=True)):
        assert f.dtype == dtype, index
        assert f.shape == e.shape, index
        if e.numel():
            allowed = 16 * max((r.double() - e).abs().max().item(), rounding)
            error = (f.cpu().double() - e).abs()
            assert error.max() <= allowed, (index, error.max().item(), allowed)
    if inputs.mask is not None:
        hidden = ~inputs.mask[:, None, :, None]
        assert all((gradient.cpu().masked_select(hidden) == 0).all() for gradient in found[2:4])


def results(function: Callable[..., Tensor], tensors: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(leaves)
    grad_output = grad_output if output.dtype == grad_output.dtype else grad_output.to(output.dtype)
    if not output.requires_grad:  # the loop found no position
        return [output, *map(torch.zeros_like, leaves)]
    gradients = torch.autograd.grad(output, leaves, grad_output, allow_unused=True, materialize_grads=True)
    return [output.detach(), *gradients]


def check(case: Case, impl: str, block: tuple[int, int] | None = None) -> None:
    inputs = numbers(case, DEVICE.get(impl, "cpu"))
    with pytest.MonkeyPatch.context() as patch:
        if block:
            patch.setattr("lineara.ops.linear.blocks._BLOCK_ELEMENTS", block[0])
            patch.setattr("lineara.ops.linear.blocks._BLOCK_LEN", block[1])
        assert_right(lambda tensors: call(case, inputs, impl, tensors), case, inputs)


BLOCKS = st.sampled_from([(1, 1), (23, 3), (150, 7), (700, 11), (512 * 1024, 512)])
WEIGHING = ("softmax", "relu", "elu", "softmax over windows", "relu over windows", "elu over windows")
EXACT = ("exact", "exact scaling")
# Where the reference gives NaN: in gradients, and in outputs of items that a mask leaves whole.


@pytest.mark.parametrize("kind", [*WEIGHING, "scaling", *EXACT])
@drawn(25, data=st.data())
def test_the_reference_is_right_for_any_call(kind, data):
    check(data.draw(cases(kind, impl="reference")), "reference")


@pytest.mark.parametrize("kind", [*WEIGHING, "scaling"])
@drawn(35, data=st.data())
def test_streaming_is_right_for_any_call(kind, data):
    check(data.draw(cases(kind, impl="streaming")), "streaming", data.draw(BLOCKS))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [*WEIGHING, "scaling"])
@drawn(4, shrink=False, data=st.data())
def test_the_kernels_are_right_for_any_call(kind, data):
    check(data.draw(cases(kind, impl="triton")), "triton")


def test_a_single_packed_number_with_strides_gets_its_gradient():
    query = torch.tensor([[3.0, 0.0], [0.0, 0.0]])[None, None, ::2, ::2].requires_grad_()
    one, packing = torch.ones(1, 1, 1, 1), torch.tensor([0, 1])
    options = {"normalization": "scaling", "cu_seqlens_query": packing, "cu_seqlens_key": packing}
    output = efficient_attention(query, 5 * one, 7 * one, impl="streaming", **options)
    assert torch.autograd.grad(output.sum(), query)[0].item() == 35


# Key channels of -inf.

SILENT = ("some", "channels")


@pytest.mark.parametrize("kind", WEIGHING)
@drawn(25, data=st.data())
def test_a_key_of_minus_infinity_weighs_nothing(kind, data):
    check(data.draw(cases(kind, impl="reference", silent=SILENT)), "reference")


@pytest.mark.parametrize("kind", WEIGHING)
@drawn(20, data=st.data())
def test_a_key_of_minus_infinity_weighs_nothing_in_streaming(kind, data):
    check(data.draw(cases(kind, impl="streaming", silent=SILENT)), "streaming", data.draw(BLOCKS))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["softmax", "elu", "softmax over windows"])
@drawn(4, shrink=False, data=st.data())
def test_a_key_of_minus_infinity_weighs_nothing_in_the_kernels(kind, data):
    check(data.draw(cases(kind, impl="triton", silent=SILENT)), "triton")


# Summaries.


def check_summaries(case: Case, impls: Sequence[str], count: int, block: tuple[int, int] | None = None) -> None:
    """Parts that are summarised by any implementation and merged in any order are worth the whole."""
    device = DEVICE["triton"] if "triton" in impls else "cpu"
    inputs = numbers(case, device)
    chance = torch.Generator().manual_seed(case.seed)

    def choice(count: int) -> int:
        return int(torch.randint(count, (1,), generator=chance))

    of_sequences = parts(case.num_keys, count, chance)
    mask = None if inputs.mask is None else inputs.mask.to(device)
    packing: list[Any] = [None, None]
    if inputs.starts:
        packing = [torch.tensor(starts, device=device) for starts in inputs.starts]

    def summary(key: Tensor, value: Tensor, impl: str, a: int, b: int) -> Any:
        """Of the positions from a to b; of packed sequences, of those positions that lie there."""
        cu_seqlens = None if packing[1] is None else packing[1].clamp(a, b) - a
        return summarize_context(
            key[:, :, a:b],
            value[:, :, a:b],
            normalization=case.kind,
            scale=case.scale,
            key_mask=None if mask is None else mask[:, a:b],
            cu_seqlens=cu_seqlens,
            impl=impl,
        )

    plan = [(impls[choice(len(impls))], a, b) for a, b in pairwise(of_sequences)]
    order = [(choice(left), choice(left - 1)) for left in range(len(plan), 1, -1)]
    last = impls[choice(len(impls))]

    def merged(key: Tensor, value: Tensor) -> Any:
        found = [summary(key, value, *part) for part in plan]
        for first, second in order:
            one = found.pop(first)
            found.append(merge_contexts(one, found.pop(second)))
        return found[0]

    def attended(tensors: Sequence[Tensor]) -> Tensor:
        query, key, value = tensors
        return attend_context(query, merged(key, value), cu_seqlens=packing[0], impl=last)

    with pytest.MonkeyPatch.context() as patch:
        if block:
            patch.setattr("lineara.ops.linear.blocks._BLOCK_ELEMENTS", block[0])
            patch.setattr("lineara.ops.linear.blocks._BLOCK_LEN", block[1])
        assert_right(attended, case, inputs)
        whole = merged(*inputs.tensors[1:])
    assert_is_summary(case, inputs, whole)


def assert_is_summary(case: Case, inputs: Inputs, given: Any) -> None:
    """Maximum, total and weighted sum are what their formulas say, item by item, head by head."""
    _, key, value = (tensor.cpu().double() for tensor in inputs.tensors)
    spans = list(pairwise(inputs.starts[1])) if inputs.starts else [(0, case.num_keys)] * case.batch
    tolerance = 64 * torch.finfo(case.dtype).eps
    for item, (a, b) in enumerate(spans):
        row = 0 if inputs.starts else item
        shown = [i for i in range(a, b) if inputs.mask is None or inputs.mask[row, i]]
        for head in range(case.key_heads):
            k, v = case.scale * key[row, head, shown], value[row, head, shown]
            for channel in range(case.key_dim):
                logits = k[:, channel].tolist()
                maximum = max(logits, default=-torch.inf) if case.kind == "softmax" else 0.0
                weights = k[:, channel]
                if case.kind == "softmax":
                    weights = (weights - maximum).exp() if maximum > -torch.inf else torch.zeros_like(weights)
                total = weights.sum().item() if case.kind == "softmax" else float(len(shown))
                place = item, head, channel
                assert given.maximum[place].item() == pytest.approx(maximum, rel=tolerance, abs=tolerance), place
                assert given.total[place].item() == pytest.approx(total, rel=tolerance), place
                expected, bound = weights @ v, weights.abs() @ v.abs()
                assert ((given.weighted_sum[place].cpu().double() - expected).abs() <= tolerance * bound).all(), place


ALL = ("none", *SILENT)


@pytest.mark.parametrize("kind", ["softmax", "scaling"])
@drawn(30, data=st.data())
def test_parts_in_any_order_are_the_whole(kind, data):
    case = data.draw(cases(kind, impl="streaming", silent=ALL if kind == "softmax" else ALL[:1]))
    check_summaries(case, ("reference", "streaming"), data.draw(st.integers(1, 5)), data.draw(BLOCKS))


@pytest.mark.kernels
@pytest.mark.parametrize("kind", ["softmax", "scaling"])
@drawn(3, shrink=False, data=st.data())
def test_parts_in_any_order_are_the_whole_for_the_kernels(kind, data):
    case = data.draw(cases(kind, impl="triton", silent=ALL if kind == "softmax" else ALL[:1]))
    check_summaries(case, ("triton", "reference"), data.draw(st.integers(1, 4)))
