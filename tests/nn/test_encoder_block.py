"""The pre-norm encoder block around any attention layer."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear

from lineara.nn import EfficientAttention, EncoderBlock, SoftmaxAttention

DIM, MLP_DIM, CONTEXT_DIM = 6, 11, 13
ATTENTIONS = pytest.mark.parametrize("attention", [EfficientAttention, SoftmaxAttention])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiled():
    """torch.compile, with nothing compiled before or left behind."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


class Identity(nn.Module):
    """An attention layer that answers its input, and keeps what it is given."""

    def forward(self, x, context=None, *, key_mask=None):
        self.given = x, context, key_mask
        return x


def make(attention=EfficientAttention, *, context_dim=None, **options):
    block = EncoderBlock(
        DIM,
        attention(DIM, 2, context_dim=context_dim, dtype=torch.float64),
        **{"mlp_dim": MLP_DIM, "dtype": torch.float64, **options},
    )
    with torch.no_grad():  # fresh layer norms are 1 and 0, which hides a missing one
        for norm in (block.attention_norm, block.mlp_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
    return block


def written_out(block, x, context=None, mask=None):
    """The block's two lines, from its weights; the attention layer is taken as it is."""
    state = block.state_dict()

    def norm(name, tensor):
        return layer_norm(tensor, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = x + block.attention(norm("attention_norm", x), context, key_mask=mask)
    inner = gelu(linear(norm("mlp_norm", x), state["mlp.0.weight"], state["mlp.0.bias"]))
    return x + linear(inner, state["mlp.3.weight"], state["mlp.3.bias"])


def inputs():
    x, context = torch.randn(2, 17, DIM, dtype=torch.float64), torch.randn(2, 19, CONTEXT_DIM, dtype=torch.float64)
    mask = torch.rand(2, 19) < 0.6
    mask[:, 0] = True
    return x, context, mask


# What it computes.


def test_one_number_by_hand():
    # norm(3, 1) = (1, -1), which attention hands back: (4, 0). norm(4, 0) = (1, -1); gelu makes it (0.8413, -0.1587).
    block = EncoderBlock(2, Identity(), mlp_dim=2)
    with torch.no_grad():
        for module in (block.mlp[0], block.mlp[3]):
            module.weight.copy_(torch.eye(2))
            module.bias.zero_()
    output = block(torch.tensor([[[3.0, 1.0]]]))
    torch.testing.assert_close(output, torch.tensor([[[4.8413, -0.1587]]]), rtol=0, atol=1e-4)


@ATTENTIONS
def test_it_equals_its_two_lines_written_out(attention):
    block = make(attention)
    x, _, _ = inputs()
    torch.testing.assert_close(block(x), written_out(block, x))
    across = make(attention, context_dim=CONTEXT_DIM)
    x, context, mask = inputs()
    torch.testing.assert_close(across(x, context, key_mask=mask), written_out(across, x, context, mask))


def test_context_and_mask_reach_the_attention_as_they_are():
    attention = Identity()
    x, context, mask = inputs()
    EncoderBlock(DIM, attention, dtype=torch.float64)(x, context, key_mask=mask)
    assert attention.given[1] is context
    assert attention.given[2] is mask


def test_packed_sequences_do_not_see_each_other():
    block, ends = make(), torch.tensor([0, 5, 17])
    x, context, _ = inputs()
    torch.testing.assert_close(block(x[:1], cu_seqlens=ends), torch.cat([block(x[:1, :5]), block(x[:1, 5:])], dim=1))
    across, others = make(context_dim=CONTEXT_DIM), torch.tensor([0, 11, 19])
    parts = [across(x[:1, :5], context[:1, :11]), across(x[:1, 5:], context[:1, 11:])]
    given = across(x[:1], context[:1], cu_seqlens=ends, context_cu_seqlens=others)
    torch.testing.assert_close(given, torch.cat(parts, dim=1))


def test_dropout_follows_attention_and_both_linear_maps_while_training_only():
    block = make(dropout=1.0)
    x, _, _ = inputs()
    assert torch.equal(block(x), x)  # everything that is added is dropped
    torch.testing.assert_close(block.eval()(x), written_out(block, x))
    # Where the first map alone is dropped, the second one adds its bias.
    block.train()
    block.dropout.p = block.mlp[4].p = 0.0
    attended = x + block.attention(block.attention_norm(x))
    torch.testing.assert_close(block(x), attended + block.mlp[3].bias)


def test_nan_at_a_masked_position_stays_at_that_position():
    block = make()
    x, _, _ = inputs()
    mask = torch.arange(17) < torch.tensor([[11], [17]])
    output = block(x.masked_fill(~mask[:, :, None], torch.nan), key_mask=mask)
    assert output[~mask].isnan().all()
    torch.testing.assert_close(output[0, :11], block(x[:1, :11])[0])
    torch.testing.assert_close(output[1], block(x[1:])[0])


def test_permuted_positions_permute_the_output():
    block = make()
    x, _, _ = inputs()
    order = torch.randperm(17)
    torch.testing.assert_close(block(x[:, order]), block(x)[:, order])


def test_gradients_reach_every_weight_but_the_bias_that_cancels():
    block = make()
    x, _, _ = inputs()
    block(x).square().sum().backward()
    largest = {name: parameter.grad.abs().max().item() for name, parameter in block.named_parameters()}
    assert largest.pop("attention.key.bias") < 1e-10
    assert min(largest.values()) > 1e-3, largest


# Its weights.


def test_its_weights_are_made_where_and_as_asked():
    shapes = {name: tuple(tensor.shape) for name, tensor in EncoderBlock(6, Identity()).state_dict().items()}
    assert shapes == {
        "attention_norm.weight": (6,),
        "attention_norm.bias": (6,),
        "mlp_norm.weight": (6,),
        "mlp_norm.bias": (6,),
        "mlp.0.weight": (24, 6),
        "mlp.0.bias": (24,),
        "mlp.3.weight": (6, 24),
        "mlp.3.bias": (6,),
    }
    for device, dtype in (("meta", torch.float32), ("cpu", torch.bfloat16)):
        block = EncoderBlock(6, Identity(), device=device, dtype=dtype)
        assert {(parameter.device.type, parameter.dtype) for parameter in block.parameters()} == {(device, dtype)}
        output = block(torch.ones(2, 17, 6, device=device, dtype=dtype))
        assert (output.device.type, output.dtype) == (device, dtype)


def test_autocast_keeps_the_residual_stream_in_float32():
    block = make().float()
    x = inputs()[0].float()
    exact = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = block(x)
    assert output.dtype == torch.float32
    assert not torch.equal(output, exact)
    assert (output - exact).abs().max() < 8 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_it_compiles_into_one_graph_and_computes_the_same(compiled):
    block = make()
    function = compiled(block, fullgraph=True, backend="aot_eager")
    results = []
    for call in (block, function):
        block.zero_grad()
        x = inputs()[0].fill_(0.5).cumsum(dim=1).requires_grad_()
        output = call(x, key_mask=torch.arange(17) < torch.tensor([[11], [17]]))
        output.square().sum().backward()
        results.append([output.detach(), x.grad, *(parameter.grad for parameter in block.parameters())])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


# What it says.


def test_it_shows_its_width():
    assert " ".join(repr(make()).split()).startswith("EncoderBlock( dim=6 (attention_norm): ")


@pytest.mark.parametrize("shape", [(17, 6), (2, 17, 5), (2, 3, 17, 6)])
def test_inputs_of_another_shape_are_refused(shape):
    got = rf"got \({', '.join(map(str, shape))}\)$"
    with pytest.raises(ValueError, match=rf"^x must have the shape \(batch, positions, 6\), {got}"):
        make()(torch.ones(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"dropout": 1.5}, ValueError, r"dropout must be a probability, from 0 to 1, got 1\.5"),
        ({"dropout": -0.1}, ValueError, r"dropout must be a probability, from 0 to 1, got -0\.1"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a number, got str"),
        ({"dim": 0}, ValueError, "dim must be at least 1, got 0"),
        ({"mlp_dim": 2.0}, TypeError, r"mlp_dim must be an integer, got 2\.0"),
        (
            {"attention": EfficientAttention},
            TypeError,
            r"attention must be a layer, got the class EfficientAttention; make one, such as EfficientAttention\(dim\)",
        ),
        ({"attention": "softmax"}, TypeError, "attention must be a layer, got str; make one, such as .*"),
    ],
)
def test_impossible_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=f"^{sentence}$"):
        EncoderBlock(**{"dim": 6, "attention": Identity(), **options})


def test_what_is_no_dense_tensor_of_numbers_is_refused():
    nested = torch.nested.nested_tensor([torch.randn(3, 6), torch.randn(5, 6)], layout=torch.jagged)
    with pytest.raises(
        TypeError,
        match=r"^x must not be a nested tensor; .* torch\.cat\(x\.unbind\(\)\)\[None\], and say where each begins",
    ):
        make()(nested)
    with pytest.raises(TypeError, match=r"^x must be float64, .* got torch\.int64"):
        make()(torch.ones(2, 17, 6, dtype=torch.int64))
