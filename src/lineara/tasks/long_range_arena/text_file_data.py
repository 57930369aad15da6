"""Texts of your own: a file of texts and labels, as bytes or as a tokenizer cuts them."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.data import SequenceData
from lineara.tasks.long_range_arena.examples import SequenceExamples
from lineara.tasks.long_range_arena.text_data import text_of

# Not the shuffling seed: runs with different orders of batches are judged on the same texts.
_SPLIT_SEED = 0
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_Rows = list[tuple[str, str]]


class TextFileData(SequenceData):
    """Texts and labels of a CSV, TSV or JSONL file, by the end of its name; token id 0 is padding.

    Labels may be any words or numbers; classes are counted from 0 in the order of the training file's labels, sorted,
    as numbers where all are whole numbers. Blank lines are left out.

    Args:
        train_file: of training; a header names the columns of CSV and TSV, keys those of JSONL.
        val_file: of validation; None holds out a part of the training texts, always the same ones.
        test_file: of the test; None takes the validation texts.
        text_column, label_column: names of the columns.
        val_share: share of the training texts that is held out where there is no val_file.
        max_len: a text is cut to so many tokens.
        tokenizer: file of the package tokenizers, such as tokenizer.json: token ids are its own + 1; None takes the
            bytes of UTF-8 + 1, 257 ids.
        shuffle_seed: seed of the order of training batches.
        batch_size: examples per batch.
    """

    def __init__(
        self,
        train_file: str,
        val_file: str | None = None,
        test_file: str | None = None,
        text_column: str = "text",
        label_column: str = "label",
        val_share: float = 0.1,
        max_len: int = 4_000,
        tokenizer: str | None = None,
        shuffle_seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, shift=1)
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        if not 0 < val_share < 1:
            raise ValueError(f"val_share must lie between 0 and 1, got {val_share}")
        self.train_file = train_file
        self.val_file = val_file
        self.test_file = test_file
        self.text_column = text_column
        self.label_column = label_column
        self.val_share = val_share
        self.max_len = max_len
        self.tokenizer = tokenizer
        self.classes: list[str] = []
        self._known: list[str] = []  # of the checkpoint

    def source(self) -> Path:
        return Path(self.train_file)

    def read(self) -> dict[str, SequenceExamples]:
        train = self._rows(self.train_file)
        if self.val_file is None:
            order = np.random.default_rng(_SPLIT_SEED).permutation(len(train))
            number = max(1, round(self.val_share * len(train)))
            val, train = ([train[i] for i in np.sort(part)] for part in (order[:number], order[number:]))
        else:
            val = self._rows(self.val_file)
        test = val if self.test_file is None else self._rows(self.test_file)
        labels = {label for _, label in train}
        self.classes = sorted(labels, key=int if all(map(_is_whole, labels)) else str)
        self._compare()
        encode = self._encoder()
        found = {}
        for split, rows, file in (
            ("train", train, self.train_file),
            ("val", val, self.val_file or self.train_file),
            ("test", test, self.test_file or self.val_file or self.train_file),
        ):
            unknown = sorted({label for _, label in rows} - labels)
            if unknown:
                raise ValueError(
                    f"{file} must have the labels of the training texts ({', '.join(self.classes)}), got "
                    f"{unknown[0]!r}; name files of one set"
                )
            found[split] = self._examples(rows, encode)
        return found

    def describe(self, tokens: npt.NDArray[np.int64]) -> str:
        if self.tokenizer is None:
            return text_of(tokens)
        return _load_tokenizer(self.tokenizer).decode((tokens[tokens > 0] - 1).tolist())

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "classes": self.classes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._known = state_dict.get("classes", [])
        self._compare()

    def _compare(self) -> None:
        if self._known and self.classes and self._known != self.classes:
            raise ValueError(
                f"{self.train_file} must have the labels that the network was trained on, {', '.join(self._known)}, "
                f"got {', '.join(self.classes)}; name the file of its training"
            )

    def _rows(self, name: str) -> _Rows:
        path = Path(name)
        read: dict[str, Callable[[Path], Iterator[tuple[int, Mapping[str, Any]]]]] = {
            **dict.fromkeys(_DELIMITERS, _table),
            **dict.fromkeys((".jsonl", ".ndjson"), _objects),
        }
        if path.suffix.lower() not in read:
            raise ValueError(f"{path} must be a file .csv, .tsv or .jsonl, got another end; rename or convert it")
        rows: _Rows = []
        for line, row in read[path.suffix.lower()](path):
            for column in (self.text_column, self.label_column):
                if row.get(column) in (None, ""):
                    given = ", ".join(map(str, row))
                    raise ValueError(
                        f"{path}, line {line}: the column {column} must not be empty, got the columns {given}; set "
                        "--data.text_column and --data.label_column, or mend the line"
                    )
            rows.append((str(row[self.text_column]), str(row[self.label_column]).strip()))
        if len(rows) < 2:
            raise ValueError(f"{path} must hold at least 2 texts, got {len(rows) or 'none'}; name another file")
        return rows

    def _encoder(self) -> Callable[[str], npt.NDArray[np.integer]]:
        if self.tokenizer is None:
            return lambda text: np.frombuffer(text.encode("utf-8")[: self.max_len], np.uint8)
        tokenizer = _load_tokenizer(self.tokenizer)
        return lambda text: np.array(tokenizer.encode(text).ids[: self.max_len], np.int64)

    def _examples(self, rows: _Rows, encode: Callable[[str], npt.NDArray[np.integer]]) -> SequenceExamples:
        tokens = [encode(text) for text, _ in rows]
        numbers = {label: number for number, label in enumerate(self.classes)}
        offsets = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
        return SequenceExamples(np.concatenate(tokens), offsets, np.array([numbers[label] for _, label in rows]))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} must be a file of texts, got no such file; name another one") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8, got one that is not ({error}); convert it") from error


def _table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a CSV or TSV file with a header, and the line in which each ends."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(
        io.StringIO(_text(path), newline=""), delimiter=_DELIMITERS[path.suffix.lower()], strict=True
    )
    try:
        for row in reader:
            if row.get(None):  # type: ignore[call-overload]
                raise ValueError(
                    f"{path}, line {reader.line_num}: a row must have {len(reader.fieldnames or ())} fields as the "
                    "header, got more; put quotes around a field with a separator in it"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path}, behind line {reader.line_num}: {error}; mend the quotes") from error


def _objects(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSONL file, one a line."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: a line must be JSON, got {error}; mend it") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a line must be an object, got {line[:60]!r}; mend it")
        yield number, row


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def _load_tokenizer(path: str) -> Any:
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports] - nothing depends on it
    except ImportError as error:
        raise ImportError(
            "tokenizer needs the package tokenizers, which is not installed; install it with: pip install tokenizers"
        ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} must be a file of the package tokenizers, got no such file; name another one")
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # what the package raises is an Exception
        raise ValueError(f"{path} must be a file of the package tokenizers, got one that it cannot read") from error
