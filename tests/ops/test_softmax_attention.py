"""Exact dot-product attention, the baseline."""

import math

import pytest
import torch

from lineara.ops import softmax_attention

BOTH = pytest.mark.parametrize("normalization", ["softmax", "scaling"])


def tensors(*, dtype=torch.float64):
    return tuple(torch.randn(2, 3, n, d, dtype=dtype) for n, d in ((7, 5), (13, 5), (13, 11)))


def by_definition(query, key, value, *, normalization, scale, mask=None):
    products = torch.einsum("bhnk,bhmk->bhnm", scale * query, scale * key)
    if normalization == "scaling":
        return torch.einsum("bhnm,bhmv->bhnv", products / key.shape[2], value)
    if mask is not None:
        products = products.masked_fill(~mask[:, None, None, :], -math.inf)
    return torch.einsum("bhnm,bhmv->bhnv", products.softmax(dim=3), value)


@BOTH
def test_it_is_its_definition(normalization):
    query, key, value = tensors()
    default = 5**-0.25 if normalization == "softmax" else 1.0
    for scale in (None, 0.7):
        given = softmax_attention(query, key, value, normalization=normalization, scale=scale)
        expected = by_definition(query, key, value, normalization=normalization, scale=scale or default)
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


def test_one_number_by_hand():
    # Weights e^0 and e^ln(3) of values 4 and 8.
    query = torch.tensor([1.0]).view(1, 1, 1, 1)
    key = torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    value = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    assert softmax_attention(query, key, value).item() == pytest.approx(7.0)
    assert softmax_attention(query, key, value, normalization="scaling").item() == pytest.approx(4 * math.log(3))


@BOTH
def test_masked_positions_are_as_if_absent_and_get_no_gradient(normalization, with_gradients):
    query, key, value = tensors()
    present = torch.arange(13) % 3 != 1
    poisoned = key.clone(), value.clone()
    poisoned[0][:, :, ~present] = torch.inf
    poisoned[1][:, :, ~present] = torch.nan
    mask = present.expand(2, 13)
    grad_output = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    given = with_gradients(
        lambda *inputs: softmax_attention(*inputs, normalization=normalization, key_mask=mask),
        (query, *poisoned),
        grad_output,
    )
    expected = with_gradients(
        lambda query, key, value: softmax_attention(
            query, key[:, :, present], value[:, :, present], normalization=normalization
        ),
        (query, key, value),
        grad_output,
    )
    for one, other in zip(given, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (given[2][:, :, ~present] == 0).all()


@BOTH
def test_items_without_valid_positions_and_no_positions_give_zeros(normalization, with_gradients):
    query, key, value = tensors()
    key[0] = torch.nan
    mask = torch.tensor([[False], [True]]).expand(2, 13)
    grad_output = torch.randn(2, 3, 7, 11, dtype=torch.float64)
    results = with_gradients(
        lambda *inputs: softmax_attention(*inputs, normalization=normalization, key_mask=mask),
        (query, key, value),
        grad_output,
    )
    for result in results:
        assert (result[0] == 0).all()
        assert result.isfinite().all()
        assert (result[1] != 0).any()
    empty = softmax_attention(query, key[:, :, :0], value[:, :, :0], normalization=normalization)
    assert empty.shape == (2, 3, 7, 11)
    assert (empty == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_loses_what_its_rounding_loses(normalization, dtype):
    inputs = tensors(dtype=dtype)
    given = softmax_attention(*inputs, normalization=normalization)
    exact = softmax_attention(*(tensor.double() for tensor in inputs), normalization=normalization)
    assert given.dtype == dtype
    assert (given.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_it_compiles_to_one_graph():
    torch.compiler.reset()
    inputs, mask = tensors(), torch.rand(2, 13) > 0.4
    compiled = torch.compile(softmax_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, key_mask=mask), softmax_attention(*inputs, key_mask=mask))


def test_wrong_calls_are_named():
    query, key, value = tensors()
    with pytest.raises(
        ValueError, match=r"impl must be an implementation that softmax_attention has .*got 'streaming'"
    ):
        softmax_attention(query, key, value, impl="streaming")
    with pytest.raises(ValueError, match="normalization must be one of 'softmax', 'scaling', got 'relu'"):
        softmax_attention(query, key, value, normalization="relu")
    with pytest.raises(ValueError, match="key and value must have the same number of positions, got 13 and 12"):
        softmax_attention(query, key, value[:, :, :12])
    with pytest.raises(TypeError, match=r"key_mask must be boolean"):
        softmax_attention(query, key, value, key_mask=torch.ones(2, 13))


@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_no_keys_give_zeros_whatever_the_queries_hold(normalization):
    query = torch.full((1, 1, 40, 8), 3e38, requires_grad=True)
    nothing = query[:, :, :0]
    output = softmax_attention(query, nothing, nothing, normalization=normalization)
    assert not output.any()
    assert not torch.autograd.grad(output.sum(), query)[0].any()
    starts = {"cu_seqlens_query": torch.tensor([0, 20, 40]), "cu_seqlens_key": torch.tensor([0, 0, 40])}
    packed = softmax_attention(query, torch.zeros_like(query), torch.ones_like(query), **starts)
    assert not packed[:, :, :20].any()
    assert packed[:, :, 20:].all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_and_tangents_of_equal_widths():
    inputs = tuple(torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    tangents = tuple(torch.randn_like(x) for x in inputs)
    step = 1e-6
    _, given = torch.func.jvp(softmax_attention, inputs, tangents)
    ahead, back = (softmax_attention(*(x + sign * step * t for x, t in zip(inputs, tangents))) for sign in (1.0, -1.0))
    torch.testing.assert_close(given, (ahead - back) / (2 * step), rtol=1e-6, atol=1e-8)


def test_autocast_gives_its_dtype_and_keeps_wide_sums():
    query, key, value = (torch.randn(1, 2, 100, 16) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        for normalization in ("softmax", "scaling"):
            assert softmax_attention(query, key, value, normalization=normalization).dtype == torch.bfloat16
        given = softmax_attention(query, key, value, normalization="scaling")
    narrow = [x.bfloat16() for x in (query, key, value)]
    assert torch.equal(given, softmax_attention(*narrow, normalization="scaling"))


def test_a_scale_whose_square_is_not_finite_is_refused():
    x = torch.randn(1, 1, 2, 4)
    with pytest.raises(ValueError, match=r"^scale must be at most 1\.845e\+19 for torch\.float32, got 1e\+20; "):
        softmax_attention(x, x, x, scale=1e20)
