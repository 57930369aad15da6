"""Efficient attention: what it means, and that every implementation means it."""

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from lineara.ops import efficient_attention, softmax_attention

BOTH = pytest.mark.parametrize("normalization", ["softmax", "scaling"])
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", "streaming"])


def tensors(*, batch=2, heads=3, queries=7, keys=13, key_dim=5, value_dim=11, dtype=torch.float64):
    return (
        torch.randn(batch, heads, queries, key_dim, dtype=dtype),
        torch.randn(batch, heads, keys, key_dim, dtype=dtype),
        torch.randn(batch, heads, keys, value_dim, dtype=dtype),
    )


# What it means.


@IMPLEMENTATIONS
def test_one_number_by_hand(impl):
    # Two channels, two positions. Keys: channel 0 has weights (3/4, 1/4), channel 1 has (1/2, 1/2); values 8 and 0 make
    # the context (6, 4). The query weighs the channels by (1/3, 2/3): 6/3 + 4 * 2/3.
    ln = torch.tensor([1.0, 2.0, 3.0]).log()
    query = torch.stack([ln[0], ln[1]]).view(1, 1, 1, 2)
    key = torch.tensor([[ln[2], 5.0], [ln[0], 5.0]]).view(1, 1, 2, 2)
    value = torch.tensor([8.0, 0.0]).view(1, 1, 2, 1)
    torch.testing.assert_close(efficient_attention(query, key, value, impl=impl).item(), 2 + 8 / 3)


@IMPLEMENTATIONS
def test_scaling_by_hand(impl):
    query, key = torch.tensor([2.0]).view(1, 1, 1, 1), torch.tensor([1.0, 5.0, 7.0]).view(1, 1, 3, 1)
    value = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    mask = torch.tensor([[True, True, False]])
    output = efficient_attention(query, key, value, normalization="scaling", scale=3.0, key_mask=mask, impl=impl)
    assert output.item() == pytest.approx(3 * 3 * 2 * (1 + 50) / 2)


@IMPLEMENTATIONS
@pytest.mark.parametrize("masked", [False, True])
def test_scaling_is_dot_product_attention_with_scaling(impl, masked):
    query, key, value = tensors()
    mask = torch.rand(2, 13) > 0.4 if masked else None
    ours = efficient_attention(query, key, value, normalization="scaling", scale=0.7, key_mask=mask, impl=impl)
    theirs = softmax_attention(query, key, value, normalization="scaling", scale=0.7, key_mask=mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@IMPLEMENTATIONS
def test_rows_of_the_implied_attention_are_probabilities(impl):
    # With the identity as values, the output is the attention matrix itself.
    query, key, _ = tensors()
    identity = torch.eye(13, dtype=torch.float64).expand(2, 3, 13, 13)
    rows = efficient_attention(query, key, identity, impl=impl)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(dim=3), torch.ones(2, 3, 7, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rows, (query @ key.mT).softmax(dim=3), atol=1e-2)


@IMPLEMENTATIONS
@BOTH
def test_positions_have_no_order(impl, normalization, small_blocks):
    query, key, value = tensors(queries=31, keys=31)
    order = torch.randperm(31)
    permuted = efficient_attention(
        query[:, :, order], key[:, :, order], value[:, :, order], normalization=normalization, impl=impl
    )
    straight = efficient_attention(query, key, value, normalization=normalization, impl=impl)
    torch.testing.assert_close(permuted, straight[:, :, order], rtol=1e-12, atol=1e-12)


@IMPLEMENTATIONS
@BOTH
def test_scale_multiplies_query_and_key(impl, normalization):
    query, key, value = tensors()
    scaled = efficient_attention(query, key, value, normalization=normalization, scale=1.7, impl=impl)
    by_hand = efficient_attention(1.7 * query, 1.7 * key, value, normalization=normalization, impl=impl)
    torch.testing.assert_close(scaled, by_hand, rtol=1e-12, atol=1e-12)


@IMPLEMENTATIONS
@BOTH
def test_items_and_heads_do_not_see_each_other(impl, normalization, small_blocks):
    query, key, value = tensors()
    whole = efficient_attention(query, key, value, normalization=normalization, impl=impl)
    one = [tensor[1:, 2:] for tensor in (query, key, value)]
    alone = efficient_attention(*one, normalization=normalization, impl=impl)
    torch.testing.assert_close(whole[1:, 2:], alone, rtol=1e-12, atol=1e-12)


# Masks.


@IMPLEMENTATIONS
@BOTH
def test_masked_positions_are_as_if_absent_and_get_no_gradient(impl, normalization, with_gradients, small_blocks):
    query, key, value = tensors(batch=1)
    present = torch.arange(13) % 3 != 1
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :, ~present] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e300, torch.nan], dtype=key.dtype)
    poisoned_value[:, :, ~present] = torch.nan
    poisoned_value[:, :, 1] = torch.inf

    def masked(query, key, value):
        return efficient_attention(query, key, value, normalization=normalization, key_mask=present[None], impl=impl)

    def cropped(query, key, value):
        return efficient_attention(
            query, key[:, :, present], value[:, :, present], normalization=normalization, impl=impl
        )

    grad_output = torch.randn(1, 3, 7, 11, dtype=torch.float64)
    given = with_gradients(masked, (query, poisoned_key, poisoned_value), grad_output)
    expected = with_gradients(cropped, (query, key, value), grad_output)
    for one, other in zip(given, expected):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (given[2][:, :, ~present] == 0).all()
    assert (given[3][:, :, ~present] == 0).all()


