import random
import re
import threading
from collections import Counter
from contextlib import closing
from itertools import islice, pairwise

import numpy as np
import pytest

from lineara.tasks.long_range_arena import listops
from lineara.tasks.long_range_arena.listops import (
    VOCABULARY,
    ListOpsExamples,
    ListOpsGrammar,
    decode,
    encode,
    evaluate,
    generate,
)

BENCHMARK = ListOpsGrammar()
SMALL = ListOpsGrammar(min_len=5, max_len=40, max_depth=5, operator_probability=0.4, max_args=4)
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")


def join(chunks):
    chunks = list(chunks)
    offsets = np.cumsum([0, *np.concatenate([chunk.lengths for chunk in chunks])])
    tokens = np.concatenate([chunk.tokens for chunk in chunks])
    return ListOpsExamples(tokens, offsets, np.concatenate([chunk.labels for chunk in chunks]))


def grow(grammar, num_chunks, seed=0):
    """Every kept tree, duplicates included, and the number of trees grown for them."""
    with closing(listops._chunks(grammar, seed, num_workers=1)) as chunks:
        return join(islice(chunks, num_chunks)), num_chunks * listops._TREES_PER_CHUNK


@pytest.fixture(scope="module")
def benchmark():
    return grow(BENCHMARK, num_chunks=60)


def assert_same(a, b):
    assert np.array_equal(a.tokens, b.tokens)
    assert np.array_equal(a.offsets, b.offsets)
    assert np.array_equal(a.labels, b.labels)


# Words


def test_vocabulary_is_padding_and_fifteen_words():
    assert list(VOCABULARY) == ["<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]"]


def test_encode_gives_indices_and_deletes_parentheses():
    tokens = encode("( ( ( ( [SM 0 ) 9 ) [MIN 3 4 ] ) ] )")
    assert tokens.dtype == np.uint8
    assert tokens.tolist() == [14, 1, 10, 11, 4, 5, 15, 15]
    assert encode("").tolist() == []


@pytest.mark.parametrize("word", ["12", "<pad>", "[AVG", "(3", "MIN", "-1"])
def test_encode_names_an_unknown_word(word):
    with pytest.raises(ValueError, match=re.escape(f"got '{word}'")):
        encode(f"[MIN 1 {word} ]")


