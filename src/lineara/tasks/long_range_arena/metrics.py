"""What an accuracy is to be compared with. (Accuracy itself is torchmetrics'.)

Both functions count an answer that needs no attention on the examples `train`, and judge it on `test`. They return a
share in [0, 1], NaN without test examples.
"""

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.listops import VOCABULARY, ListOpsExamples

_NUM_VALUES = 10


def majority_class_accuracy(train: npt.NDArray[np.integer], test: npt.NDArray[np.integer]) -> float:
    """Accuracy of always answering the most frequent class; takes labels (examples,)."""
    return _share(test == np.bincount(train).argmax())


def root_operator_accuracy(train: ListOpsExamples, test: ListOpsExamples) -> float:
    """Accuracy of answering the most frequent value under the first token, which is the operator at the root."""
    values_under_root = np.zeros((len(VOCABULARY), _NUM_VALUES), dtype=np.int64)
    np.add.at(values_under_root, (_roots(train), train.labels), 1)
    return _share(test.labels == values_under_root.argmax(axis=1)[_roots(test)])


def _share(correct: npt.NDArray[np.bool_]) -> float:
    return float(correct.mean()) if len(correct) else float("nan")


def _roots(examples: ListOpsExamples) -> npt.NDArray[np.integer]:
    return examples.tokens[examples.offsets[:-1]]
