"""Pictures of a classifier: what is drawn, over which tokens or pixels, and what is written above it."""

import pytest
import torch
from matplotlib.figure import Figure

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, MultiresolutionAttention, SoftmaxAttention
from lineara.tasks.long_range_arena import (
    DigitsData,
    ListOpsData,
    SequenceClassification,
    TextData,
    pictures,
)
from lineara.tasks.long_range_arena.listops import decode, encode
from lineara.tasks.long_range_arena.pathfinder import generate
from lineara.tasks.long_range_arena.pictures import (
    expression_maps,
    expression_routing,
    image_routing,
    routing,
    set_examples,
)

EXPRESSION = "[MAX 4 [MIN 7 2 ] 0 ]"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    return ListOpsData(data_root=folder, num_train=20, num_val=5, num_test=30, min_len=5, max_len=30, num_workers=1)


def make_task(attention=EfficientAttention, vocab_size=16, max_len=30, **options):
    """Two layers of 2 heads of 3 key channels, with weights large enough for maps that are not uniform."""
    torch.manual_seed(0)
    network = SequenceClassifier(
        vocab_size, 10, max_len, attention=lambda dim: attention(dim, 2, **options), dim=6, mlp_dim=7, head_dim=5
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


# Routing


@pytest.fixture
def routed(monkeypatch):
    """What routing is drawn from, in place of a drawing."""
    calls = []
    for name in ("routing_over_tokens", "routing_over_image"):
        monkeypatch.setattr(pictures, name, lambda *given, **named: calls.append((*given, named)))
    return calls


def by_hand(network, tokens, mask):
    """Probabilities of heads, (layers, positions, heads), of one sequence."""
    x = network.embedding(tokens[None]) + network.positions[: len(tokens)]
    found = []
    for block in network.blocks:
        query = block.attention.query(block.attention_norm(x))
        found.append(block.attention.heads.router.logits(query).softmax(dim=2)[0])
        x = block(x, key_mask=mask[None])
    return torch.stack(found).detach()


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_routing_is_what_every_layers_router_decides_on_the_expression(routed, data, top_k):
    task = make_task(MultiresolutionAttention, resolutions=(3, 5), top_k=top_k)
    expression_routing(task, data, EXPRESSION)
    [(choice, probability, words, named)] = routed
    tokens = torch.tensor(encode(EXPRESSION).tolist())
    expected = by_hand(task.network, tokens, tokens > 0)
    torch.testing.assert_close(probability, expected)
    assert torch.equal(choice, expected.topk(top_k, dim=2)[1])
    assert len(choice[:, :, 0].unique()) == 2
    assert words == EXPRESSION.split()
    assert named["resolutions"] == (3, 5)
    answer = int(task.network(tokens[None]).argmax())
    assert named["title"].endswith(f": answer {answer}, value 4")


@pytest.mark.parametrize("mask_zero_pixels", [False, True])
def test_the_routing_of_a_test_image_is_drawn_beside_its_grey_values(routed, mask_zero_pixels):
    digits = DigitsData(num_test=9, upscale=2, mask_zero_pixels=mask_zero_pixels)
    task = make_task(MultiresolutionAttention, vocab_size=18, max_len=256)
    image_routing(task, digits, 7)
    [(image, choice, named)] = routed
    pixels, label = digits.split("test")[7]
    assert image.shape == (16, 16)
    assert (image * 16).flatten().tolist() == pixels.tolist()
    assert image.max() == 1
    tokens = torch.tensor(pixels.tolist()) + (not mask_zero_pixels)
    mask = tokens > 0
    likeliest = by_hand(task.network, tokens, mask).argmax(dim=2)
    assert torch.equal(choice[:, :, 0], likeliest.masked_fill(~mask, -1))
    assert bool((choice == -1).any()) == mask_zero_pixels
    answer = int(task.network(tokens[None], mask=mask[None]).argmax())
    assert named["title"].endswith(f", test image 7: answer {answer}, label {label}")


def test_what_is_drawn_follows_from_the_data_and_from_what_is_asked_for(routed, data):
    task = make_task(MultiresolutionAttention, vocab_size=18, max_len=64)
    digits = DigitsData(num_test=9)
    routing(task, data)
    assert len(routed[0][2]) == data.split("test").lengths.min()
    routing(task, data, expression="7")
    assert routed[1][2] == ["7"]
    routing(task, digits)
    assert "test image 0:" in routed[2][-1]["title"]
    routing(task, digits, index=8)
    assert "test image 8:" in routed[3][-1]["title"]
    with pytest.raises(ValueError, match=r"^the run must be of ListOps, got one of SequenceClassification and Digits"):
        routing(task, digits, expression="7")
    with pytest.raises(ValueError, match=r"^the run must be of images: of .*, got one of .* and ListOpsData"):
        routing(task, data, index=0)


def test_routing_is_drawn_as_a_figure(data):
    task = make_task(MultiresolutionAttention, vocab_size=18, max_len=64)
    tokens, pixels = routing(task, data, expression=EXPRESSION), routing(task, DigitsData(num_test=9))
    assert [len(figure.axes) for figure in (tokens, pixels)] == [2, 3]
    for figure in (tokens, pixels):
        assert isinstance(figure, Figure)
        figure.canvas.draw()


@pytest.mark.parametrize(
    ("attention", "options"), [(SoftmaxAttention, {}), (MultiresolutionAttention, {"routing": None})]
)
def test_a_network_without_routers_is_refused(data, attention, options):
    task = make_task(attention, **options)
    for draw in (lambda: expression_routing(task, data, EXPRESSION), lambda: image_routing(task, DigitsData(), 0)):
        with pytest.raises(ValueError, match=r"^the network must have a router to draw its choices, got none; train"):
            draw()


def test_layers_that_differ_in_their_resolutions_are_refused(data):
    task = make_task(MultiresolutionAttention)
    task.network.blocks[1].attention.heads.resolutions = (3, 1)
    with pytest.raises(ValueError, match=r"^layers must have the same resolutions, got \[\(2, 1\), \(3, 1\)\]"):
        expression_routing(task, data, EXPRESSION)


@pytest.mark.parametrize("index", [-1, 9])
def test_a_test_image_that_does_not_exist_is_refused(index):
    with pytest.raises(ValueError, match=f"^index must be at least 0 and below the 9 test images, got {index}"):
        image_routing(make_task(MultiresolutionAttention), DigitsData(num_test=9), index)


@pytest.mark.parametrize(
    "draw",
    [
        lambda task, data: expression_maps(task, data, EXPRESSION, layer=0, head=0),
        lambda task, data: expression_routing(task, data, EXPRESSION),
        lambda task, data: image_routing(task, data, 0),
    ],
)
def test_a_run_of_another_kind_is_refused(draw, data):
    with pytest.raises(ValueError, match=r"^the run must be of .*, got one of SequenceClassification and TextData"):
        draw(make_task(), TextData())
    with pytest.raises(ValueError, match=r"^the run must be of .*, got one of Linear and "):
        draw(torch.nn.Linear(2, 2), data)


# Examples


@pytest.fixture
def shown(monkeypatch):
    calls = []
    monkeypatch.setattr(pictures, "example_images", lambda images, titles, **named: calls.append((images, titles)))
    return calls


def test_drawings_that_are_joined_stand_beside_those_that_are_not(shown):
    set_examples("pathfinder", data_root="nowhere", num_examples=4)
    [(images, titles)] = shown
    assert titles == ["0: apart", "1: joined"] * 2
    drawn = generate(4, num_workers=1, progress=False).images
    assert [(image * 255).round().tolist() for image in images] == drawn.tolist()


def test_digits_come_in_turn(shown):
    set_examples("digits", data_root="nowhere", num_examples=23)
    [(images, titles)] = shown
    assert titles == [*"0123456789" * 2, "0", "1", "2"]
    assert {image.shape for image in images} == {(8, 8)}
    assert max(image.max() for image in images) == 1
    assert not (images[0] == images[10]).all()


def test_examples_that_cannot_be_shown_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^num_examples must be at least 1, got 0"):
        set_examples("digits", data_root="", num_examples=0)
    with pytest.raises(ValueError, match=r"^the set must be one of images: pathfinder, digits or image, got text"):
        set_examples("text", data_root="", num_examples=1)
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py must hold"):
        set_examples("image", data_root=str(tmp_path), num_examples=1)