def test_decode_skips_padding_and_undoes_encode():
    expression = "[MED 1 [MAX 2 3 ] 4 ]"
    assert decode(np.concatenate([encode(expression), np.zeros(7, np.uint8)])) == expression
    with pytest.raises(ValueError, match=r"0\.\.15, got 16"):
        decode(np.array([1, 16], np.uint8))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 4 2 9 ]", 9),
        ("[SM 4 2 9 ]", 5),
        ("[MED 9 1 4 ]", 4),
        ("[MED 9 1 4 3 ]", 3),
        ("[MED 8 9 ]", 8),
        ("[SM [MAX 2 9 ] [MIN 4 7 ] 0 [MED 1 5 8 9 1 ] ]", 8),
        ("( ( ( [MAX 2 ) ( ( ( [SM 9 ) 9 ) ] ) ) ] )", 8),
    ],
)
def test_evaluate_by_hand(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize("expression", ["", "1 2", "]", "[MIN ]", "[MIN 1 ]", "[MIN 1 2", "1 ]", "[MIN 1 2 ] 3"])
def test_evaluate_rejects_what_is_not_one_expression(expression):
    with pytest.raises(ValueError, match=re.escape(f"got {expression!r}")):
        evaluate(expression)


# What is generated


@pytest.mark.parametrize(("grammar", "count"), [(BENCHMARK, 300), (SMALL, 3000), (ListOpsGrammar(20, 100), 1000)])
def test_layout_is_well_formed_and_labels_are_values(grammar, count):
    examples = generate(count, grammar=grammar, progress=False)
    assert len(examples) == count
    assert examples.tokens.min() >= 1
    assert [evaluate(decode(tokens)) for tokens, _ in examples] == examples.labels.tolist()


def shape(expression):
    """Deepest nesting of operators, and the numbers of arguments that occur."""
    stack, deepest, numbers = [0], 0, set()
    for word in expression.split():
        if word == "]":
            numbers.add(stack.pop())
            continue
        stack[-1] += 1
        if word in OPERATORS:
            stack.append(0)
            deepest = max(deepest, len(stack) - 1)
    return deepest, numbers


def test_depth_and_numbers_of_arguments_reach_their_bounds_and_stay_within():
    grammar = ListOpsGrammar(0, 300, max_depth=4, operator_probability=0.5, max_args=7)
    deepest, numbers = zip(*(shape(decode(tokens)) for tokens, _ in generate(2000, grammar=grammar, progress=False)))
    assert set(deepest) == {0, 1, 2, 3}  # operators at depths 1 to 3, digits only at depth 4
    assert set.union(*numbers) == {2, 3, 4, 5, 6, 7}


def test_both_length_bounds_are_excluded():
    lengths = generate(500, grammar=ListOpsGrammar(10, 13), progress=False).lengths
    assert set(lengths.tolist()) == {11, 12}


def test_expressions_are_unique_and_all_are_found():
    examples = generate(400, grammar=ListOpsGrammar(3, 5), progress=False)
    every = {f"{operator} {a} {b} ]" for operator in OPERATORS for a in range(10) for b in range(10)}
    assert sorted(decode(tokens) for tokens, _ in examples) == sorted(every)


def test_seed_alone_decides():
    first = generate(300, grammar=SMALL, seed=3, progress=False)
    assert_same(first, generate(300, grammar=SMALL, seed=3, progress=False))
    assert_same(first, generate(4000, grammar=SMALL, seed=3, progress=False).part(0, 300))
    other = generate(300, grammar=SMALL, seed=4, progress=False)
    assert not np.array_equal(first.tokens, other.tokens)


# Its distribution; samples have fixed seeds, and a difference counts from 4 standard errors on


def exact_lengths(grammar):
    """P(length) of a tree as it grows, from the recursion of its generating function, cut at max_len."""
    digit = np.zeros(grammar.max_len)
    digit[1] = 1
    tree = digit
    for _ in range(grammar.max_depth - 1):
        powers = [tree]
        for _ in range(grammar.max_args - 1):
            powers.append(np.convolve(powers[-1], tree)[: grammar.max_len])
        operator = np.concatenate([[0, 0], np.mean(powers[1:], axis=0)[:-2]])
        tree = (1 - grammar.operator_probability) * digit + grammar.operator_probability * operator
    return tree


def assert_share(count, out_of, share, extra_error=0.0):
    tolerance = 4 * np.sqrt(share * (1 - share) / out_of + extra_error**2)
    assert abs(count / out_of - share) < tolerance, (count, out_of, share, tolerance)


@pytest.mark.parametrize(("grammar", "num_chunks"), [(BENCHMARK, 60), (SMALL, 20), (ListOpsGrammar(20, 100), 20)])
def test_lengths_follow_their_exact_law(grammar, num_chunks):
    examples, num_trees = grow(grammar, num_chunks)
    law = exact_lengths(grammar)
    edges = np.linspace(grammar.min_len + 1, grammar.max_len, 13).astype(int)
    for low, high in pairwise(edges):
        inside = np.count_nonzero((low <= examples.lengths) & (examples.lengths < high))
        assert_share(inside, num_trees, law[low:high].sum())
    assert_share(len(examples), num_trees, law[grammar.min_len + 1 :].sum())


def test_benchmark_statistics_of_the_design(benchmark):
    examples, num_trees = benchmark
    num, lengths, labels = len(examples), examples.lengths, examples.labels
    # The design's figures are rounded and come from 20,000 kept samples of their own.
    error_of_mean = lengths.std() * np.sqrt(1 / num + 1 / 20_000)
    assert abs(lengths.mean() - 1039) < 4 * error_of_mean + 0.5
    assert_share(np.count_nonzero(lengths < 961), num, 0.5, extra_error=np.sqrt(0.25 / 20_000))
    assert_share(num, num_trees, 0.083, extra_error=np.sqrt(0.083 * 0.917 / 240_000))
    shares = np.bincount(labels, minlength=10) / num
    errors = np.sqrt(shares * (1 - shares) * (1 / num + 1 / 20_000))
    assert abs(shares[0] - 0.170) < 4 * errors[0] + 0.0005
    assert abs(shares[9] - 0.167) < 4 * errors[9] + 0.0005
    assert np.all(shares[1:9] > 0.075 - 4 * errors[1:9])
    assert np.all(shares[1:9] < 0.091 + 4 * errors[1:9])
    by_root = Counter(zip(examples.tokens[examples.offsets[:-1]].tolist(), labels.tolist()))
    assert {root for root, _ in by_root} == {VOCABULARY.index(operator) for operator in OPERATORS}
    right = sum(max(by_root[VOCABULARY.index(operator), label] for label in range(10)) for operator in OPERATORS)
    assert_share(right, num, 0.363, extra_error=np.sqrt(0.363 * 0.637 / 20_000))


def draw_plainly(grammar, rng, depth=1):
    """The design's sentence, one tree at a time."""
    if depth == grammar.max_depth or rng.random() >= grammar.operator_probability:
        return [str(rng.randrange(10))]
    arguments = [draw_plainly(grammar, rng, depth + 1) for _ in range(rng.randint(2, grammar.max_args))]
    return [rng.choice(OPERATORS), *(word for argument in arguments for word in argument), "]"]


def describe(words, label):
    """What two samples of expressions are compared in: each number's mean must agree."""
    counts = Counter(words)
    deepest, _ = shape(" ".join(words))
    opening = [words[0] == operator for operator in OPERATORS]
    second = [words[1] in OPERATORS, words[-2] == "]"]
    return [
        *(counts[word] for word in VOCABULARY),
        *(label == i for i in range(10)),
        deepest,
        *opening,
        *second,
    ]


def test_a_plain_recursive_generator_draws_the_same_kind_of_expressions():
    rng = random.Random(5)
    trees = [draw_plainly(SMALL, rng) for _ in range(30_000)]
    plain = [words for words in trees if SMALL.min_len < len(words) < SMALL.max_len]
    examples, num_trees = grow(SMALL, num_chunks=15, seed=1)
    assert_share(len(examples), num_trees, len(plain) / 30_000, extra_error=np.sqrt(0.25 / 30_000))
    ours = np.array([describe(decode(tokens).split(), label) for tokens, label in examples], float)
    theirs = np.array([describe(words, evaluate(" ".join(words))) for words in plain], float)
    error = np.sqrt(ours.var(axis=0) / len(ours) + theirs.var(axis=0) / len(theirs))
    difference = np.abs(ours.mean(axis=0) - theirs.mean(axis=0))
    assert np.all(difference <= 4 * error), (difference / error).round(1)


# Impossible wishes


@pytest.mark.parametrize(
    ("grammar", "found"),
    [
        (ListOpsGrammar(max_depth=2), 0),  # at most 12 tokens
        (ListOpsGrammar(operator_probability=0), 0),
        (ListOpsGrammar(4, 7, max_args=2), 0),  # lengths are 1, 4, 7, ...
        (ListOpsGrammar(0, 2), 10),
        (ListOpsGrammar(3, 5), 400),
    ],
)
def test_a_grammar_that_cannot_give_enough_is_refused(grammar, found):
    with pytest.raises(ValueError, match=rf"got 401 but found {found}, none in the last \d+ trees"):
        generate(401, grammar=grammar, progress=False)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"min_len": 10, "max_len": 11}, r"max_len at least min_len \+ 2.* got 10 and 11"),
        ({"min_len": -1}, "min_len must be at least 0 .* got -1 and 2000"),
        ({"max_depth": 0}, "max_depth must be at least 1, got 0"),
        ({"max_args": 1}, "max_args must be at least 2, got 1"),
        ({"operator_probability": 1.5}, r"operator_probability must lie in 0\.\.1, got 1\.5"),
        ({"operator_probability": float("nan")}, r"operator_probability must lie in 0\.\.1, got nan"),
    ],
)
def test_wrong_grammars_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        ListOpsGrammar(**wrong)


