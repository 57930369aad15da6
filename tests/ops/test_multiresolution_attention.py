"""Multiresolution attention: what it means, and that every implementation means it."""

import math

import pytest
import torch

from lineara.ops import efficient_attention, kernel_attention, multiresolution_attention

MAPS = pytest.mark.parametrize("feature_map", ["softmax", "relu", "elu"])
KINDS = pytest.mark.parametrize("compression", ["mean", "max", "conv"])
IMPLEMENTATIONS = pytest.mark.parametrize("impl", ["reference", "streaming"])
RESOLUTIONS = (4, 4, 1, 3, 2)
GRIDS = pytest.mark.parametrize("key_shape", [None, (11, 7), (2, 5, 3)])


@pytest.fixture(autouse=True)
def _small_blocks(small_blocks):
    """Every test here walks several blocks."""


def tensors(*, batch=2, heads=5, queries=7, keys=13, key_dim=3, value_dim=11, dtype=torch.float64):
    return [
        torch.randn(batch, heads, queries, key_dim, dtype=dtype),
        torch.randn(batch, heads, keys, key_dim, dtype=dtype),
        torch.randn(batch, heads, keys, value_dim, dtype=dtype),
    ]


def weights(compression, *, resolutions=RESOLUTIONS, num_axes=1, key_dim=3, value_dim=11, dtype=torch.float64):
    """The weights that the compression needs, as options of a call."""
    if compression != "conv":
        return {}
    size = max(resolutions) ** num_axes
    return {
        name: torch.randn(len(resolutions), width, size, dtype=dtype)
        for name, width in (("key_weight", key_dim), ("value_weight", value_dim))
    }


def assert_close(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-11, atol=1e-12)


# What it means.


@IMPLEMENTATIONS
def test_one_number_by_hand(impl):
    """Resolution 2 over three positions: the windows (1, 3) and (7), one head, relu."""
    query = torch.tensor([2.0], dtype=torch.float64).view(1, 1, 1, 1)
    key = torch.tensor([1.0, 3.0, 7.0], dtype=torch.float64).view(1, 1, 3, 1)
    value = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64).view(1, 1, 3, 1)
    options = {"resolutions": [2], "feature_map": "relu", "impl": impl}
    mean = multiresolution_attention(query, key, value, **options)
    assert mean.item() == pytest.approx((2 * 15 + 7 * 60) / (2 + 7))
    largest = multiresolution_attention(query, key, value, compression="max", **options)
    assert largest.item() == pytest.approx((3 * 20 + 7 * 60) / (3 + 7))
    # The last window has one of its two positions, so its weighted sum counts twice.
    key_weight = torch.tensor([0.25, 1.0], dtype=torch.float64).view(1, 1, 2)
    conv = multiresolution_attention(
        query, key, value, compression="conv", key_weight=key_weight, value_weight=0.5 + 0 * key_weight, **options
    )
    first, second = 0.25 * 1 + 1.0 * 3, 2 * 0.25 * 7
    assert conv.item() == pytest.approx((first * 15 + second * 60) / (first + second))
    gated = multiresolution_attention(query, key, value, gate=torch.full((1, 1, 1), 0.3).double(), **options)
    assert gated.item() == pytest.approx(0.3 * mean.item())


@IMPLEMENTATIONS
@pytest.mark.parametrize("masked", [False, True])
def test_one_head_at_resolution_one_under_softmax_is_efficient_attention(impl, masked):
    inputs = tensors(heads=1)
    options = {"key_mask": torch.rand(2, 13) > 0.4 if masked else None, "scale": 0.7, "impl": impl}
    given = multiresolution_attention(*inputs, resolutions=[1], **options)
    assert torch.equal(given, efficient_attention(*inputs, **options))


@IMPLEMENTATIONS
@pytest.mark.parametrize("feature_map", ["relu", "elu"])
def test_resolution_one_without_a_gate_is_kernel_attention_with_heads(impl, feature_map):
    inputs = tensors()
    options = {"feature_map": feature_map, "key_mask": torch.rand(2, 13) > 0.4, "scale": 0.7, "impl": impl}
    given = multiresolution_attention(*inputs, resolutions=[1] * 5, **options)
    assert_close(given, kernel_attention(*inputs, **options))