@IMPLEMENTATIONS
@BOTH
def test_an_item_without_valid_positions_gives_zeros_and_zero_gradients(
    impl, normalization, with_gradients, small_blocks
):
    query, key, value = tensors()
    key[0], value[0] = torch.nan, torch.inf
    mask = torch.tensor([[False], [True]]).expand(2, 13)

    def call(query, key, value):
        return efficient_attention(query, key, value, normalization=normalization, key_mask=mask, impl=impl)

    with torch.autograd.set_detect_anomaly(True):
        results = with_gradients(call, (query, key, value), torch.randn(2, 3, 7, 11, dtype=torch.float64))
    for result in results:
        assert (result[0] == 0).all()
        assert result.isfinite().all()
        assert (result[1] != 0).any()


@IMPLEMENTATIONS
@BOTH
def test_no_key_positions_at_all_give_zeros(impl, normalization):
    query, key, value = tensors(keys=0)
    output = efficient_attention(query, key, value, normalization=normalization, impl=impl)
    assert output.shape == (2, 3, 7, 11)
    assert (output == 0).all()


# Streaming means what the reference means.


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [1, 63, 129])
def test_streaming_is_as_exact_as_the_reference(
    normalization, dtype, masked, positions, assert_as_exact_as, nan_scratch, small_blocks
):
    inputs = tensors(keys=positions, key_dim=17, value_dim=60, dtype=dtype)
    mask = torch.rand(2, positions) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0] = True  # of one position that is hidden, nothing could be seen
    options = {"normalization": normalization, "scale": 0.7, "key_mask": mask}
    assert_as_exact_as(
        lambda *inputs: efficient_attention(*inputs, impl="streaming", **options),
        lambda *inputs: efficient_attention(*inputs, impl="reference", **options),
        inputs,
    )


@BOTH
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", ["heads beside channels", "channels first", "every other", "one head for all"])
def test_streaming_takes_any_strides(
    normalization, small, masked, layout, strided, assert_as_exact_as, nan_scratch, request
):
    if small:
        request.getfixturevalue("small_blocks")
    inputs = [strided(tensor, layout) for tensor in tensors(dtype=torch.float32)]
    options = {"normalization": normalization, "key_mask": torch.rand(2, 13) > 0.4 if masked else None}

    def call(query, key, value, impl):
        return efficient_attention(*(strided(tensor, layout) for tensor in (query, key, value)), impl=impl, **options)

    assert_as_exact_as(
        lambda *inputs: call(*inputs, impl="streaming"), lambda *inputs: call(*inputs, impl="reference"), inputs
    )


