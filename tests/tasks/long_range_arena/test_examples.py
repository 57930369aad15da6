"""Sequences of different lengths in flat arrays."""

import numpy as np
import pytest

from lineara.tasks.long_range_arena.examples import SequenceExamples


def make():
    return SequenceExamples(np.arange(300, 307, dtype=np.int16), np.array([0, 2, 2, 7]), np.array([3, 1, 400]))


def test_an_example_is_a_view_of_its_tokens_and_its_label():
    examples = make()
    assert len(examples) == 3
    assert examples.lengths.tolist() == [2, 0, 5]
    assert [(tokens.tolist(), label) for tokens, label in examples] == [
        ([300, 301], 3),
        ([], 1),
        ([302, 303, 304, 305, 306], 400),
    ]
    tokens, label = examples[-1]
    assert (tokens.dtype, label) == (np.int16, 400)
    assert np.shares_memory(tokens, examples.tokens)
    with pytest.raises(IndexError):
        examples[3]


def test_a_part_is_of_the_same_kind_and_begins_at_zero():
    class Kind(SequenceExamples):
        pass

    whole = make()
    part = Kind(whole.tokens, whole.offsets, whole.labels).part(1, 3)
    assert type(part) is Kind
    assert part.offsets.tolist() == [0, 0, 5]
    assert [(tokens.tolist(), label) for tokens, label in part] == [([], 1), ([302, 303, 304, 305, 306], 400)]
    assert np.shares_memory(part.tokens, whole.tokens)


@pytest.mark.parametrize("offsets", [[0, 3], [0, 1, 2], [1, 2, 3], [0, 4, 3], []])
def test_arrays_that_do_not_fit_together_are_refused(offsets):
    with pytest.raises(ValueError, match=r"^offsets must be 3 numbers, one more than labels, rising from 0 to the 3"):
        SequenceExamples(np.ones(3, np.uint8), np.array(offsets, np.int64), np.zeros(2, np.uint8))
