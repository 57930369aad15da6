"""The encoder that Long Range Arena compares attention mechanisms in."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, SoftmaxAttention

sys.path.insert(0, str(Path(__file__).parent))
import sharded_classifiers

sys.path.pop(0)

VOCAB, CLASSES, MAX_LEN = 11, 5, 23
ATTENTIONS = pytest.mark.parametrize("attention", [EfficientAttention, SoftmaxAttention])


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(attention=EfficientAttention, **options):
    """A small network in float64 without dropout."""
    settings = {"dim": 6, "num_layers": 2, "mlp_dim": 7, "head_dim": 13, "dropout": 0.0, **options}
    return SequenceClassifier(VOCAB, CLASSES, MAX_LEN, attention=lambda dim: attention(dim, 2), **settings).double()


def padded(lengths, width):
    """Random tokens of so many lengths, and their mask."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return torch.randint(1, VOCAB, mask.shape) * mask, mask


# What it computes.


@ATTENTIONS
def test_the_published_setting_has_as_many_weights_as_its_layers_add_up_to(attention):
    vocab, classes, positions, dim, layers, mlp, head = 16, 10, 2000, 64, 2, 128, 128
    model = SequenceClassifier(vocab, classes, positions, attention=lambda dim: attention(dim, num_heads=2))
    projections = 4 * (dim * dim + dim)
    feed_forward = (dim * mlp + mlp) + (mlp * dim + dim)
    norm = 2 * dim
    block = projections + feed_forward + 2 * norm
    expected = vocab * dim + positions * dim + layers * block + norm + (dim * head + head) + (head * classes + classes)
    assert expected == 205_706
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert [block.attention.num_heads for block in model.blocks] == [2, 2]
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert [type(module) for module in model.head] == [nn.Linear, nn.ReLU, nn.Linear]


def test_without_blocks_it_is_the_head_of_the_mean_over_valid_positions():
    model = make(num_layers=0)
    tokens, mask = padded([3, 5], 7)
    state = model.state_dict()
    x = state["embedding.weight"][tokens] + state["positions"][:7]
    x = (x - x.mean(dim=2, keepdim=True)) / (x.var(dim=2, keepdim=True, unbiased=False) + 1e-5).sqrt()
    for rows, given in (((3, 5), mask), ((3, 5), None), ((7, 7), torch.ones_like(mask))):
        mean = torch.stack([x[i, : rows[i]].mean(dim=0) for i in range(2)])
        torch.testing.assert_close(model(tokens, mask=given), model.head(mean))


def test_blocks_come_one_after_the_other_and_are_told_the_mask():
    class Add(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def forward(self, x, *, key_mask):
            masks.append(key_mask)
            return x * self.number + 1.0

    model, masks = make(), []
    model.blocks[0], model.blocks[1] = Add(2.0), Add(3.0)
    seen = []
    model.norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    tokens, mask = padded([3, 5], 7)
    model(tokens, mask=mask)
    embedded = model.embedding.weight[tokens] + model.positions[:7]
    torch.testing.assert_close(seen[0], (embedded * 2 + 1) * 3 + 1)
    assert all(given is mask for given in masks)
    assert len(masks) == 2


def test_attention_is_made_by_the_callable_once_per_block():
    widths = []

    def attention(dim):
        widths.append(dim)
        return EfficientAttention(dim, num_heads=3, normalization="scaling")

    model = SequenceClassifier(VOCAB, CLASSES, MAX_LEN, attention=attention, dim=6, num_layers=3)
    assert widths == [6, 6, 6]
    assert [block.attention.normalization for block in model.blocks] == ["scaling"] * 3
    assert len({id(block.attention) for block in model.blocks}) == 3


def test_padding_is_embedded_as_zero_and_stays_so():
    model = make()
    assert torch.equal(model.embedding.weight[0], torch.zeros(6, dtype=torch.float64))
    assert model.embedding.weight[1:].std().item() == pytest.approx(0.02, rel=0.3)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.3)
    tokens, _ = padded([3, 5], 7)
    model(tokens, mask=torch.ones_like(tokens, dtype=torch.bool)).square().sum().backward()  # where padding takes part
    assert torch.equal(model.embedding.weight.grad[0], torch.zeros(6, dtype=torch.float64))
    assert model.embedding.weight.grad[tokens[0, 0]].abs().max() > 0


def test_dropout_acts_on_the_embedding_while_training_only():
    model = make(num_layers=0, dropout=1.0)
    tokens, mask = padded([3, 5], 7)
    nothing = model.head(torch.zeros(2, 6, dtype=torch.float64))  # norm(0) = 0
    torch.testing.assert_close(model(tokens, mask=mask), nothing)
    assert not torch.allclose(model.eval()(tokens, mask=mask), nothing)


