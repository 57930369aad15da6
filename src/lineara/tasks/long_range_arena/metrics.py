"""What an accuracy is to be compared with. (Accuracy itself is torchmetrics'.)"""

import numpy as np

from lineara.tasks.long_range_arena.listops import VOCABULARY, ListOpsExamples

_NUM_CLASSES = 10


def trivial_accuracies(train: ListOpsExamples, test: ListOpsExamples) -> dict[str, float]:
    """Accuracies on `test` of two answers that need no attention, learned from `train`.

    Args:
        train: the examples that the answers are counted from.
        test: the examples that they are judged on.

    Returns:
        `majority_class`: always the most frequent label. `root_operator`: for each first token, which is the operator
        at the root of the expression, the most frequent label under it. Both in [0, 1]; NaN without test examples.
    """
    labels_under_root = np.zeros((len(VOCABULARY), _NUM_CLASSES), dtype=np.int64)
    np.add.at(labels_under_root, (_roots(train), train.labels), 1)
    if len(test) == 0:
        return {"majority_class": float("nan"), "root_operator": float("nan")}
    return {
        "majority_class": float(np.mean(test.labels == labels_under_root.sum(axis=0).argmax())),
        "root_operator": float(np.mean(test.labels == labels_under_root.argmax(axis=1)[_roots(test)])),
    }


def _roots(examples: ListOpsExamples) -> np.ndarray:
    return examples.tokens[examples.offsets[:-1]]
