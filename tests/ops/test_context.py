"""The mergeable context: summaries of parts are worth the whole."""

from functools import reduce
from itertools import pairwise, permutations

import pytest
import torch

from lineara.ops import attend_context, efficient_attention, merge_contexts, summarize_context

BOTH = pytest.mark.parametrize("normalization", ["softmax", "scaling"])
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", "streaming"])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    monkeypatch.setattr("lineara.ops.linear.blocks._BLOCK_ELEMENTS", 300)
    monkeypatch.setattr("lineara.ops.linear.blocks._BLOCK_LEN", 7)


def tensors(*, keys=31):
    return tuple(torch.randn(2, 3, n, d, dtype=torch.float64) for n, d in ((13, 5), (keys, 5), (keys, 7)))


def test_the_summary_is_its_definition():
    _, key, value = tensors()
    summary = summarize_context(key, value, scale=0.7, impl="streaming")
    maximum = 0.7 * key.amax(dim=2)
    exponential = (0.7 * key - maximum[:, :, None]).exp()
    torch.testing.assert_close(summary.maximum, maximum, **EXACT)
    torch.testing.assert_close(summary.total, exponential.sum(dim=2), **EXACT)
    torch.testing.assert_close(summary.weighted_sum, torch.einsum("bhmk,bhmv->bhkv", exponential, value), **EXACT)
    scaling = summarize_context(key, value, normalization="scaling", scale=0.7, impl="streaming")
    assert (scaling.maximum == 0).all()
    assert (scaling.total == 31).all()
    torch.testing.assert_close(scaling.weighted_sum, torch.einsum("bhmk,bhmv->bhkv", 0.7 * key, value), **EXACT)


@IMPLEMENTATIONS
@BOTH
def test_attending_a_summary_is_attending_its_positions(impl, normalization):
    query, key, value = tensors()
    mask = torch.rand(2, 31) > 0.4
    options = {"normalization": normalization, "scale": 0.7, "key_mask": mask}
    summary = summarize_context(key, value, impl=impl, **options)
    whole = efficient_attention(query, key, value, impl="reference", **options)
    torch.testing.assert_close(attend_context(query, summary, impl=impl), whole, **EXACT)


@IMPLEMENTATIONS
@BOTH
def test_parts_merge_to_the_whole_in_any_order_and_grouping(impl, normalization):
    query, key, value = tensors()
    mask = torch.rand(2, 31) > 0.4
    mask[1, :19] = False  # for one item, whole parts have no valid position
    key[:, :, 20] = 1e4 * torch.randn(2, 3, 5, dtype=torch.float64)  # and one part outweighs the others
    edges = [0, 0, 1, 12, 19, 31]  # the first part is empty
    parts = [
        summarize_context(
            key[:, :, a:b], value[:, :, a:b], normalization=normalization, key_mask=mask[:, a:b], impl=impl
        )
        for a, b in pairwise(edges)
    ]
    whole = efficient_attention(query, key, value, normalization=normalization, key_mask=mask, impl="reference")
    for order in permutations(parts):
        left = reduce(merge_contexts, order)
        right = reduce(lambda merged, part: merge_contexts(part, merged), reversed(order[:-1]), order[-1])
        pairs = merge_contexts(merge_contexts(*order[:2]), merge_contexts(*order[2:]))
        for merged in (left, right, pairs, merge_contexts(*order)):
            torch.testing.assert_close(attend_context(query, merged, impl=impl), whole, **EXACT)


@BOTH
def test_gradients_through_a_merge_are_right(normalization):
    query, key, value = (tensor[:1, :1, :4].requires_grad_() for tensor in tensors())

    def call(query, key, value):
        parts = [
            summarize_context(key[:, :, a:b], value[:, :, a:b], normalization=normalization, impl="streaming")
            for a, b in ((0, 3), (3, 4))
        ]
        return attend_context(query, merge_contexts(*parts), impl="streaming")

    assert torch.autograd.gradcheck(call, (query, key, value))
    assert torch.autograd.gradgradcheck(call, (query, key, value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_summaries_of_lower_precision_are_kept_in_float32(dtype):
    query, key, value = (tensor.to(dtype) for tensor in tensors())
    summary = summarize_context(key, value)
    assert summary.maximum.dtype == summary.total.dtype == summary.weighted_sum.dtype == torch.float32
    assert attend_context(query, summary).dtype == dtype


def test_one_summary_serves_many_queries():
    query, key, value = tensors()
    summary = summarize_context(key, value)
    for chunk in query.split(4, dim=2):
        torch.testing.assert_close(attend_context(chunk, summary), efficient_attention(chunk, key, value), **EXACT)


def test_wrong_calls_are_named():
    query, key, value = tensors()
    softmax, scaling = summarize_context(key, value), summarize_context(key, value, normalization="scaling")
    with pytest.raises(ValueError, match="same normalization to be merged, got 'softmax' and 'scaling'"):
        merge_contexts(softmax, scaling)
    with pytest.raises(ValueError, match=r"same scale to be merged, got 1.0 and 2.0"):
        merge_contexts(softmax, summarize_context(key, value, scale=2.0))
    with pytest.raises(ValueError, match=r"contexts must have the same shape .* \(2, 3, 5, 7\) and \(1, 3, 5, 7\)"):
        merge_contexts(softmax, summarize_context(key[:1], value[:1]))
    with pytest.raises(TypeError, match=r"same dtype, got torch.float64 and torch.float32"):
        merge_contexts(softmax, summarize_context(key.float(), value.float()))
    with pytest.raises(TypeError, match="must come from summarize_context or merge_contexts, got Tensor"):
        merge_contexts(softmax, key)
    with pytest.raises(TypeError, match="must come from summarize_context or merge_contexts, got tuple"):
        attend_context(query, tuple(softmax))
    with pytest.raises(ValueError, match=r"key channels, got \(2, 4\) and \(2, 5\)"):
        attend_context(query[..., :4], softmax)
    with pytest.raises(TypeError, match=r"a torch.float32 query needs a context of torch.float32, got torch.float64"):
        attend_context(query.float(), softmax)
    with pytest.raises(ValueError, match="key and value must have the same number of positions, got 30 and 31"):
        summarize_context(key[:, :, :30], value)
    with pytest.raises(ValueError, match="impl must be one of"):
        attend_context(query, softmax, impl="none")


@pytest.mark.parametrize(
    "changed",
    [
        {"normalization": "foo"},
        {"total": None},
        {"total": torch.ones(1, 1, 3)},
        {"maximum": torch.ones(1, 1, 4, dtype=torch.float64)},
        {"weighted_sum": torch.ones(1, 1, 5, 4)},
        {"scale": float("nan")},
    ],
    ids=str,
)
def test_a_summary_that_was_changed_is_refused(changed):
    x = torch.randn(1, 1, 6, 4)
    context = summarize_context(x, x)
    pattern = "^(the tensors of a context must have the shapes|normalization must be one of|scale must be finite)"
    with pytest.raises(ValueError, match=pattern):
        attend_context(x, context._replace(**changed))
    with pytest.raises(ValueError, match=pattern):
        merge_contexts(context, context._replace(**changed))