@MAPS
@KINDS
@GRIDS
@IMPLEMENTATIONS
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_attention_over_windows_that_a_loop_compresses(impl, feature_map, compression, key_shape, masked):
    num_keys = 13 if key_shape is None else math.prod(key_shape)
    query, key, value = tensors(keys=num_keys)
    mask = torch.rand(2, num_keys) > 0.5 if masked else torch.ones(2, num_keys, dtype=torch.bool)
    options = weights(compression, num_axes=1 if key_shape is None else len(key_shape))
    given = multiresolution_attention(
        query,
        key,
        value,
        resolutions=RESOLUTIONS,
        compression=compression,
        feature_map=feature_map,
        key_shape=key_shape,
        key_mask=mask if masked else None,
        impl=impl,
        **options,
    )
    for item in range(2):
        for head, resolution in enumerate(RESOLUTIONS):
            k, v = (
                compressed_by_a_loop(
                    tensor[item, head], resolution, key_shape or (13,), mask[item], compression, weight
                )
                for tensor, weight in (
                    (key, options.get("key_weight", [None] * 5)[head]),
                    (value, options.get("value_weight", [None] * 5)[head]),
                )
            )
            assert_close(given[item, head], attention_of_one_head(query[item, head], k, v, feature_map))


def compressed_by_a_loop(tensor, resolution, shape, mask, compression, weight):
    members = {}  # window -> its positions, each with its place in the window
    for position in range(len(tensor)):
        place = torch.unravel_index(torch.tensor(position), shape)
        window = tuple(int(p) // resolution for p in place)
        number = 0
        for p in place:
            number = number * resolution + int(p) % resolution
        if mask[position]:
            members.setdefault(window, []).append((number, tensor[position]))
    rows = []
    for _, found in sorted(members.items()):
        stacked = torch.stack([row for _, row in found])
        if compression == "max":
            rows.append(stacked.amax(0))
        elif compression == "mean":
            rows.append(stacked.mean(0))
        else:
            chosen = torch.stack([weight[:, number] for number, _ in found])
            rows.append((stacked * chosen).sum(0) * resolution ** len(shape) / len(found))
    return torch.stack(rows) if rows else tensor[:0]


def attention_of_one_head(query, key, value, feature_map):
    if feature_map == "softmax":
        return query.softmax(-1) @ (key.softmax(0).mT @ value)
    phi = torch.relu if feature_map == "relu" else lambda x: torch.nn.functional.elu(x) + 1
    scores = phi(query) @ phi(key).mT
    total = scores.sum(-1, keepdim=True)
    return torch.where(total > 0, scores @ value / total, 0.0)


@IMPLEMENTATIONS
def test_weights_of_one_over_the_positions_are_the_mean(impl):
    inputs = tensors()
    size = torch.tensor(RESOLUTIONS, dtype=torch.float64)[:, None, None]
    options = {"resolutions": RESOLUTIONS, "key_mask": torch.rand(2, 13) > 0.4, "impl": impl}
    conv = multiresolution_attention(
        *inputs,
        compression="conv",
        key_weight=(1 / size).expand(-1, 3, 4),
        value_weight=(1 / size).expand(-1, 11, 4),
        **options,
    )
    assert_close(conv, multiresolution_attention(*inputs, **options))


# The limits.


@MAPS
@KINDS
@IMPLEMENTATIONS
def test_padding_changes_nothing_and_masked_positions_get_no_gradient(impl, feature_map, compression, with_gradients):
    query, key, value = tensors()
    options = {
        "resolutions": RESOLUTIONS,
        "compression": compression,
        "feature_map": feature_map,
        "impl": impl,
        **weights(compression),
    }
    padded = [
        torch.cat([tensor, torch.full((2, 5, 6, tensor.shape[3]), fill)], dim=2)
        for tensor, fill in ((key, torch.nan), (value, torch.inf))
    ]
    mask = (torch.arange(19) < 13).expand(2, -1)
    grad_output = torch.randn(2, 5, 7, 11, dtype=torch.float64)
    expected = with_gradients(
        lambda *inputs: multiresolution_attention(*inputs, **options), (query, key, value), grad_output
    )
    given = with_gradients(
        lambda *inputs: multiresolution_attention(*inputs, key_mask=mask, **options), (query, *padded), grad_output
    )
    for one, other in zip(given, expected):
        positions = other.shape[2]
        assert_close(one[:, :, :positions], other)
        assert (one[:, :, positions:] == 0).all()


@MAPS
@pytest.mark.parametrize("compression", ["mean", "max"])
@IMPLEMENTATIONS
def test_the_order_inside_a_window_does_not_matter_for_mean_and_max(impl, feature_map, compression):
    query, key, value = tensors(keys=12)
    order = torch.cat([start + torch.randperm(4) for start in range(0, 12, 4)])
    options = {"resolutions": [4] * 5, "compression": compression, "feature_map": feature_map, "impl": impl}
    given = multiresolution_attention(query, key[:, :, order], value[:, :, order], **options)
    assert_close(given, multiresolution_attention(query, key, value, **options))
    other = torch.arange(12).view(3, 4).mT.flatten()  # mixes the windows
    mixed = multiresolution_attention(query, key[:, :, other], value[:, :, other], **options)
    assert not torch.allclose(given, mixed)


@MAPS
@KINDS
@IMPLEMENTATIONS
def test_a_window_without_valid_positions_is_as_if_absent(impl, feature_map, compression):
    query, key, value = tensors()
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[:, 4:8] = False  # a whole window of 4
    key[:, :, 4:8], value[:, :, 4:8] = torch.inf, torch.nan
    options = {
        "resolutions": [4] * 5,
        "compression": compression,
        "feature_map": feature_map,
        "impl": impl,
        **weights(compression, resolutions=[4] * 5),
    }
    given = multiresolution_attention(query, key, value, key_mask=mask, **options)
    kept = [0, 1, 2, 3, 8, 9, 10, 11, 12]
    assert_close(given, multiresolution_attention(query, key[:, :, kept], value[:, :, kept], **options))


@MAPS
@KINDS
@IMPLEMENTATIONS
def test_items_without_valid_positions_give_zeros(impl, feature_map, compression, with_gradients):
    mask = torch.zeros(2, 13, dtype=torch.bool)
    mask[0] = True
    results = with_gradients(
        lambda *inputs: multiresolution_attention(
            *inputs,
            resolutions=RESOLUTIONS,
            compression=compression,
            feature_map=feature_map,
            key_mask=mask,
            impl=impl,
            **weights(compression),
        ),
        tensors(),
        torch.randn(2, 5, 7, 11, dtype=torch.float64),
    )
    for result in results:
        assert (result[1] == 0).all()
        assert (result[0] != 0).any()
        assert result.isfinite().all()


@KINDS
@IMPLEMENTATIONS
def test_items_and_heads_do_not_see_each_other(impl, compression):
    query, key, value = tensors()
    options = weights(compression)

    def call(key):
        return multiresolution_attention(
            query, key, value, resolutions=RESOLUTIONS, compression=compression, impl=impl, **options
        )

    changed = key.clone()
    changed[1, 2] += 1.0
    given, expected = call(changed), call(key)
    unlike = given != expected
    assert unlike[1, 2].any()
    unlike[1, 2] = False
    assert not unlike.any()


@MAPS
@IMPLEMENTATIONS
@pytest.mark.parametrize("resolution", [13, 64, 10**9])
def test_a_resolution_beyond_the_sequence_is_one_window(impl, feature_map, resolution):
    query, key, value = tensors(heads=1)
    given = multiresolution_attention(query, key, value, resolutions=[resolution], feature_map=feature_map, impl=impl)
    mean = value.mean(dim=2, keepdim=True).expand_as(given)
    if feature_map == "relu":
        mean = torch.where(given == 0, 0.0, mean)  # where query and key have no positive channel in common
    assert_close(given, mean)


@KINDS
@IMPLEMENTATIONS
def test_a_window_larger_than_the_grid_holds_all_of_it(impl, compression):
    """And costs no more: of 10,000 places in the window, only those on the grid are looked at."""
    query, key, value = tensors(keys=6)
    options = {"compression": compression, "key_shape": (2, 3), "impl": impl}
    options |= weights(compression, resolutions=[100] * 5, num_axes=2)
    given = multiresolution_attention(query, key, value, resolutions=[100] * 5, **options)
    if compression == "conv":
        places = [0, 1, 2, 100, 101, 102]
        for name in ("key_weight", "value_weight"):
            small = torch.zeros(5, options[name].shape[1], 9, dtype=torch.float64)
            small[:, :, [0, 1, 2, 3, 4, 5]] = options[name][:, :, places] * 10_000 / 9
            options[name] = small
    assert_close(given, multiresolution_attention(query, key, value, resolutions=[3] * 5, **options))


@IMPLEMENTATIONS
def test_no_positions_at_all_give_zeros(impl):
    for feature_map in ("softmax", "relu", "elu"):
        for compression in ("mean", "max", "conv"):
            output = multiresolution_attention(
                *tensors(keys=0),
                resolutions=RESOLUTIONS,
                compression=compression,
                feature_map=feature_map,
                impl=impl,
                **weights(compression),
            )
            assert (output == 0).all()


# Streaming means what the reference means.


@MAPS
@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positions", [1, 129])
def test_streaming_is_as_exact_as_the_reference(
    feature_map, compression, dtype, masked, positions, assert_as_exact_as, nan_scratch
):
    resolutions = (5, 3, 3, 1)
    inputs = tensors(heads=4, keys=positions, key_dim=17, value_dim=60, dtype=dtype)
    inputs.append(torch.rand(2, 4, 7, dtype=dtype) * (torch.rand(2, 4, 7) > 0.5))
    options = weights(compression, resolutions=resolutions, key_dim=17, value_dim=60, dtype=dtype)
    mask = torch.rand(2, positions) > 0.4 if masked else None
    if mask is not None:
        mask[0, 0] = True  # of one position that is hidden, nothing could be seen
    names = list(options)

    def call(impl):
        def function(query, key, value, gate, *weights):
            return multiresolution_attention(
                query,
                key,
                value,
                gate=gate,
                resolutions=resolutions,
                compression=compression,
                feature_map=feature_map,
                scale=0.7,
                key_mask=mask,
                impl=impl,
                **dict(zip(names, weights)),
            )

        return function

    assert_as_exact_as(call("streaming"), call("reference"), [*inputs, *options.values()])


@MAPS
@KINDS
@pytest.mark.parametrize("layout", ["heads beside channels", "channels first", "every other", "one head for all"])
def test_streaming_takes_any_strides(feature_map, compression, layout, strided, assert_as_exact_as, nan_scratch):
    inputs = [strided(tensor, layout) for tensor in tensors(dtype=torch.float32, keys=21)]
    options = weights(compression, dtype=torch.float32, num_axes=2)
    names = list(options)

    def call(impl):
        def function(gate, *inputs):
            return multiresolution_attention(
                *(strided(tensor, layout) for tensor in inputs[:3]),
                gate=gate.mT.contiguous().mT,
                resolutions=RESOLUTIONS,
                key_shape=(3, 7),
                compression=compression,
                feature_map=feature_map,
                key_mask=torch.arange(21) % 3 > torch.zeros(2, 1),
                impl=impl,
                **dict(zip(names, inputs[3:])),
            )

        return function

    inputs = [torch.rand(2, 5, 7), *inputs, *options.values()]
    assert_as_exact_as(call("streaming"), call("reference"), inputs)


@MAPS
@KINDS
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_and_their_gradients_are_right(feature_map, compression, masked):
    resolutions = (3, 1)
    inputs = tensors(batch=1, heads=2, queries=2, keys=5, key_dim=2, value_dim=2)
    inputs.append(torch.rand(1, 2, 2, dtype=torch.float64))
    options = weights(compression, resolutions=resolutions, key_dim=2, value_dim=2)
    mask = torch.tensor([[True, False, True, True, False]]) if masked else None
    names = list(options)

    def call(query, key, value, gate, *weights):
        return multiresolution_attention(
            query,
            key,
            value,
            gate=gate,
            resolutions=resolutions,
            compression=compression,
            feature_map=feature_map,
            key_mask=mask,
            impl="streaming",
            **dict(zip(names, weights)),
        )

    inputs = [tensor.requires_grad_() for tensor in (*inputs, *options.values())]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("wanted", range(6))
def test_one_gradient_alone_and_its_gradient(wanted):
    gate = torch.rand(2, 5, 7, dtype=torch.float64)
    inputs = [*tensors(), gate, *weights("conv").values()]
    inputs[wanted].requires_grad_()

    def penalty(impl):
        query, key, value, gate, key_weight, value_weight = inputs
        output = multiresolution_attention(
            query,
            key,
            value,
            gate=gate,
            key_weight=key_weight,
            value_weight=value_weight,
            resolutions=RESOLUTIONS,
            compression="conv",
            feature_map="elu",
            impl=impl,
        )
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs[wanted], create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), inputs[wanted])[0]

    torch.testing.assert_close(penalty("streaming"), penalty("reference"), rtol=1e-9, atol=1e-12)


