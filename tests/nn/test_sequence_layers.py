"""What every layer for sequences keeps to, each against its formula written out from its weights."""

import copy
import pickle
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lineara.nn import EfficientAttention, MultiresolutionAttention, SoftmaxAttention

DIM, CONTEXT_DIM = 7, 13
SIZES = {"key_dim": 30, "value_dim": 66, "dtype": torch.float64}  # 6 heads of 5 key and 11 value channels
KINDS = {
    "efficient": EfficientAttention,
    "efficient scaling": partial(EfficientAttention, normalization="scaling", scale=0.7),
    "softmax": SoftmaxAttention,
    "softmax scaling": partial(SoftmaxAttention, normalization="scaling", scale=0.7),
    "multiresolution": partial(MultiresolutionAttention, resolutions=(4, 4, 2, 3, 1, 1)),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
ONE_OF_EACH = pytest.mark.parametrize("kind", ["efficient", "softmax", "multiresolution"])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile, with nothing compiled before or left behind."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


def make(kind, num_heads=6, **options):
    return KINDS[kind](DIM, num_heads, **{**SIZES, **options})


def inputs(dtype=torch.float64, batch=2, positions=17, context_positions=19):
    shapes = (batch, positions, DIM), (batch, context_positions, CONTEXT_DIM)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def some_mask(positions, batch=2):
    mask = torch.rand(batch, positions) < 0.6
    mask[:, 0] = True
    return mask


def project(linear, tensor):
    bias = 0.0 if linear.bias is None else linear.bias
    return torch.einsum("nc,dc->nd", tensor, linear.weight) + bias


def efficient(layer, query, key, value, valid, _):
    query, key, value = layer.scale * query, layer.scale * key[valid], value[valid]
    if layer.normalization == "softmax":
        query = query.exp() / query.exp().sum(dim=1, keepdim=True)
        key = key.exp() / key.exp().sum(dim=0, keepdim=True)
    else:
        key = key / len(key)
    return torch.einsum("nk,mk,mv->nv", query, key, value)


def softmax(layer, query, key, value, valid, _):
    scale = query.shape[1] ** -0.25 if layer.scale is None else layer.scale
    weights = torch.einsum("nk,mk->nm", scale * query, scale * key[valid])
    if layer.normalization == "softmax":
        weights = weights.exp() / weights.exp().sum(dim=1, keepdim=True)
    else:
        weights = weights / valid.sum()
    return weights @ value[valid]


def multiresolution(layer, query, key, value, valid, head):
    resolution = layer.heads.resolutions[head]
    windows = [torch.arange(len(key))[start : start + resolution] for start in range(0, len(key), resolution)]
    windows = [window[valid[window]] for window in windows if valid[window].any()]
    key, value = (torch.stack([tensor[window].mean(dim=0) for window in windows]) for tensor in (key, value))
    return query.softmax(dim=1) @ (key.softmax(dim=0).mT @ value)


FORMULAS = {EfficientAttention: efficient, SoftmaxAttention: softmax, MultiresolutionAttention: multiresolution}


def written_out(layer, x, context=None, mask=None):
    """The formula from the layer's weights, item by item and head by head, over the valid positions alone."""
    context = x if context is None else context
    items = []
    for index, source in enumerate(context):
        valid = torch.ones(len(source), dtype=torch.bool) if mask is None else mask[index]
        query, key, value = project(layer.query, x[index]), project(layer.key, source), project(layer.value, source)
        gates = torch.ones(len(query), layer.num_heads, dtype=query.dtype)
        if isinstance(layer, MultiresolutionAttention):  # each query uses its likeliest head
            probability = project(layer.heads.router.logits, query).softmax(dim=1)
            gates = layer.num_heads * torch.where(
                probability == probability.amax(dim=1, keepdim=True), probability, 0.0
            )
        heads = []
        for head in range(layer.num_heads):
            key_head = head // (layer.num_heads // layer.num_key_heads)
            q, k = query[:, 5 * head : 5 * head + 5], key[:, 5 * key_head : 5 * key_head + 5]
            v = value[:, 11 * key_head : 11 * key_head + 11]
            heads.append(gates[:, head, None] * FORMULAS[type(layer)](layer, q, k, v, valid, key_head))
        items.append(project(layer.output, torch.cat(heads, dim=1)))
    return torch.stack(items)


def result_and_gradients(function, layer, *tensors, **options):
    layer.zero_grad()
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, **options)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(parameter.grad for parameter in layer.parameters())]