@pytest.mark.parametrize("wrong", [{"num_examples": -1}, {"seed": -2}, {"num_workers": -3}])
def test_wrong_numbers_are_refused(wrong):
    [(name, given)] = wrong.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got {given}"):
        generate(**{"num_examples": 1, "progress": False} | wrong)


# The container


def test_examples_are_a_sequence_of_views():
    examples = ListOpsExamples(np.arange(1, 8, dtype=np.uint8), np.array([0, 2, 2, 7]), np.array([3, 1, 4], np.uint8))
    assert len(examples) == 3
    assert examples.lengths.tolist() == [2, 0, 5]
    assert [(tokens.tolist(), label) for tokens, label in examples] == [
        ([1, 2], 3),
        ([], 1),
        ([3, 4, 5, 6, 7], 4),
    ]
    assert examples[-1][0].tolist() == [3, 4, 5, 6, 7]
    assert np.shares_memory(examples[2][0], examples.tokens)
    with pytest.raises(IndexError):
        examples[3]
    part = examples.part(1, 3)
    assert part.offsets.tolist() == [0, 0, 5]
    assert [(tokens.tolist(), label) for tokens, label in part] == [([], 1), ([3, 4, 5, 6, 7], 4)]
    assert len(examples.part(2, 2)) == 0


@pytest.mark.parametrize("offsets", [[0, 2], [1, 2, 3], [0, 2, 4], [0, 4, 3], []])
def test_arrays_that_do_not_fit_together_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets must be 3 numbers"):
        ListOpsExamples(np.ones(3, np.uint8), np.array(offsets, np.int64), np.zeros(2, np.uint8))


def test_no_examples_is_no_work():
    assert len(generate(0, progress=False)) == 0


# Threads


def test_threads_change_nothing():
    alone, shared = (generate(4000, seed=7, num_workers=n, progress=False) for n in (1, 3))
    assert_same(alone, shared)


def test_threads_are_used_and_end_when_the_chunks_are_dropped():
    before = threading.active_count()
    with closing(listops._chunks(SMALL, 0, num_workers=2)) as chunks:
        shared = join(islice(chunks, 6))
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    assert_same(shared, grow(SMALL, num_chunks=6)[0])
