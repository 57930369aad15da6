"""Pictures of a classifier: which maps are drawn, over which tokens, and what is written above them."""

import pytest
import torch
from matplotlib.figure import Figure

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, SoftmaxAttention
from lineara.tasks.long_range_arena import ListOpsData, SequenceClassification, pictures
from lineara.tasks.long_range_arena.listops import decode, encode
from lineara.tasks.long_range_arena.pictures import expression_maps

EXPRESSION = "[MAX 4 [MIN 7 2 ] 0 ]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    return ListOpsData(data_root=folder, num_train=20, num_val=5, num_test=30, min_len=5, max_len=30, num_workers=1)


def make_task(attention=EfficientAttention, **options):
    """Two layers of 2 heads of 3 key channels, with weights large enough for maps that are not uniform."""
    torch.manual_seed(0)
    network = SequenceClassifier(
        16, 10, 30, attention=lambda dim: attention(dim, 2, **options), dim=6, mlp_dim=7, head_dim=5
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3.0)
    return SequenceClassification(network).eval()


@pytest.fixture
def drawn(monkeypatch):
    """What the maps are drawn from, in place of a drawing."""
    calls = []
    monkeypatch.setattr(pictures, "token_maps", lambda maps, tokens, *, title: calls.append((maps, tokens, title)))
    return calls


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
def test_the_maps_are_the_softmax_over_positions_of_the_heads_keys(drawn, data, layer, head):
    task = make_task(scale=0.7)
    network = task.network
    expression_maps(task, data, EXPRESSION, layer=layer, head=head)
    [(maps, tokens, title)] = drawn

    ids = torch.tensor(encode(EXPRESSION).tolist())[None]
    x = network.embedding(ids) + network.positions[:8]
    for block in network.blocks[:layer]:
        x = block(x)
    block = network.blocks[layer]
    keys = 0.7 * block.attention.key(block.attention_norm(x))[0, :, 3 * head : 3 * head + 3]  # (8, 3)
    torch.testing.assert_close(maps, keys.softmax(dim=0).T)
    assert maps.std() > 0.01
    assert tokens == EXPRESSION.split()
    answer = int(network(ids).argmax())
    assert title == f"Global attention maps, layer {layer}, head {head}: answer {answer}, value 4"


def test_the_picture_shows_every_token(data):
    figure = expression_maps(make_task(), data, EXPRESSION, layer=0, head=0)
    assert isinstance(figure, Figure)
    [labels] = [
        labels
        for axes in figure.axes
        if (labels := [label.get_text() for label in axes.get_xticklabels()]) == EXPRESSION.split()
    ]
    assert labels
    assert any("layer 0, head 0" in axes.get_title() for axes in figure.axes)
    figure.canvas.draw()


def test_without_an_expression_it_takes_the_shortest_of_the_test_split(drawn, data):
    expression_maps(make_task(), data, None, layer=0, head=0)
    [(_, tokens, title)] = drawn
    examples = data.split("test")
    assert len(tokens) == examples.lengths.min()
    labels = {decode(found): label for found, label in examples}
    assert title.endswith(f"value {labels[' '.join(tokens)]}")


def test_parentheses_are_no_tokens(drawn, data):
    expression_maps(make_task(), data, "( ( [SM 9 ) 3 ) ]", layer=0, head=0)
    assert drawn[0][1] == ["[SM", "9", "3", "]"]
    assert drawn[0][2].endswith("value 2")


def test_drawing_leaves_the_network_as_it_is(drawn, data):
    task = make_task()
    before = {name: weight.clone() for name, weight in task.state_dict().items()}
    expression_maps(task, data, EXPRESSION, layer=1, head=0)
    assert all(torch.equal(weight, before[name]) for name, weight in task.state_dict().items())
    assert all(parameter.grad is None for parameter in task.parameters())
    assert not any(module._forward_hooks for module in task.modules())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"layer": 2}, "layer must be at least 0 and below 2, got 2"),
        ({"layer": -1}, "layer must be at least 0 and below 2, got -1"),
        ({"head": 2}, "head must be at least 0 and below 2, got 2"),
        ({"head": -1}, "head must be at least 0 and below 2, got -1"),
        ({"expression": "[MAX 4"}, r"expression must be one digit or one closed operator, got '\[MAX 4'"),
        ({"expression": ""}, "expression must be one digit or one closed operator, got ''"),
        ({"expression": "[AVG 4 5 ]"}, r"words must be among .* got '\[AVG'"),
        (
            {"expression": "[SM " + 40 * "1 " + "]"},
            r"tokens must have the shape .* max_len=30 positions, got \(1, 42\)",
        ),
    ],
    ids=str,
)
def test_what_does_not_exist_is_refused(data, wrong, sentence):
    options = {"expression": EXPRESSION, "layer": 0, "head": 0} | wrong
    with pytest.raises(ValueError, match=f"^{sentence}"):
        expression_maps(make_task(), data, options.pop("expression"), **options)


@pytest.mark.parametrize(
    ("attention", "options"), [(SoftmaxAttention, {}), (EfficientAttention, {"normalization": "scaling"})]
)
def test_attention_without_such_maps_is_refused(data, attention, options):
    with pytest.raises(ValueError, match=r"^layer must .*, got "):
        expression_maps(make_task(attention, **options), data, EXPRESSION, layer=0, head=0)