def test_streaming_takes_a_gradient_of_any_strides(with_gradients):
    inputs = tensors()
    expanded = torch.randn(1, 1, 1, 11, dtype=torch.float64).expand(2, 3, 7, 11)
    for given, expected in zip(
        with_gradients(lambda *inputs: efficient_attention(*inputs, impl="streaming"), inputs, expanded),
        with_gradients(lambda *inputs: efficient_attention(*inputs, impl="reference"), inputs, expanded),
    ):
        torch.testing.assert_close(given, expected, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_their_gradients_are_right(normalization, masked, small_blocks):
    inputs = [t.requires_grad_() for t in tensors(heads=1, queries=3, keys=13, key_dim=3, value_dim=2)]
    mask = torch.rand(2, 13) > 0.4 if masked else None
    if mask is not None:
        mask[1] = False

    def call(*inputs):
        return efficient_attention(*inputs, normalization=normalization, scale=0.7, key_mask=mask, impl="streaming")

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_one_gradient_alone_and_its_gradient(wanted):
    inputs = list(tensors())
    inputs[wanted].requires_grad_()

    def penalty(impl):
        output = efficient_attention(*inputs, impl=impl)
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs[wanted], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs[wanted])[0]

    torch.testing.assert_close(penalty("streaming"), penalty("reference"), rtol=1e-9, atol=1e-12)


# Numerics.


@IMPLEMENTATIONS
@BOTH
def test_logits_of_ten_thousand_are_finite_and_exact(impl, normalization, assert_as_exact_as, small_blocks):
    inputs = tensors(dtype=torch.float32)
    inputs = [(tensor * 1e4).clamp(-1e4, 1e4) if i < 2 else tensor for i, tensor in enumerate(inputs)]
    for result in (efficient_attention(*inputs, normalization=normalization, impl=impl),):
        assert result.isfinite().all()
    assert_as_exact_as(
        lambda *inputs: efficient_attention(*inputs, normalization=normalization, impl=impl),
        lambda *inputs: efficient_attention(*inputs, normalization=normalization, impl="reference"),
        inputs,
    )


@IMPLEMENTATIONS
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_a_million_positions_in_half_precision(impl, dtype, allowed):
    query, key, value = tensors(
        batch=1, heads=1, queries=5, keys=1_000_003, key_dim=17, value_dim=3, dtype=torch.float32
    )
    query, key, value = query.to(dtype), (3 * key).to(dtype), (value + 1).to(dtype)
    given = efficient_attention(query, key, value, impl=impl).double()
    exact = efficient_attention(query.double(), key.double(), value.double(), impl="reference")
    assert given.isfinite().all()
    assert (given - exact).norm() <= allowed * exact.norm()


@IMPLEMENTATIONS
@BOTH
def test_autocast_casts_the_inputs_once_and_keeps_sums_in_float32(impl, normalization, with_gradients, small_blocks):
    inputs = tensors(dtype=torch.float32)
    grad_output = torch.randn(2, 3, 7, 11)
    call = partial(efficient_attention, normalization=normalization, impl=impl)

    def autocast(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*inputs)

    expected = with_gradients(call, [tensor.bfloat16() for tensor in inputs], grad_output)
    given = with_gradients(autocast, inputs, grad_output)
    assert given[0].dtype == torch.bfloat16
    for one, other in zip(given, expected):
        assert torch.equal(one.bfloat16(), other)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(*(tensor.double() for tensor in inputs)).dtype == torch.float64


