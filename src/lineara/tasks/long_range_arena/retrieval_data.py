"""Retrieval: does one paper cite the other? Pairs of documents as bytes, 2 classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.data import SequenceBatches, SequenceData
from lineara.tasks.long_range_arena.text_data import text_of

_FILES = {"train": "train", "val": "eval", "test": "test"}
# The published files write numbers with a point.
_LABELS = {b"0": 0, b"0.0": 0, b"1": 1, b"1.0": 1}
_FIELDS = 5
_Bytes = npt.NDArray[np.uint8]


@dataclass(eq=False)
class PairExamples:
    """Labelled pairs of texts; a text that occurs in many pairs is held once.

    Args:
        texts: every text, the bytes as an array.
        pairs: (examples, 2) int64, numbers of texts.
        labels: (examples,) uint8, 0 or 1.
    """

    texts: list[_Bytes]
    pairs: npt.NDArray[np.int64]
    labels: _Bytes

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(examples,) int64, bytes of the longer text of each pair."""
        lengths = np.array([len(text) for text in self.texts], np.int64)
        return lengths[self.pairs].max(axis=1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[tuple[_Bytes, _Bytes], int]:
        """Both texts and the label of one example."""
        first, second = self.pairs[index]
        return (self.texts[first], self.texts[second]), int(self.labels[index])


class PairBatches(SequenceBatches):
    """`SequenceBatches` of pairs: tokens and mask are (batch, 2, positions)."""

    def _tokens(self, indices: list[int]) -> npt.NDArray[np.int64]:
        texts = [text for index in indices for text in self.examples[index][0]]
        return self._padded(texts).reshape(len(indices), 2, -1)


class RetrievalData(SequenceData):
    """Pairs of papers of the ACL Anthology Network as bytes; 257 token ids: byte + 1, and 0 for padding.

    The bytes are those of the published files, which write each text as a literal of Python, b'...' with its escapes;
    like the published harness we take them as they stand.

    Args:
        data_root: folder that holds tsv_data/new_aan_pairs.{train,eval,test}.tsv.
        max_len: each text is cut to so many bytes.
        shuffle_seed: seed of the order of training batches.
        batch_size: pairs per batch.

    Source: Radev et al., 2013, "The ACL Anthology Network Corpus"; pairs of Tay et al., 2021, "Long Range Arena",
    arXiv 2011.04006.
    """

    batches: ClassVar[type[SequenceBatches]] = PairBatches

    def __init__(
        self, data_root: str = "data", max_len: int = 4_000, shuffle_seed: int = 0, batch_size: int = 32
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, shift=1)
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        self.data_root = data_root
        self.max_len = max_len

    def source(self) -> Path:
        return Path(self.data_root) / "tsv_data"

    def read(self) -> dict[str, PairExamples]:
        numbers: dict[bytes, int] = {}
        found: dict[str, tuple[list[tuple[int, int]], list[int]]] = {}
        for split, name in _FILES.items():
            pairs, labels = list[tuple[int, int]](), list[int]()
            for label, *texts in read_pairs(self.source() / f"new_aan_pairs.{name}.tsv", self.max_len):
                first, second = (numbers.setdefault(text, len(numbers)) for text in texts)
                pairs.append((first, second))
                labels.append(label)
            found[split] = pairs, labels
        held = [np.frombuffer(text, np.uint8) for text in numbers]
        return {
            split: PairExamples(held, np.array(pairs, np.int64).reshape(-1, 2), np.array(labels, np.uint8))
            for split, (pairs, labels) in found.items()
        }

    def describe(self, tokens: npt.NDArray[np.int64]) -> str:
        return "\t".join(map(text_of, tokens))


def read_pairs(path: Path | str, max_len: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Label and both texts, cut to `max_len` bytes, of each line: label, id, id, text, text with tabs between.

    Quotes are bytes like any other, as in the published reader.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is broken; names the file and the line.
    """
    path = Path(path)
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} must be a file of pairs of papers, got no such file; put the published "
            "tsv_data/new_aan_pairs.{train,eval,test}.tsv into data_root, or set data_root"
        ) from None
    with file:
        for number, line in enumerate(file, start=1):
            label, _, _, first, second = _fields(line, f"{path}, line {number}")
            yield _LABELS[label], first[:max_len], second[:max_len]


def _fields(line: bytes, where: str) -> list[bytes]:
    fields = line.rstrip(b"\r\n").split(b"\t")
    if len(fields) != _FIELDS:
        raise ValueError(
            f"{where}: a line must be label, id, id, text and text with tabs between, got {len(fields)} fields"
        )
    if fields[0] not in _LABELS:
        raise ValueError(f"{where}: the label must be 0.0 or 1.0, got {fields[0][:80].decode(errors='replace')!r}")
    if not (fields[3] and fields[4]):
        raise ValueError(f"{where}: both texts must have at least one byte, got an empty one")
    return fields
