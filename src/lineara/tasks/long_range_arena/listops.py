"""ListOps expressions: their tokens, their values, and a generator that grows many of them at once."""

import os
import statistics
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import count

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lineara.tasks.long_range_arena.examples import SequenceExamples

_Bytes = npt.NDArray[np.uint8]
_Ints = npt.NDArray[np.int64]

VOCABULARY: tuple[str, ...] = ("<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]")

_ZERO, _MIN, _MAX, _MED, _SM, _CLOSE = 1, 11, 12, 13, 14, 15
# Parentheses share the id of padding, to be deleted; "<pad>" itself is no word of an expression.
_IDS = {word: i for i, word in enumerate(VOCABULARY) if i} | {"(": 0, ")": 0}
_TREES_PER_CHUNK = 2048
# So many trees in a row without a new example mean that the grammar has no more to give.
_HOPELESS_TREES = 2**18


def encode(expression: str) -> _Bytes:
    """Token ids (uint8 indices into `VOCABULARY`) of an expression whose words are separated by blanks.

    The words "(" and ")" of the published files carry nothing and are deleted; ValueError for any other.
    """
    try:
        ids = bytes(map(_IDS.__getitem__, expression.split()))
    except KeyError as error:
        raise ValueError(f"words must be among {' '.join(_IDS)}, got {error}; correct or remove it") from None
    return np.frombuffer(bytearray(ids.translate(None, b"\0")), np.uint8)


def decode(tokens: npt.NDArray[np.integer]) -> str:
    """The expression that token ids stand for, padding skipped; ValueError for an id above 15."""
    if tokens.max(initial=0) > _CLOSE:
        raise ValueError(f"tokens must lie in 0..{_CLOSE}, got {tokens.max()}")
    return " ".join(VOCABULARY[token] for token in tokens.tolist() if token)


def evaluate(expression: str) -> int:
    """The value, 0..9, of an expression: the plain definition that the generator is tested against.

    `[MIN`, `[MAX`, `[MED` and `[SM` take two or more arguments up to their `]`: smallest, largest, integer
    part of the median, sum modulo 10. ValueError unless the words are one digit or one closed operator.
    """
    malformed = ValueError(f"expression must be one digit or one closed operator, got {expression[:80]!r}")
    stack: list[tuple[int, list[int]]] = [(0, [])]
    for token in encode(expression).tolist():
        if token < _MIN:
            stack[-1][1].append(token - _ZERO)
        elif token < _CLOSE:
            stack.append((token, []))
        else:
            operator, arguments = stack.pop()
            if len(arguments) < 2 or not stack:
                raise malformed
            reduce = {_MIN: min, _MAX: max, _MED: statistics.median, _SM: sum}[operator]
            stack[-1][1].append(int(reduce(arguments)) % 10)
    if len(stack) != 1 or len(stack[0][1]) != 1:
        raise malformed
    return stack[0][1][0]


@dataclass(frozen=True)
class ListOpsGrammar:
    """Which expressions are drawn, and which of them are kept; the defaults are the benchmark's.

    A tree grows from depth 1. At a depth below `max_depth` a node is an operator with probability
    `operator_probability`, else a digit; at `max_depth` it is a digit. An operator is one of four and has
    2..`max_args` arguments, all uniform. A digit is one token, an operator two; a tree is kept when
    `min_len` < its tokens < `max_len`. A number out of range is a ValueError.

    Source: Nangia, Bowman, 2018, "ListOps", arXiv 1804.06028; the defaults from Tay et al., 2021, "Long
    Range Arena", arXiv 2011.04006.
    """

    min_len: int = 500
    max_len: int = 2000
    max_depth: int = 10
    operator_probability: float = 0.25
    max_args: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.min_len < self.max_len - 1:
            raise ValueError(
                "min_len must be at least 0 and max_len at least min_len + 2, as both bounds are excluded, "
                f"got {self.min_len} and {self.max_len}"
            )
        if self.max_depth < 1:
            raise ValueError(f"max_depth must be at least 1, got {self.max_depth}")
        if self.max_args < 2:
            raise ValueError(f"max_args must be at least 2, got {self.max_args}")
        if not 0 <= self.operator_probability <= 1:
            raise ValueError(f"operator_probability must lie in 0..1, got {self.operator_probability}")


class ListOpsExamples(SequenceExamples):
    """Expressions: the tokens are uint8 ids 1..15 of `VOCABULARY`, the labels uint8 values 0..9."""