# Two sequences.


def pairs(lengths, width):
    """Random tokens of (batch, 2, width), and their mask, from a list of pairs of lengths."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, :, None]
    return torch.randint(1, VOCAB, mask.shape) * mask, mask


@ATTENTIONS
def test_the_head_of_a_pair_sees_both_means_their_product_and_their_difference(attention):
    model = make(attention, num_sequences=2)
    single = make(attention)
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("head")}
    single.load_state_dict(weights, strict=False)
    single.head = nn.Identity()
    tokens, mask = pairs([(3, 7), (11, 5), (2, 13)], 13)
    a, b = (single(tokens[:, i], mask=mask[:, i]) for i in (0, 1))
    assert a.shape == (3, 6)
    assert model.head[0].in_features == 24
    torch.testing.assert_close(model(tokens, mask=mask), model.head(torch.cat([a, b, a * b, a - b], dim=1)))
    assert model(tokens, mask=mask).shape == (3, CLASSES)


@ATTENTIONS
def test_pairs_do_not_see_each_other_and_their_padding_does_not_count(attention):
    model = make(attention, num_sequences=2)
    tokens, mask = pairs([(3, 7), (11, 5)], 13)
    together = model(tokens, mask=mask)
    for index, width in enumerate((7, 11)):
        alone = tokens[index, None, :, :width], mask[index, None, :, :width]
        torch.testing.assert_close(together[index, None], model(alone[0], mask=alone[1]))
    whole, everything = pairs([(13, 13)], 13)
    torch.testing.assert_close(model(whole), model(whole, mask=everything))


def test_the_order_of_a_pair_does_matter():
    model = make(num_sequences=2)
    tokens, mask = pairs([(3, 7)], 7)
    assert not torch.allclose(model(tokens.flip(1), mask=mask.flip(1)), model(tokens, mask=mask))


@pytest.mark.parametrize("shape", [(2, 24), (2, 7), (3, 3, 5), (2, 2, 24), (2, 2, 2, 5)])
def test_pairs_of_another_shape_or_too_long_are_refused(shape):
    sentence = r"^tokens must have the shape \(batch, 2, positions\) with at most max_len=23 positions, got "
    with pytest.raises(ValueError, match=sentence):
        make(num_sequences=2)(torch.ones(shape, dtype=torch.int64))


def test_a_mask_that_is_not_of_the_pairs_shape_is_refused():
    tokens, mask = pairs([(3, 7), (5, 2)], 7)
    for wrong in (mask[:, 0], mask[:, :, :5], mask.flatten(0, 1)):
        with pytest.raises(ValueError, match=r"^mask must have the shape of tokens, \(2, 2, 7\), got \("):
            make(num_sequences=2)(tokens, mask=wrong)


@pytest.mark.parametrize("num_sequences", [0, 3])
def test_a_number_of_sequences_other_than_one_or_two_is_refused(num_sequences):
    with pytest.raises(ValueError, match=rf"^num_sequences must be 1 or 2, got {num_sequences}$"):
        make(num_sequences=num_sequences)


# What does not matter.


@ATTENTIONS
def test_more_padding_changes_nothing(attention):
    model = make(attention)
    tokens, mask = padded([3, 11], 11)
    more = nn.functional.pad(tokens, (0, 12)), nn.functional.pad(mask, (0, 12))
    torch.testing.assert_close(model(more[0], mask=more[1]), model(tokens, mask=mask))


@ATTENTIONS
@pytest.mark.parametrize("num_sequences", [1, 2])
def test_without_a_mask_padding_is_where_tokens_are_zero(attention, num_sequences):
    model = make(attention, num_sequences=num_sequences)
    tokens, mask = padded([3, 11], 11) if num_sequences == 1 else pairs([(3, 7), (11, 5)], 11)
    tokens[..., 1] = torch.where(mask[..., 1], 0, tokens[..., 1])  # padding in the middle, too
    torch.testing.assert_close(model(tokens), model(tokens, mask=tokens != 0))
    assert not torch.allclose(model(tokens), model(tokens, mask=mask))
    for index in range(2):  # what pads a batch changes no other item
        torch.testing.assert_close(model(nn.functional.pad(tokens, (0, 7)))[index], model(tokens[index, None])[0])


@ATTENTIONS
def test_what_padding_holds_changes_nothing(attention):
    model = make(attention)
    tokens, mask = padded([3, 11], 13)
    other = torch.where(mask, tokens, 7)
    torch.testing.assert_close(model(other, mask=mask), model(tokens, mask=mask))


@ATTENTIONS
def test_items_of_a_batch_do_not_see_each_other(attention):
    model = make(attention)
    tokens, mask = padded([3, 7, 11], 11)
    together = model(tokens, mask=mask)
    for index, length in enumerate((3, 7, 11)):
        torch.testing.assert_close(together[index, None], model(tokens[index, None, :length]))


@ATTENTIONS
def test_the_order_of_tokens_does_matter(attention):
    model = make(attention)
    tokens, _ = padded([11], 11)
    assert not torch.allclose(model(tokens.flip(1)), model(tokens))


def test_an_item_of_padding_alone_gives_finite_logits_and_gradients():
    model = make()
    tokens, mask = padded([3, 0], 7)
    logits = model(tokens)
    torch.testing.assert_close(logits, model(tokens, mask=mask))
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# That it learns, and can be kept.


@ATTENTIONS
@pytest.mark.parametrize("normalization", ["softmax", "scaling"])
def test_it_learns_a_few_sequences_by_heart(attention, normalization):
    model = make(lambda dim, heads: attention(dim, heads, normalization=normalization)).float()
    tokens, mask = padded([3, 5, 7, 11, 13, 17, 19, 23], 23)
    labels = torch.arange(8) % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = cross_entropy(model(tokens, mask=mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2
    assert losses[-1] < 0.4 * losses[0]


@ATTENTIONS
def test_a_state_dict_rebuilds_the_network(attention, tmp_path):
    model = make(attention)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = make(attention)
    tokens, mask = padded([3, 11], 11)
    assert not torch.allclose(other(tokens, mask=mask), model(tokens, mask=mask))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
    assert torch.equal(other(tokens, mask=mask), model(tokens, mask=mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_over_many_positions_are_right_in_half_precision(dtype):
    positions = 50_000
    model = SequenceClassifier(
        VOCAB, CLASSES, positions, attention=EfficientAttention, dim=6, num_layers=0, dropout=0.0
    )
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(3.0)  # at every position: the sum is beyond what float16 holds
    model.head = nn.Identity()
    mean = model.to(dtype)(torch.ones(2, positions, dtype=torch.int64))
    assert mean.dtype == dtype
    torch.testing.assert_close(mean, torch.full((2, 6), 3.0, dtype=dtype), rtol=0, atol=0)


# Wrong calls.


@pytest.mark.parametrize("shape", [(2, 24), (7,), (2, 3, 5)])
def test_tokens_of_another_shape_or_too_many_are_refused(shape):
    got = rf"got \({', '.join(map(str, shape))},?\)$"
    sentence = rf"^tokens must have the shape \(batch, positions\) with at most max_len=23 positions, {got}"
    with pytest.raises(ValueError, match=sentence):
        make()(torch.ones(shape, dtype=torch.int64))
    assert make()(torch.ones(2, 23, dtype=torch.int64)).shape == (2, 5)


def test_a_wrong_mask_is_refused():
    tokens, mask = padded([3, 5], 7)
    with pytest.raises(ValueError, match=r"mask must have the shape .*\(2, 7\), got \(2, 5\)"):
        make()(tokens, mask=mask[:, :5])
    with pytest.raises(
        TypeError, match=r"^mask must be boolean \(True = a token\), got torch\.int64; write mask == 0 for"
    ):
        make()(tokens, mask=mask.long())


@pytest.mark.parametrize(("wrong", "got"), [(VOCAB, VOCAB), (-1, -1)])
def test_ids_outside_the_vocabulary_are_refused(wrong, got):
    tokens, _ = padded([3, 5], 7)
    tokens[1, 2] = wrong
    with pytest.raises(
        ValueError, match=rf"^tokens must be ids from 0 to vocab_size - 1 = 10, got {got}; give a larger"
    ):
        make()(tokens)


def test_tokens_that_are_no_integers_are_refused():
    tokens, _ = padded([3, 5], 7)
    assert torch.equal(make().eval()(tokens.int()).isfinite(), torch.ones(2, CLASSES, dtype=torch.bool))
    for wrong, sentence in (
        (tokens.float(), r"tokens must be int32 or int64, got torch\.float32; write tokens\.long\(\)$"),
        (tokens.bool(), r"tokens must be int32 or int64, got torch\.bool"),
        (tokens.tolist(), r"tokens must be a torch\.Tensor, got list$"),
        (
            torch.nested.nested_tensor([tokens[0], tokens[1]], layout=torch.jagged),
            "tokens must not be a nested tensor; ",
        ),
    ):
        with pytest.raises(TypeError, match=f"^{sentence}"):
            make()(wrong)


def test_ids_are_not_looked_at_where_that_would_break_a_graph():
    torch._dynamo.reset()
    model = make()
    tokens, _ = padded([3, 5], 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"dropout": 2}, ValueError, r"dropout must be a probability, from 0 to 1, got 2\.0"),
        ({"num_layers": -1}, ValueError, "num_layers must be at least 0, got -1"),
        ({"dim": 6.0}, TypeError, r"dim must be an integer, got 6\.0"),
    ],
)
def test_impossible_options_are_refused(options, error, sentence):
    with pytest.raises(error, match=f"^{sentence}$"):
        make(**options)


# Shared among processes.


@pytest.fixture(scope="module")
def given(started_ranks):
    """What each of the two ranks found."""
    return started_ranks(sharded_classifiers.__file__, 2)


def assert_equal(name, ranks):
    """The logits of each rank, and the mean of all ranks' gradients."""
    expected = sharded_classifiers.results(sharded_classifiers.classifier_of(name), name)
    assert set(ranks[0]) == set(expected)
    logits = expected.pop("logits")
    for rank in ranks:
        torch.testing.assert_close(rank["logits"], logits, rtol=1e-12, atol=1e-12)
    for key, whole in expected.items():
        mean = sum(rank[key] for rank in ranks) / len(ranks)
        torch.testing.assert_close(mean, whole, rtol=1e-12, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", sharded_classifiers.CASES)
def test_ranks_that_share_the_positions_give_what_one_process_gives(name, given):
    assert_equal(name, [rank[name] for rank in given])


@pytest.mark.parametrize("how", ["copy", "mesh"])
def test_a_copy_and_a_mesh_give_the_same(how, given):
    assert_equal(sharded_classifiers.LEARNS, [rank[how] for rank in given])


def test_each_rank_encodes_its_own_positions_alone_until_they_are_all_here_again(given):
    assert [rank["positions"] for rank in given] == [[9, 19], [10, 19]]
    expected, _ = sharded_classifiers.loss_of(
        sharded_classifiers.classifier_of(sharded_classifiers.LEARNS), sharded_classifiers.LEARNS
    )
    assert all(torch.equal(rank["whole again"], expected) for rank in given)


@pytest.mark.parametrize("how", sharded_classifiers.WRAPPED)
def test_under_data_parallel_wrappers_three_steps_lead_to_the_weights_of_one_process(how, given):
    before = dict(sharded_classifiers.classifier_of(sharded_classifiers.LEARNS).named_parameters())
    expected = sharded_classifiers.learned(sharded_classifiers.classifier_of(sharded_classifiers.LEARNS))
    for rank in given:
        assert rank[how].keys() == expected.keys()
        for key, weight in expected.items():
            assert not torch.equal(weight, before[key]), key
            torch.testing.assert_close(rank[how][key], weight, rtol=1e-10, atol=1e-10, msg=key)


def test_load_balancing_is_the_mean_of_the_terms_of_all_parts(given):
    network = sharded_classifiers.classifier_of(sharded_classifiers.LEARNS)
    expected = sharded_classifiers.balanced(network, [slice(0, 9), slice(9, 19)])
    plain = sharded_classifiers.results(
        sharded_classifiers.classifier_of(sharded_classifiers.LEARNS), sharded_classifiers.LEARNS
    )
    assert not torch.allclose(plain["embedding.weight"], expected["embedding.weight"])
    for key, gradient in expected.items():
        mean = (given[0]["balanced"][key] + given[1]["balanced"][key]) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-7, atol=1e-9, msg=key)


