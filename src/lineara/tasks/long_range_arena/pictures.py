"""Pictures of a trained classifier."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from lineara.tasks.long_range_arena.data import SequenceBatches
from lineara.tasks.long_range_arena.listops import VOCABULARY, ListOpsExamples, encode, evaluate
from lineara.tasks.long_range_arena.listops_data import ListOpsData
from lineara.tasks.long_range_arena.task import SequenceClassification
from lineara.viz import global_maps, token_maps


def expression_maps(
    task: SequenceClassification, data: ListOpsData, expression: str | None, *, layer: int, head: int
) -> Figure:
    """The global attention maps of one head over the tokens of one expression.

    Args:
        task: a trained task, in evaluation mode.
        data: its data, asked for the shortest test expression when `expression` is None.
        expression: such as "[MAX 4 [MIN 7 2 ] 0 ]".
        layer: encoder block, from 0.
        head: head, from 0.

    Raises:
        ValueError: for a layer or head that does not exist, an expression that is none, or attention without such maps.
    """
    attention = _attention_layer(task.network, layer)
    tokens, label = _shortest_test_example(data) if expression is None else (encode(expression), evaluate(expression))
    examples = ListOpsExamples(tokens, np.array([0, len(tokens)]), np.array([label], dtype=np.uint8))
    batch = SequenceBatches(examples)[[0]]
    with torch.no_grad():
        answer = int(task(batch).argmax())
        maps = global_maps(attention, lambda: task(batch), key_mask=batch["mask"])  # (1, H, K, M)
    if not 0 <= head < maps.shape[1]:
        raise ValueError(f"head must be at least 0 and below {maps.shape[1]}, got {head}")
    title = f"Global attention maps, layer {layer}, head {head}: answer {answer}, value {label}"
    return token_maps(maps[0, head], [VOCABULARY[token] for token in tokens], title=title)


def _attention_layer(network: nn.Module, layer: int) -> nn.Module:
    blocks = network.get_submodule("blocks")
    assert isinstance(blocks, nn.ModuleList)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer must be at least 0 and below {len(blocks)}, got {layer}")
    return blocks[layer].get_submodule("attention")


def _shortest_test_example(data: ListOpsData) -> tuple[np.ndarray, int]:
    data.prepare_data()
    data.setup("test")
    examples = data.split("test")
    return examples[int(examples.lengths.argmin())]
