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
