"""Kernel attention: what it means, and that every implementation means it."""

import pytest
import torch

from lineara.ops import kernel_attention

MAPS = pytest.mark.parametrize("feature_map", ["relu", "elu"])
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
    query = torch.tensor([[[[1.0, -2.0]]]], dtype=torch.float64)
    key = torch.tensor([[[[3.0, 5.0], [2.0, -1.0]]]], dtype=torch.float64)
    value = torch.tensor([[[[10.0], [20.0]]]], dtype=torch.float64)
    # relu: the query is (1, 0), the weights of the two positions are 3 and 2.
    relu = kernel_attention(query, key, value, feature_map="relu", impl=impl)
    assert relu.item() == pytest.approx((3 * 10 + 2 * 20) / (3 + 2))
    # elu + 1: the query is (2, exp(-2)), the keys are (4, 6) and (3, exp(-1)).
    small = torch.tensor(-2.0, dtype=torch.float64).exp()
    first, second = 2 * 4 + small * 6, 2 * 3 + small * torch.tensor(-1.0, dtype=torch.float64).exp()
    elu = kernel_attention(query, key, value, feature_map="elu", impl=impl)
    assert elu.item() == pytest.approx(((first * 10 + second * 20) / (first + second)).item())


@MAPS
@IMPLEMENTATIONS
def test_it_is_the_quadratic_formula_in_another_order(impl, feature_map, small_blocks):
    query, key, value = tensors()
    mask = torch.rand(2, 13) > 0.4

    def phi(x):
        return x.relu() if feature_map == "relu" else torch.nn.functional.elu(x) + 1

    weights = phi(0.7 * query) @ phi(0.7 * key).mT * mask[:, None, None, :]
    total = weights.sum(-1, keepdim=True)
    expected = torch.where(total > 0, weights @ value / total, 0.0)
    given = kernel_attention(query, key, value, feature_map=feature_map, scale=0.7, key_mask=mask, impl=impl)
    torch.testing.assert_close(given, expected, rtol=1e-10, atol=1e-12)


@IMPLEMENTATIONS
def test_a_denominator_of_zero_gives_zeros_and_finite_gradients(impl, with_gradients, small_blocks):
    query, key, value = tensors()
    query[0, 0, 3] = -1.0
    key[1] = -1.0
    output, *gradients = with_gradients(
        lambda *inputs: kernel_attention(*inputs, feature_map="relu", impl=impl),
        (query, key, value),
        torch.randn(2, 3, 7, 11),
    )
    assert (output[0, 0, 3] == 0).all()
    assert (output[1] == 0).all()
    assert (output[0, 1] != 0).any()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert (gradients[0][0, 0, 3] == 0).all()


@MAPS
@IMPLEMENTATIONS
def test_masked_positions_are_as_if_absent_and_get_no_gradient(impl, feature_map, with_gradients, small_blocks):
    query, key, value = tensors()
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, 9:] = False
    key[:, :, 9:], value[:, :, 9:] = torch.nan, torch.inf
    grad_output = torch.randn(2, 3, 7, 11, dtype=torch.float64)

    def call(key_mask):
        return lambda *inputs: kernel_attention(*inputs, feature_map=feature_map, key_mask=key_mask, impl=impl)

    given = with_gradients(call(mask), (query, key, value), grad_output)
    expected = with_gradients(call(None), (query, key[:, :, :9], value[:, :, :9]), grad_output)
    for one, other in zip(given, expected):
        positions = other.shape[2]
        torch.testing.assert_close(one[:, :, :positions], other, rtol=1e-12, atol=1e-12)
        assert (one[:, :, positions:] == 0).all()


@MAPS
@IMPLEMENTATIONS
def test_no_valid_positions_and_no_positions_give_zeros(impl, feature_map, with_gradients, small_blocks):
    mask = torch.zeros(2, 13, dtype=torch.bool)
    for inputs, options in ((tensors(), {"key_mask": mask}), (tensors(keys=0), {})):
        results = with_gradients(
            lambda *inputs, options=options: kernel_attention(*inputs, feature_map=feature_map, impl=impl, **options),
            inputs,
            torch.randn(2, 3, 7, 11),
        )
        assert all((result == 0).all() for result in results)


# Streaming means what the reference means.


@MAPS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [1, 63, 129])
def test_streaming_is_as_exact_as_the_reference(
    feature_map, dtype, masked, positions, assert_as_exact_as, nan_scratch, small_blocks
):
    inputs = tensors(keys=positions, key_dim=17, value_dim=60, dtype=dtype)
    mask = torch.rand(2, positions) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0] = True  # of one position that is hidden, nothing could be seen
    options = {"feature_map": feature_map, "scale": 0.7, "key_mask": mask}
    assert_as_exact_as(
        lambda *inputs: kernel_attention(*inputs, impl="streaming", **options),
        lambda *inputs: kernel_attention(*inputs, impl="reference", **options),
        inputs,
    )