def assert_all_close(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


# What it computes.


@EVERY_KIND
def test_it_equals_its_formula_and_so_do_all_gradients(kind):
    layer = make(kind, qkv_bias=False)
    x, _ = inputs()
    assert_all_close(result_and_gradients(layer, layer, x), result_and_gradients(partial(written_out, layer), layer, x))
    layer, tensors = make(kind, context_dim=CONTEXT_DIM), inputs()
    for mask in (None, some_mask(19)):
        given = result_and_gradients(layer, layer, *tensors, key_mask=mask)
        assert_all_close(given, result_and_gradients(partial(written_out, layer, mask=mask), layer, *tensors))


@pytest.mark.parametrize("impl", ["reference", "streaming"])
@pytest.mark.parametrize("kind", ["efficient", "efficient scaling", "multiresolution"])
def test_every_implementation_equals_the_formula(kind, impl):
    layer = make(kind, impl=impl, context_dim=CONTEXT_DIM)
    (x, context), mask = inputs(), some_mask(19)
    given = result_and_gradients(layer, layer, x, context, key_mask=mask)
    assert_all_close(given, result_and_gradients(partial(written_out, layer, mask=mask), layer, x, context))


@EVERY_KIND
@pytest.mark.parametrize("num_key_heads", [1, 3])
def test_heads_of_keys_serve_groups_of_heads_of_queries(kind, num_key_heads):
    options = {"resolutions": None} if kind == "multiresolution" else {}
    layer = make(kind, num_key_heads=num_key_heads, context_dim=CONTEXT_DIM, **options)
    assert layer.key.weight.shape == (5 * num_key_heads, 13)
    assert layer.value.weight.shape == (11 * num_key_heads, 13)
    (x, context), mask = inputs(), some_mask(19)
    given = result_and_gradients(layer, layer, x, context, key_mask=mask)
    assert_all_close(given, result_and_gradients(partial(written_out, layer, mask=mask), layer, x, context))
    assert f"num_key_heads={num_key_heads}" in repr(layer)
    assert "num_key_heads" not in repr(make(kind))


@EVERY_KIND
def test_packed_sequences_do_not_see_each_other(kind):
    ends, context_ends = (torch.tensor(ends, dtype=torch.int32) for ends in ((0, 5, 6, 17), (0, 2, 13, 19)))
    layer, (x, _) = make(kind), inputs(batch=1)
    parts = [written_out(layer, x[:, a:b]) for a, b in pairwise(ends.tolist())]
    torch.testing.assert_close(layer(x, cu_seqlens=ends), torch.cat(parts, dim=1))
    layer = make(kind, context_dim=CONTEXT_DIM)
    (x, context), mask = inputs(batch=1), some_mask(19, 1)
    mask[:, context_ends[:-1]] = True
    parts = [
        written_out(layer, x[:, a:b], context[:, c:d], mask[:, c:d])
        for (a, b), (c, d) in zip(pairwise(ends.tolist()), pairwise(context_ends.tolist()))
    ]
    given = layer(x, context, key_mask=mask, cu_seqlens=ends, context_cu_seqlens=context_ends)
    torch.testing.assert_close(given, torch.cat(parts, dim=1))


# What a mask does.


@EVERY_KIND
@pytest.mark.parametrize("hidden", [torch.nan, torch.inf, 1e300])
def test_what_masked_positions_of_the_context_hold_never_leaks(kind, hidden):
    layer = make(kind, context_dim=CONTEXT_DIM)
    (x, context), mask = inputs(), some_mask(19)
    poisoned = context.masked_fill(~mask[:, :, None], hidden)
    torch.testing.assert_close(layer(x, poisoned, key_mask=mask), written_out(layer, x, context, mask))


@EVERY_KIND
def test_nan_at_a_masked_position_of_the_input_stays_at_that_position(kind):
    layer, mask = make(kind), some_mask(17)
    x, _ = inputs()
    output = layer(x.masked_fill(~mask[:, :, None], torch.nan), key_mask=mask)
    assert output[~mask].isnan().all()
    torch.testing.assert_close(output[mask], written_out(layer, x, mask=mask)[mask])


@EVERY_KIND
def test_an_item_without_valid_positions_gives_the_bias_of_the_output(kind):
    layer, mask = make(kind, context_dim=CONTEXT_DIM), some_mask(19)
    mask[1] = False
    results = result_and_gradients(layer, layer, *inputs(), key_mask=mask)
    torch.testing.assert_close(results[0][1], layer.output.bias.expand(17, 7))
    assert all(result.isfinite().all() for result in results)


# What does not matter, and what cannot.


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "multiresolution"])
def test_permuted_positions_permute_the_output(kind):
    layer, order = make(kind), torch.randperm(17)
    x, _ = inputs()
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