class Own(nn.Module):
    def forward(self, x, context=None, *, key_mask=None):
        return x


@pytest.mark.parametrize(
    ("other", "said"), [(SoftmaxAttention(6, 2), "SoftmaxAttention in block 1"), (Own(), "Own in block 1")]
)
def test_attention_that_needs_every_key_is_not_shared_and_nothing_is_changed(other, said):
    model = make()
    model.blocks[1].attention = other
    with pytest.raises(ValueError, match=f"^every block must have an attention layer that can take a group, .* {said}"):
        model.shard_positions(None)
    with pytest.raises(ValueError, match=r"^group must be None until torch\.distributed is initialized"):
        make().shard_positions(object())


def test_sharing_adds_nothing_to_the_state_dict():
    assert set(make().shard_positions(None).state_dict()) == set(make().state_dict())


@pytest.mark.parametrize(("num_sequences", "shape"), [(1, (3, 0)), (2, (3, 2, 0))])
def test_sequences_without_positions_are_refused(num_sequences, shape):
    model = SequenceClassifier(7, 3, 11, attention=lambda dim: EfficientAttention(dim, 1), num_sequences=num_sequences)
    with pytest.raises(ValueError, match=r"^tokens must have at least 1 position, got .*; pad an empty sequence with"):
        model(torch.zeros(shape, dtype=torch.int64))
