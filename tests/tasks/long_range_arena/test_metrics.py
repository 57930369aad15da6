"""What an accuracy is to be compared with."""

import math

import numpy as np
import pytest

from lineara.tasks.long_range_arena.listops import ListOpsExamples, encode
from lineara.tasks.long_range_arena.metrics import majority_class_accuracy, root_operator_accuracy


def examples(*lines):
    """Examples with the given labels, right or wrong."""
    tokens = [encode(expression) for expression, _ in lines]
    labels = np.array([label for _, label in lines], np.uint8)
    return ListOpsExamples(np.concatenate([np.zeros(0, np.uint8), *tokens]), np.cumsum([0, *map(len, tokens)]), labels)


def both(train, test):
    return majority_class_accuracy(train.labels, test.labels), root_operator_accuracy(train, test)


# Labels: 3 three times, 5 twice, 8 twice, 1 once. Under [MIN 5, under [MAX 8, under [SM 3.
TRAIN = examples(
    ("[MIN 5 6 ]", 5),
    ("[MIN [MAX 5 5 ] 6 ]", 5),
    ("[MIN 3 4 ]", 3),
    ("[MAX 8 1 ]", 8),
    ("[MAX 1 [SM 4 4 ] ]", 8),
    ("[SM 1 2 ]", 3),
    ("[SM 2 1 ]", 3),
    ("[SM 1 0 ]", 1),
)


def test_both_answers_by_hand():
    test = examples(
        ("[MIN 5 9 ]", 5),  # the operator's answer 5 is right
        ("[MIN 3 9 ]", 3),  # the majority's answer 3 is right
        ("[MAX 1 8 ]", 8),  # the operator's answer 8 is right
        ("[SM 9 4 ]", 3),  # both are right
        ("[SM 1 1 ]", 2),  # neither is
    )
    assert both(TRAIN, test) == pytest.approx((2 / 5, 3 / 5))


def test_the_answers_are_learned_from_the_training_examples_alone():
    test = examples(("[MIN 9 9 ]", 9), ("[MIN 9 9 ]", 9), ("[MIN 5 9 ]", 5))
    assert both(TRAIN, test) == pytest.approx((0, 1 / 3))
    assert both(test, test) == pytest.approx((2 / 3, 2 / 3))


def test_only_the_first_token_is_the_root():
    train = examples(("[MIN [MAX 7 7 ] 7 ]", 7), ("[MAX [MIN 2 2 ] 2 ]", 2), ("[MAX [MIN 2 3 ] 1 ]", 2))
    test = examples(("[MIN [MAX 7 8 ] 9 ]", 7), ("[MAX [MIN 2 9 ] 0 ]", 2))
    assert root_operator_accuracy(train, test) == 1.0


def test_without_test_examples_there_is_no_accuracy():
    assert all(math.isnan(accuracy) for accuracy in both(TRAIN, examples()))


def test_the_majority_is_one_of_any_number_of_classes():
    labels = np.array([70, 3, 70], np.uint8)
    assert majority_class_accuracy(labels, np.array([70, 70, 3, 1])) == 0.5