def test_equal_maxima_of_a_window_share_its_gradient(with_gradients):
    query, key, value = tensors(heads=1, keys=4)
    value[:, :, 1] = value[:, :, 2] = value[:, :, 0]
    grad_output = torch.randn(2, 1, 7, 11, dtype=torch.float64)
    for impl in ("reference", "streaming"):
        *_, gradient = with_gradients(
            lambda *inputs, impl=impl: multiresolution_attention(
                *inputs, resolutions=[3], compression="max", impl=impl
            ),
            (query, key, value),
            grad_output,
        )
        assert_close(gradient[:, :, 0], gradient[:, :, 2])
        assert (gradient[:, :, 0] != 0).all()


@IMPLEMENTATIONS
def test_autocast_casts_the_inputs(impl):
    inputs = tensors(dtype=torch.float32)
    halves = [tensor.bfloat16() for tensor in inputs]
    expected = multiresolution_attention(*halves, resolutions=RESOLUTIONS, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(multiresolution_attention(*inputs, resolutions=RESOLUTIONS, impl=impl), expected)


@IMPLEMENTATIONS
def test_half_precision_keeps_its_digits_over_many_positions(impl):
    key = torch.randn(1, 2, 20_011, 3).half()
    value = torch.full((1, 2, 20_011, 5), 3.0).half()
    output = multiresolution_attention(key[:, :, :7], key, value, resolutions=[16, 1], impl=impl)
    torch.testing.assert_close(output, torch.full_like(output, 3.0), rtol=2e-3, atol=0)


# Wrong calls.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"resolutions": [1, 2]}, ValueError, "resolutions must have one entry for each of the 5 heads of keys, got 2"),
        ({"resolutions": 4}, TypeError, "resolutions must be a sequence of integers, got int"),
        ({"resolutions": [1, 2, 0, 1, 1]}, ValueError, "each of resolutions must be at least 1, got 0"),
        ({"resolutions": [1, 2, 2.0, 1, 1]}, TypeError, "each of resolutions must be an integer, got 2.0"),
        ({"compression": "sum"}, ValueError, "compression must be one of 'mean', 'max', 'conv', got 'sum'"),
        ({"feature_map": "exp"}, ValueError, "feature_map must be one of 'softmax', 'relu', 'elu', got 'exp'"),
        ({"gate": torch.ones(2, 7, 5)}, ValueError, r"gate must have the shape .* = \(2, 5, 7\), got \(2, 7, 5\)"),
        ({"gate": torch.ones(2, 5, 7)}, TypeError, "query and gate must have the same dtype"),
        ({"compression": "conv"}, ValueError, "key_weight must be given with compression='conv' and not otherwise"),
        ({"key_weight": torch.ones(5, 3, 4)}, ValueError, "key_weight must be given with compression='conv' and not"),
        (
            {"compression": "conv", **weights("conv", resolutions=(1, 1, 1, 1, 3))},
            ValueError,
            r"key_weight must have the shape .* = \(5, 3, 4\), got \(5, 3, 3\)",
        ),
        ({"key_shape": (3, 4)}, ValueError, r"the product of key_shape must be .* got \(3, 4\) and 13"),
        ({"key_shape": (-13, -1)}, ValueError, "the product of key_shape must be the number of key positions"),
        ({"key_shape": (13.0,)}, TypeError, "each size of key_shape must be an integer, got 13.0"),
        ({"key_shape": 13}, TypeError, "key_shape must be a sequence of integers, got 13"),
        ({"gate": [1.0]}, TypeError, "gate must be a torch.Tensor or None, got list"),
        ({"compression": "conv", "key_weight": [1], "value_weight": [1]}, TypeError, "key_weight must be a torch.Tens"),
        ({"scale": torch.ones(())}, TypeError, "scale must be a number"),
        ({"impl": "triton"}, ValueError, "impl='triton' needs .*; use impl='auto'"),
        ({"key_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, "key_mask must have the shape"),
    ],
)
def test_options_that_do_not_fit_are_named(options, error, message):
    with pytest.raises(error, match=message):
        multiresolution_attention(*tensors(), **{"resolutions": RESOLUTIONS} | options)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.trace")
def test_a_grid_that_would_be_traced_as_a_number_is_refused():
    x = torch.randn(1, 1, 12, 4)

    def call(image):
        return multiresolution_attention(x, x, x, resolutions=[2], key_shape=image.shape)

    with pytest.raises(TypeError, match=r"^each size of key_shape must be an integer, got a tensor; .* torch\.export$"):
        torch.jit.trace(call, torch.randn(3, 4), check_trace=False)
