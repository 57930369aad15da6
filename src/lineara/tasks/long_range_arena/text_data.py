"""Text: is a film review positive? Bytes, 2 classes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from lineara.tasks.long_range_arena.data import SequenceData
from lineara.tasks.long_range_arena.examples import SequenceExamples

_CLASSES = ("neg", "pos")
# Not the shuffling seed: runs with different orders of batches are judged on the same reviews.
_SPLIT_SEED = 0


class TextData(SequenceData):
    """IMDb reviews as bytes, from the published folder; 257 token ids: byte + 1, and 0 for padding.

    The published set has 25,000 reviews for training, 25,000 for testing, and none for validation. The published
    harness validates on the test reviews, so the checkpoint that it reports is chosen on them. We hold out reviews of
    the training set instead, always the same ones; `num_val` 0 does as the published harness does.

    Args:
        data_root: folder that holds aclImdb/{train,test}/{neg,pos}/*.txt.
        num_val: training reviews to hold out for validation; 0 validates on the test reviews.
        max_len: a review is cut to so many bytes.
        shuffle_seed: seed of the order of training batches.
        batch_size: examples per batch.

    Source: Maas et al., 2011, "Learning Word Vectors for Sentiment Analysis".
    """

    def __init__(
        self,
        data_root: str = "data",
        num_val: int = 2_500,
        max_len: int = 4_000,
        shuffle_seed: int = 0,
        batch_size: int = 32,
    ) -> None:
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, shift=1)
        if max_len < 1:
            raise ValueError(f"max_len must be at least 1, got {max_len}")
        self.data_root = data_root
        self.num_val = num_val
        self.max_len = max_len

    def source(self) -> Path:
        return Path(self.data_root) / "aclImdb"

    def read(self) -> dict[str, SequenceExamples]:
        train, test = (_read_reviews(self.source() / split, self.max_len) for split in ("train", "test"))
        if not 0 <= self.num_val < len(train[1]):
            raise ValueError(
                f"num_val must be at least 0 and below the {len(train[1])} training reviews, got {self.num_val}"
            )
        order = np.random.default_rng(_SPLIT_SEED).permutation(len(train[1]))
        val, rest = np.sort(order[: self.num_val]), np.sort(order[self.num_val :])
        splits = {"train": _chosen(train, rest), "test": _chosen(test, np.arange(len(test[1])))}
        return {**splits, "val": _chosen(train, val) if self.num_val else splits["test"]}

    def describe(self, tokens: npt.NDArray[np.int64]) -> str:
        return text_of(tokens)


def text_of(tokens: npt.NDArray[np.int64]) -> str:
    """The text that token ids (byte + 1, 0 for padding) stand for."""
    return bytes((tokens[tokens > 0] - 1).astype(np.uint8)).decode("utf-8", errors="replace")


_Reviews = tuple[list[bytes], list[int]]


def _read_reviews(folder: Path, max_len: int) -> _Reviews:
    """Texts and labels, the negative ones first, each half in the order of the files' names."""
    texts, labels = list[bytes](), list[int]()
    for label, name in enumerate(_CLASSES):
        paths = sorted((folder / name).glob("[!.]*.txt"))
        if not paths:
            raise FileNotFoundError(
                f"{folder / name} must be a folder of IMDb reviews, got no .txt file there; unpack the published "
                "archive, so that aclImdb/{train,test}/{neg,pos}/*.txt lie in data_root, or set data_root"
            )
        texts += [_read_review(path, max_len) for path in paths]
        labels += [label] * len(paths)
    return texts, labels


def _read_review(path: Path, max_len: int) -> bytes:
    try:
        with path.open("rb") as file:
            text = file.read(max_len)
    except OSError as error:
        raise type(error)(
            f"{path} must be a readable review, got {error.strerror or error}; give access or unpack the archive again"
        ) from error
    if not text:
        raise ValueError(f"{path} must be a review, got an empty file; unpack the published archive again")
    return text


def _chosen(reviews: _Reviews, numbers: npt.NDArray[np.int64]) -> SequenceExamples:
    texts = [reviews[0][number] for number in numbers]
    tokens = np.frombuffer(b"".join(texts), np.uint8)
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return SequenceExamples(tokens, offsets, np.array(reviews[1], np.uint8)[numbers])
