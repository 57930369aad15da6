"""Pictures of a trained classifier, and of the images that it is trained on."""

from collections import Counter
from math import isqrt
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from lineara.nn.multiresolution_heads import MultiresolutionHeads
from lineara.tasks.long_range_arena.data import SequenceBatches
from lineara.tasks.long_range_arena.digits_data import DigitsData
from lineara.tasks.long_range_arena.image_data import ImageData
from lineara.tasks.long_range_arena.listops import VOCABULARY, ListOpsExamples, encode, evaluate
from lineara.tasks.long_range_arena.listops_data import ListOpsData
from lineara.tasks.long_range_arena.pathfinder import generate
from lineara.tasks.long_range_arena.pathfinder_data import PathfinderData
from lineara.tasks.long_range_arena.pixel_data import PixelData, as_sequences
from lineara.tasks.long_range_arena.task import SequenceClassification
from lineara.viz import example_images, global_maps, routing_over_image, routing_over_tokens, token_maps

_Data = TypeVar("_Data", ListOpsData, PixelData)
_PATHFINDER_LABELS = ("0: apart", "1: joined")


def expression_maps(task: nn.Module, data: object, expression: str | None, *, layer: int | str, head: int) -> Figure:
    """The global attention maps of one head over the tokens of one expression.

    Args:
        task: a trained `SequenceClassification`, in evaluation mode.
        data: its `ListOpsData`, asked for the shortest test expression when `expression` is None.
        expression: such as "[MAX 4 [MIN 7 2 ] 0 ]".
        layer: encoder block, from 0, as a number or as text.
        head: head, from 0.

    Raises:
        ValueError: for a layer or head that does not exist, an expression that is none, attention without such maps, or
            another task or data.
    """
    task, data = _of_kind(task, data, ListOpsData)
    attention = _attention_layer(task.network, layer)
    batch, words = _expression_batch(data, expression)
    with torch.no_grad():
        answer = int(task(batch).argmax())
        maps = global_maps(attention, lambda: task(batch), key_mask=batch["mask"])  # (1, H, K, M)
    if not 0 <= head < maps.shape[1]:
        raise ValueError(f"head must be at least 0 and below {maps.shape[1]}, got {head}")
    title = f"Global attention maps, layer {layer}, head {head}: answer {answer}, value {int(batch['label'])}"
    return token_maps(maps[0, head], words, title=title)


def routing(task: nn.Module, data: object, *, expression: str | None = None, index: int | None = None) -> Figure:
    """`expression_routing` of a ListOps run or an expression, else `image_routing`, of test image 0 by default."""
    if index is None and (expression is not None or isinstance(data, ListOpsData)):
        return expression_routing(task, data, expression)
    return image_routing(task, data, index or 0)


def expression_routing(task: nn.Module, data: object, expression: str | None) -> Figure:
    """The resolution that each token of one expression chooses, in every layer of multiresolution attention.

    Args:
        task: a trained `SequenceClassification`, in evaluation mode.
        data: its `ListOpsData`, asked for the shortest test expression when `expression` is None.
        expression: such as "[MAX 4 [MIN 7 2 ] 0 ]".

    Raises:
        ValueError: for a network without routers, an expression that is none, or another task or data.
    """
    task, data = _of_kind(task, data, ListOpsData)
    heads = _routed_heads(task.network)
    batch, words = _expression_batch(data, expression)
    answer, choice, probability = _run(task, heads, batch)
    title = f"Resolution that each token's query chooses: answer {answer}, value {int(batch['label'])}"
    return routing_over_tokens(choice, probability, words, resolutions=heads[0].resolutions_of_queries, title=title)


def image_routing(task: nn.Module, data: object, index: int) -> Figure:
    """The resolution that each pixel of one test image chooses, in every layer of multiresolution attention.

    Args:
        task: a trained `SequenceClassification`, in evaluation mode.
        data: its data: `ImageData`, `DigitsData` or `PathfinderData`.
        index: of the test image, from 0.

    Raises:
        ValueError: for a network without routers, an image that does not exist, or another task or data.
    """
    task, data = _of_kind(task, data, PixelData)
    heads = _routed_heads(task.network)
    data.prepare_data()
    data.setup("test")
    examples = data.split("test")
    if not 0 <= index < len(examples):
        raise ValueError(f"index must be at least 0 and below the {len(examples)} test images, got {index}")
    batch = data.batches(examples, data.shift)[[index]]
    answer, choice, _ = _run(task, heads, batch)
    choice = choice.masked_fill(~batch["mask"][:, :, None], -1)  # (layers, positions, top_k)
    title = (
        f"Resolution that each pixel's query chooses, test image {index}: answer {answer}, label {examples[index][1]}"
    )
    return routing_over_image(
        _as_image(data, examples[index][0]), choice, resolutions=heads[0].resolutions_of_queries, title=title
    )