# Bad input.


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": (2, 3, 12, 5)}, ValueError, "key and value must have the same number of positions, got 12 and 13"),
        ({"key": (2, 2, 13, 5)}, ValueError, "key and value must have the same number of heads, got 2 and 3"),
        ({"value": (1, 3, 13, 11)}, ValueError, "key and value must have the same batch size, got 2 and 1"),
        ({"query": (2, 3, 7, 6)}, ValueError, "query and key must have the same number of channels, got 6 and 5"),
        ({"query": (1, 3, 7, 5)}, ValueError, "query and key must have the same batch size, got 1 and 2"),
        ({"query": (2, 7, 5)}, ValueError, r"query must have the shape \(batch, heads, positions, channels\), got"),
        ({"key": (2, 3, 13, 0)}, ValueError, "key must have at least one channel"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, error, message):
    shapes = {"query": (2, 3, 7, 5), "key": (2, 3, 13, 5), "value": (2, 3, 13, 11)} | change
    with pytest.raises(error, match=message):
        efficient_attention(**{name: torch.zeros(shape) for name, shape in shapes.items()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalization": "max"}, ValueError, "normalization must be one of 'softmax', 'scaling', got 'max'"),
        ({"impl": "fast"}, ValueError, "impl must be one of 'auto', 'reference', .*, got 'fast'"),
        ({"impl": "triton"}, ValueError, "impl='triton' needs .*, got torch.float64; use impl='auto'"),
        ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"shape \(batch, key positions\) = \(2, 13\)"),
        ({"key_mask": torch.ones(2, 13)}, TypeError, r"key_mask must be boolean .*, got torch.float32; write .* == 0"),
        ({"key_mask": [True] * 13}, TypeError, "key_mask must be a torch.Tensor or None, got list"),
        (
            {"key_mask": torch.ones(2, 13, dtype=torch.bool, device="meta")},
            ValueError,
            "key and key_mask must be on the same device, got cpu and meta",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        efficient_attention(*tensors(), **options)


def test_dtypes_and_devices_that_do_not_fit_are_named():
    query, key, value = tensors()
    with pytest.raises(TypeError, match=r"query must be float64, float32, bfloat16 or float16, got torch.int64"):
        efficient_attention(query.long(), key, value)
    with pytest.raises(TypeError, match=r"key and value must have the same dtype, got torch.float64 and torch.float32"):
        efficient_attention(query, key, value.float())
    with pytest.raises(TypeError, match=r"query and key must have the same dtype, got torch.float32 and torch.float64"):
        efficient_attention(query.float(), key, value)
    with pytest.raises(ValueError, match="query and key must be on the same device, got meta and cpu"):
        efficient_attention(query.to("meta"), key, value)
    with pytest.raises(TypeError, match=r"value must be a torch.Tensor, got list"):
        efficient_attention(query, key, value.tolist())


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.tensor(2.0), TypeError, "scale must be a number, got Tensor; to learn it"),
        ("two", TypeError, "scale must be a number, got str"),
        (True, TypeError, "scale must be a number, got bool"),
        (float("nan"), ValueError, "scale must be finite, got nan"),
    ],
)
def test_a_scale_that_is_no_number_is_refused(scale, error, message):
    with pytest.raises(error, match=message):
        efficient_attention(*tensors(), scale=scale)


@pytest.mark.parametrize("scale", [10**400, Fraction(10**400), np.float64("inf"), 1e39, np.str_("a"), np.complex64(1)])
def test_scales_that_are_no_finite_number_of_the_sums_are_refused(scale):
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises((ValueError, TypeError), match=r"^scale must be (finite|at most 3\.403e\+38|a number)"):
        efficient_attention(x, x, x, scale=scale)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_masks_and_packing_that_are_not_dense_are_refused():
    x, mask = torch.zeros(1, 1, 2, 4), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(TypeError, match=r"^key_mask must be a dense tensor, got torch\.sparse_coo; convert it with"):
        efficient_attention(x, x, x, key_mask=mask.to_sparse())
    with pytest.raises(TypeError, match=r"^key_mask must not be a nested tensor; pad it"):
        efficient_attention(x, x, x, key_mask=torch.nested.nested_tensor([mask[0]]))
    starts = torch.tensor([0, 2]).to_sparse()
    with pytest.raises(TypeError, match=r"^cu_seqlens_query must be a dense tensor"):
        efficient_attention(x, x, x, cu_seqlens_query=starts, cu_seqlens_key=starts)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_what_a_masked_position_holds_reaches_no_tangent():
    query, key, value = (torch.randn(1, 1, 5, 4) for _ in range(3))
    mask = torch.tensor([[True, True, True, False, False]])
    tangent = torch.ones_like(value).masked_fill(~mask[:, None, :, None], torch.nan)
    with forward_ad.dual_level():
        output = efficient_attention(query, key, forward_ad.make_dual(value, tangent), key_mask=mask)
        assert not forward_ad.unpack_dual(output).tangent.isnan().any()