def generate(
    num_examples: int,
    *,
    grammar: ListOpsGrammar = ListOpsGrammar(),
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> ListOpsExamples:
    """Draw expressions, no two alike, with their values.

    Args:
        num_examples: how many, at least 0.
        grammar: which expressions.
        seed: at least 0; the result depends on it and the grammar, never on `num_workers`.
        num_workers: threads to use; None is one per processor; 0 and 1 use none.
        progress: show a bar over the examples on standard error.

    Raises:
        ValueError: an argument is out of range, or the grammar has too few different expressions.

    Cost: about 1,400 nodes drawn per benchmark example; memory 2 bytes per token of the result.
    """
    for name, given in (("num_examples", num_examples), ("seed", seed), ("num_workers", num_workers or 0)):
        if given < 0:
            raise ValueError(f"{name} must be at least 0, got {given}")
    num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    found: dict[bytes, int] = {}
    fruitless_trees = 0
    with (
        closing(_chunks(grammar, seed, num_workers)) as chunks,
        tqdm(total=num_examples, desc="listops", unit=" examples", disable=not progress) as bar,
    ):
        while len(found) < num_examples:
            before = len(found)
            for tokens, label in next(chunks):
                if len(found) < num_examples:
                    found.setdefault(tokens.tobytes(), label)
            bar.update(len(found) - before)
            fruitless_trees = 0 if len(found) > before else fruitless_trees + _TREES_PER_CHUNK
            if fruitless_trees >= _HOPELESS_TREES:
                raise ValueError(
                    f"num_examples must be at most what {grammar} can give, got {num_examples} but found "
                    f"{before}, none in the last {fruitless_trees} trees; ask for fewer or widen the grammar"
                )
    offsets = np.cumsum([0, *map(len, found)], dtype=np.int64)
    tokens = np.frombuffer(bytearray().join(found), np.uint8)
    return ListOpsExamples(tokens, offsets, np.fromiter(found.values(), np.uint8, len(found)))


def _chunks(grammar: ListOpsGrammar, seed: int, num_workers: int) -> Generator[ListOpsExamples]:
    """Endless numbered chunks, in order; those ahead are grown by threads (numpy computes outside Python's lock)."""
    if num_workers <= 1:
        yield from (_grow_chunk(grammar, seed, chunk) for chunk in count())
    with ThreadPoolExecutor(num_workers) as pool:
        ahead = deque(pool.submit(_grow_chunk, grammar, seed, chunk) for chunk in range(2 * num_workers))
        for chunk in count(len(ahead)):
            yield ahead.popleft().result()
            ahead.append(pool.submit(_grow_chunk, grammar, seed, chunk))


def _grow_chunk(grammar: ListOpsGrammar, seed: int, chunk: int) -> ListOpsExamples:
    """The kept ones, duplicates included, of the trees of one chunk; a chunk has its own random numbers."""
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(chunk,)))
    return _write_out(_grow_shapes(grammar, random), random)


def _grow_shapes(grammar: ListOpsGrammar, random: np.random.Generator) -> list[_Ints]:
    """Grow trees level by level; per level of the kept trees, each node's number of arguments, 0 for a digit.

    Nodes are sorted by tree, and the arguments of one operator are neighbours, in order, in the next level.
    """
    tree, length = np.arange(_TREES_PER_CHUNK), np.zeros(_TREES_PER_CHUNK, np.int64)
    levels: list[tuple[_Ints, _Ints]] = []
    while tree.size:
        probability = grammar.operator_probability if len(levels) + 1 < grammar.max_depth else 0
        operators = np.flatnonzero(random.random(tree.size) < probability)
        num_args = np.zeros(tree.size, np.int64)
        num_args[operators] = random.integers(2, grammar.max_args, operators.size, endpoint=True)
        levels.append((tree, num_args))
        length += np.bincount(tree, minlength=_TREES_PER_CHUNK) + np.bincount(
            tree[operators], minlength=_TREES_PER_CHUNK
        )
        # Every argument is at least one token: a tree that this makes too long is given up.
        too_long = length + np.bincount(tree, num_args, _TREES_PER_CHUNK) >= grammar.max_len
        length[too_long] = grammar.max_len
        tree = np.repeat(tree, np.where(too_long[tree], 0, num_args))
    kept = (grammar.min_len < length) & (length < grammar.max_len)
    return [num_args[kept[tree]] for tree, num_args in levels]


def _write_out(levels: list[_Ints], random: np.random.Generator) -> ListOpsExamples:
    """Draw tokens for trees, evaluate them from the leaves up, lay them out from the root down."""
    operators = [np.flatnonzero(num_args) for num_args in levels]
    num_args = [num_args[at] for num_args, at in zip(levels, operators)]
    starts = [np.cumsum(n) - n for n in num_args]  # of an operator's arguments in the next level
    words = [random.integers(_ZERO, _MIN, len(level), np.uint8) for level in levels]
    values = [word - np.uint8(_ZERO) for word in words]
    sizes = [np.ones(len(level), np.int64) for level in levels]  # tokens of a node and all below it
    for depth in reversed(range(len(levels) - 1)):
        at, below = operators[depth], depth + 1
        words[depth][at] = random.integers(_MIN, _CLOSE, len(at), np.uint8)
        values[depth][at] = _reduce(words[depth][at], values[below], starts[depth], num_args[depth])
        sizes[depth][at] = 2 + np.add.reduceat(sizes[below], starts[depth])
    offsets = np.concatenate([[0], np.cumsum(sizes[0])])
    tokens, place = np.empty(offsets[-1], np.uint8), offsets[:-1]
    for depth, word in enumerate(words):
        tokens[place] = word
        if depth + 1 < len(levels):
            first = place[operators[depth]]
            tokens[first + sizes[depth][operators[depth]] - 1] = _CLOSE
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            place = before + np.repeat(first + 1 - before[starts[depth]], num_args[depth])
    return ListOpsExamples(tokens, offsets, values[0])


def _reduce(operators: _Bytes, values: _Bytes, starts: _Ints, num_args: _Ints) -> _Bytes:
    """Values of operators whose arguments are `num_args` neighbours in `values` from `starts` on."""
    results = np.empty(len(operators), np.uint8)
    results[operators == _MIN] = np.minimum.reduceat(values, starts)[operators == _MIN]
    results[operators == _MAX] = np.maximum.reduceat(values, starts)[operators == _MAX]
    results[operators == _SM] = np.add.reduceat(values, starts, dtype=np.int64)[operators == _SM] % 10
    starts, num_args = starts[operators == _MED, None], num_args[operators == _MED, None]
    column = np.arange(num_args.max(initial=0))
    # One row per median; what a short row lacks is a number that sorts last.
    rows = np.where(column < num_args, values[starts + np.minimum(column, num_args - 1)], np.uint8(255))
    rows.sort(axis=1)
    middle = [np.take_along_axis(rows, index, 1)[:, 0] for index in ((num_args - 1) // 2, num_args // 2)]
    results[operators == _MED] = (middle[0] + middle[1]) // 2
    return results