def set_examples(name: str, *, data_root: str, num_examples: int) -> Figure:
    """Images of a set, each with its label above, in turn from every class.

    Args:
        name: "pathfinder", drawn anew, or "digits" or "image", whose test split is shown.
        data_root: folder that "image" lies in; the others need none.
        num_examples: images to show at most.

    Raises:
        FileNotFoundError: if "image" is not in its folder.
        ValueError: for another set, or fewer images than one.
    """
    if name not in ("pathfinder", "digits", "image"):
        raise ValueError(f"the set must be one of images: pathfinder, digits or image, got {name}")
    if num_examples < 1:
        raise ValueError(f"num_examples must be at least 1, got {num_examples}")
    if name == "pathfinder":  # the whole set would take minutes
        drawn = generate(num_examples, num_workers=1, progress=False)
        data, examples = PathfinderData(), as_sequences(drawn.images, drawn.labels)
    else:
        data = DigitsData() if name == "digits" else ImageData(data_root)
        data.setup("test")
        examples = data.split("test")
    shown = [examples[index] for index in _in_turn(examples.labels)[:num_examples]]
    images = [_as_image(data, pixels) for pixels, _ in shown]
    titles = [_PATHFINDER_LABELS[label] if name == "pathfinder" else str(label) for _, label in shown]
    return example_images(images, titles, columns=10, title=f"{name}: examples and their labels")


def _of_kind(task: nn.Module, data: object, kind: type[_Data]) -> tuple[SequenceClassification, _Data]:
    if not isinstance(task, SequenceClassification) or not isinstance(data, kind):
        wanted = "ListOps" if kind is ListOpsData else "images: of ImageData, DigitsData or PathfinderData"
        raise ValueError(f"the run must be of {wanted}, got one of {type(task).__name__} and {type(data).__name__}")
    return task, data


def _attention_layer(network: nn.Module, layer: int | str) -> nn.Module:
    blocks = network.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    if not (str(layer).isdecimal() and int(layer) < len(blocks)):
        raise ValueError(f"layer must be at least 0 and below {len(blocks)}, got {layer}")
    return blocks[int(layer)].get_submodule("attention")


def _routed_heads(network: nn.Module) -> list[MultiresolutionHeads]:
    """Those of every layer that has a router, in the order of the network."""
    heads = [module for module in network.modules() if isinstance(module, MultiresolutionHeads) and module.router]
    if not heads:
        raise ValueError(
            "the network must have a router to draw its choices, got none; train one of multiresolution attention with "
            "routing='query' and at least 2 heads"
        )
    if len({layer.resolutions for layer in heads}) > 1:
        raise ValueError(f"layers must have the same resolutions, got {[layer.resolutions for layer in heads]}")
    return heads


def _run(
    task: SequenceClassification, heads: list[MultiresolutionHeads], batch: dict[str, Tensor]
) -> tuple[int, Tensor, Tensor]:
    """Of a batch of one: answer, choice (layers, positions, top_k) and probability (layers, positions, heads)."""
    with torch.no_grad():
        answer = int(task(batch).argmax())
    routings = [layer.last_routing for layer in heads]
    choices = [routing.choice[0] for routing in routings if routing is not None]
    probabilities = [routing.probability[0] for routing in routings if routing is not None]
    return answer, torch.stack(choices), torch.stack(probabilities)


def _expression_batch(data: ListOpsData, expression: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """A batch of one expression, the shortest of the test split by default, and its words."""
    tokens, label = _shortest_test_example(data) if expression is None else (encode(expression), evaluate(expression))
    examples = ListOpsExamples(tokens, np.array([0, len(tokens)]), np.array([label], dtype=np.uint8))
    return SequenceBatches(examples)[[0]], [VOCABULARY[token] for token in tokens]


def _shortest_test_example(data: ListOpsData) -> tuple[npt.NDArray[np.integer], int]:
    data.prepare_data()
    data.setup("test")
    examples = data.split("test")
    return examples[int(examples.lengths.argmin())]


def _as_image(data: PixelData, pixels: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A square image from 0, black, to 1, white."""
    side = isqrt(len(pixels))
    return pixels.reshape(side, side) / (16 if isinstance(data, DigitsData) else 255)


def _in_turn(labels: npt.NDArray[np.integer]) -> list[int]:
    """The examples so ordered that the first of every class come first, then the second ones, and so on."""
    seen: Counter[int] = Counter()
    turns = list[tuple[int, int]]()
    for label in labels.tolist():
        turns.append((seen[label], label))
        seen[label] += 1
    return sorted(range(len(labels)), key=turns.__getitem__)