@EVERY_KIND
def test_items_of_a_batch_do_not_see_each_other(kind):
    layer = make(kind, context_dim=CONTEXT_DIM)
    (x, context), mask = inputs(), some_mask(19)
    together = layer(x, context, key_mask=mask)
    for i in range(2):
        torch.testing.assert_close(together[i, None], layer(x[i, None], context[i, None], key_mask=mask[i, None]))


@ONE_OF_EACH
def test_gradients_reach_every_weight_but_the_bias_that_cancels(kind):
    layer = make(kind, context_dim=CONTEXT_DIM)
    result_and_gradients(layer, layer, *inputs(positions=101))
    largest = {name: parameter.grad.abs().max().item() for name, parameter in layer.named_parameters()}
    # What is added to a key channel at every position changes no softmax over positions.
    assert largest.pop("key.bias") < 1e-12
    assert min(largest.values()) > 1e-3, largest


# Other number formats.


@pytest.mark.parametrize("kind", ["efficient", "softmax"])
def test_bfloat16_weights_lose_no_more_than_their_rounding(kind):
    layer = make(kind, context_dim=CONTEXT_DIM, dtype=torch.bfloat16)
    tensors = inputs(torch.bfloat16)
    output = layer(*tensors)
    assert output.dtype == torch.bfloat16
    exact = written_out(layer.double(), *(tensor.double() for tensor in tensors))
    assert (output.double() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


@ONE_OF_EACH
def test_autocast_computes_in_bfloat16(kind):
    layer = make(kind, context_dim=CONTEXT_DIM, dtype=torch.float32)
    (x, context), mask = inputs(torch.float32), some_mask(19)
    exact = layer(x, context, key_mask=mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(x, context, key_mask=mask)
    assert output.dtype == torch.bfloat16
    if kind != "multiresolution":  # whose queries may choose otherwise
        assert (output.float() - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    output.float().sum().backward()
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    assert layer.query.weight.grad.abs().max() > 0


# torch.compile and torch.export.


@ONE_OF_EACH
def test_one_graph_serves_every_length_and_computes_the_same(kind, compiled):
    layer = make(kind, context_dim=CONTEXT_DIM)
    counter = CompileCounterWithBackend("aot_eager")
    function = compiled(layer, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for queries, keys in ((17, 19), (29, 11)):
        tensors, mask = inputs(positions=queries, context_positions=keys), some_mask(keys)
        expected = result_and_gradients(layer, layer, *tensors, key_mask=mask)
        assert_all_close(result_and_gradients(function, layer, *tensors, key_mask=mask), expected)
        graphs.append(counter.frame_count)
    assert graphs[0] > 0
    assert graphs[1] == graphs[0]


@pytest.mark.parametrize("kind", ["efficient", "multiresolution"])
def test_it_is_exported_for_every_length(kind):
    layer, (x, _) = make(kind).eval(), inputs()
    layer(x)  # what a router has decided before must not be in the way
    lengths = {"x": {1: torch.export.Dim("n", min=2, max=1 << 20)}}
    exported = torch.export.export(layer, (x,), dynamic_shapes=lengths).module()
    assert type(layer.last_routing.load if kind == "multiresolution" else x) is torch.Tensor  # nothing recorded is left
    for positions in (2, 5, 64, 4099):
        x, _ = inputs(positions=positions)
        torch.testing.assert_close(exported(x), layer(x))


# Copies.


@EVERY_KIND
def test_copies_and_pickles_compute_the_same(kind):
    layer, (x, _) = make(kind), inputs()
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


# What it says.


@ONE_OF_EACH
def test_numbers_of_numpy_are_numbers(kind):
    options = {"key_dim": np.int32(30), "num_key_heads": np.uint8(3), "scale": np.float32(0.5), "resolutions": None}
    if kind != "multiresolution":
        del options["resolutions"]
    layer = KINDS[kind](np.int64(DIM), np.int64(6), value_dim=np.array(66), **options)
    assert "dim=7, num_heads=6, key_dim=30, value_dim=66, num_key_heads=3" in repr(layer)
    assert "scale=0.5" in repr(layer)
    assert layer(torch.randn(2, 17, 7)).shape == (2, 17, 7)
    for wrong in (True, "1.0", torch.tensor(1.0), np.ones(3)):
        with pytest.raises(TypeError, match=r"^scale must be a number, got (bool|str|Tensor|ndarray)"):
            make(kind, scale=wrong)
    with pytest.raises(ValueError, match=r"^scale must be finite, got nan$"):
        make(kind, scale=float("nan"))


@ONE_OF_EACH
def test_what_cannot_be_an_input_is_refused_in_one_sentence(kind):
    layer, x = make(kind, dtype=torch.float32), torch.randn(2, 17, DIM)
    nested = torch.nested.nested_tensor([torch.randn(3, DIM), torch.randn(5, DIM)], layout=torch.jagged)
    for wrong, sentence in (
        (
            nested,
            r"x must not be a nested tensor; .* torch\.cat\(x\.unbind\(\)\)\[None\], and say .* cu_seqlens$",
        ),
        (x.tolist(), r"x must be a torch\.Tensor, got list$"),
        (x.long(), r"x must be float64, float32, bfloat16 or float16, got torch\.int64; convert it with x\.float\(\)$"),
        (x.cfloat(), r"x must be float64, .* got torch\.complex64; pass \.real and \.imag as channels$"),
    ):
        with pytest.raises(TypeError, match=f"^{sentence}"):
            layer(wrong)
        with pytest.raises(TypeError, match=f"^{sentence.replace('x', 'context')[:20]}"):
            layer(x, wrong)
    packed = layer(
        torch.cat(nested.unbind())[None], cu_seqlens=torch.tensor([0, 3, 8])
    )  # what the sentence says does work
    for part, alone in zip(packed[0].split([3, 5]), nested.unbind()):
        torch.testing.assert_close(part, layer(alone[None])[0])


@ONE_OF_EACH
def test_a_wrong_mask_is_refused(kind):
    layer = make(kind, context_dim=CONTEXT_DIM)
    for wrong in (torch.ones(2, 19), torch.ones(2, 19).long()):
        advice = (
            "write key_mask == 0 for a mask that is added to scores .* and key_mask != 0 for one of ones and zeros$"
        )
        with pytest.raises(TypeError, match=rf"^key_mask must be boolean .* got {wrong.dtype}; {advice}"):
            layer(*inputs(), key_mask=wrong)
    with pytest.raises(ValueError, match=r"^key_mask must have the shape .* = \(2, 17\), got \(2, 19\)"):
        make(kind)(inputs()[0], key_mask=torch.ones(2, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^key and key_mask must be on the same device, got cpu and meta; move one"):
        make(kind)(inputs()[0], key_mask=torch.ones(2, 17, dtype=torch.bool, device="meta"))


@ONE_OF_EACH
def test_wrong_packing_is_refused(kind):
    layer, (x, context) = make(kind, context_dim=CONTEXT_DIM), inputs(batch=1)
    ends, more = torch.tensor([0, 17]), torch.tensor([0, 2, 19])
    for packing, sentence in (
        ({"cu_seqlens": ends}, "cu_seqlens and context_cu_seqlens must both be None or .* got 2 and None; pack"),
        ({"cu_seqlens": ends, "context_cu_seqlens": more}, "cu_seqlens and context_cu_seqlens .* got 2 and 3; pack"),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            layer(x, context, **packing)
    with pytest.raises(ValueError, match=r"^context_cu_seqlens must be None without a context; pass cu_seqlens alone$"):
        make(kind)(x, context_cu_seqlens=ends)
    with pytest.raises(TypeError, match=r"^cu_seqlens must be int32 or int64, got torch\.float32"):
        make(kind)(x, cu_seqlens=ends.float())
    with pytest.raises(ValueError, match=r"^x must have a batch size of 1 with cu_seqlens, got 2"):
        make(kind)(x.expand(2, -1, -1), cu_seqlens=ends)


@ONE_OF_EACH
def test_wrong_arguments_are_refused_under_the_name_of_the_layer(kind):
    name = getattr(KINDS[kind], "func", KINDS[kind]).__name__
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'heads'"):
        make(kind, heads=3)
    with pytest.raises(TypeError, match=rf"^{name}\.forward\(\) got an unexpected keyword argument 'mask'"):
        make(kind)(inputs()[0], mask=None)
    with pytest.raises(ValueError, match=r"^impl must be one of .*'streaming'.*, got 'fast'"):
        make(kind, impl="fast")