@MAPS
@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("layout", ["heads beside channels", "channels first", "every other", "one head for all"])
def test_streaming_takes_any_strides(feature_map, small, layout, strided, assert_as_exact_as, nan_scratch, request):
    if small:
        request.getfixturevalue("small_blocks")
    inputs = [strided(tensor, layout) for tensor in tensors(dtype=torch.float32)]

    def call(impl):
        return lambda *inputs: kernel_attention(
            *(strided(tensor, layout) for tensor in inputs),
            feature_map=feature_map,
            key_mask=torch.arange(13) % 3 > torch.zeros(2, 1),
            impl=impl,
        )

    assert_as_exact_as(call("streaming"), call("reference"), inputs)


@MAPS
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_their_gradients_are_right(feature_map, masked, small_blocks):
    inputs = [t.requires_grad_() for t in tensors(heads=1, queries=3, keys=13, key_dim=3, value_dim=2)]
    mask = torch.rand(2, 13) > 0.4 if masked else None

    def call(*inputs):
        return kernel_attention(*inputs, feature_map=feature_map, scale=0.7, key_mask=mask, impl="streaming")

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@MAPS
@IMPLEMENTATIONS
def test_logits_of_ten_thousand_stay_finite(impl, feature_map, small_blocks):
    query, key, value = tensors(dtype=torch.float32)
    output = kernel_attention(1e4 * query, 1e4 * key, value, feature_map=feature_map, impl=impl)
    exact = kernel_attention(1e4 * query.double(), 1e4 * key.double(), value.double(), feature_map=feature_map)
    defined = (output != 0).any(dim=3)  # where not all features of a query are too small for float32
    assert defined.float().mean() > 0.8
    torch.testing.assert_close(output.double()[defined], exact[defined], rtol=1e-4, atol=1e-5)


def test_elu_keeps_the_digits_of_small_features():
    query = torch.full((1, 1, 1, 3), -30.0)
    key, value = torch.randn(1, 1, 7, 3) - 30.0, torch.randn(1, 1, 7, 2)
    exact = kernel_attention(query.double(), key.double(), value.double(), feature_map="elu")
    torch.testing.assert_close(kernel_attention(query, key, value, feature_map="elu").double(), exact)


@IMPLEMENTATIONS
@pytest.mark.parametrize(("feature_map", "shift"), [("elu", -30.0), ("elu", -40.0), ("relu", None)])
def test_gradients_of_tiny_denominators_are_finite_and_right(impl, feature_map, shift, with_gradients, small_blocks):
    if shift is None:
        query, key, value = (torch.tensor(x).view(1, 1, -1, 1) for x in ([1e-8], [1e-12, 2e-12], [1.0, 4.0]))
    else:
        query, value = torch.full((1, 1, 2, 8), shift), torch.randn(1, 1, 53, 3)
        key = torch.randn(1, 1, 53, 8) + shift
    inputs, grad_output = [query, key, value], torch.randn(1, 1, query.shape[2], value.shape[3])

    def call(*inputs, impl=impl):
        return kernel_attention(*inputs, feature_map=feature_map, impl=impl)

    def reference(*inputs):
        return call(*inputs, impl="reference")

    given = with_gradients(call, inputs, grad_output)
    exact = with_gradients(reference, [tensor.double() for tensor in inputs], grad_output.double())
    torch.testing.assert_close(given[0].double(), exact[0], rtol=1e-3, atol=1e-3)
    largest = max(gradient.abs().max() for gradient in exact[1:])
    for one, other in zip(given[1:], exact[1:]):
        assert (one.double() - other).abs().max() <= 1e-3 * largest


@IMPLEMENTATIONS
def test_denominators_that_are_no_normal_numbers_count_as_zero(impl, with_gradients, small_blocks):
    query, value = torch.full((1, 1, 2, 2), -49.0), torch.randn(1, 1, 5, 3)
    results = with_gradients(
        lambda *inputs: kernel_attention(*inputs, impl=impl),
        [query, query[:, :, :1] + torch.randn(5, 2), value],
        torch.randn(1, 1, 2, 3),
    )
    assert all((result == 0).all() for result in results)


@IMPLEMENTATIONS
def test_autocast_casts_the_inputs(impl):
    inputs = tensors(dtype=torch.float32)
    expected = kernel_attention(*(tensor.bfloat16() for tensor in inputs), impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(kernel_attention(*inputs, impl=impl), expected)


# Wrong calls.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"feature_map": "softmax"}, ValueError, "feature_map must be one of 'relu', 'elu', got 'softmax'"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"impl": "triton"}, ValueError, "impl='triton' needs .*; use impl='auto'"),
        ({"key_mask": torch.ones(2, 13)}, TypeError, "key_mask must be boolean"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        kernel_attention(*tensors(), **options)
