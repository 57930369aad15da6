"""Pairs of papers as bytes, from small files of the published form."""

import numpy as np
import pytest
import torch

from lineara.tasks.long_range_arena import RetrievalData
from lineara.tasks.long_range_arena.retrieval_data import PairBatches, PairExamples, read_pairs

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")

A, B, C = r"b'a \"quote\nof it'", '"half a quote', "é, longer than the others, and with a comma"
LINES = {
    "train": [("1.0", A, B), ("0.0", B, C), ("1.0", C, A), ("0", A, A), ("1", B, B)],
    "eval": [("0.0", A, C), ("1.0", "new", C)],
    "test": [("1.0", C, B), ("0.0", A, "x"), ("0.0", "y", "zz")],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tsv_data").mkdir()
    for split, lines in LINES.items():
        text = "".join(f"{label}\tP{i}\tQ{i}\t{first}\t{second}\n" for i, (label, first, second) in enumerate(lines))
        (tmp_path / f"tsv_data/new_aan_pairs.{split}.tsv").write_text(text, encoding="utf-8", newline="")
    return tmp_path


def make(folder, **options):
    module = RetrievalData(**{"data_root": str(folder), "batch_size": 2, **options})
    module.prepare_data()
    module.setup("fit")
    return module


def lines_of(examples):
    return [(label, *(bytes(text).decode() for text in texts)) for texts, label in examples]


def test_every_line_is_a_pair_with_its_label(folder):
    module = make(folder)
    for split, name in (("train", "train"), ("val", "eval"), ("test", "test")):
        expected = [(int(float(label)), first, second) for label, first, second in LINES[name]]
        assert lines_of(module.split(split)) == expected
    assert module.split("train").labels.dtype == np.uint8


def test_a_text_is_held_once_for_all_pairs_and_splits(folder):
    module = make(folder)
    assert len(module.split("train").texts) == 7
    assert module.split("train").texts is module.split("test").texts
    assert {text.dtype for text in module.split("train").texts} == {np.dtype(np.uint8)}


def test_a_batch_is_two_padded_texts_per_pair(folder):
    examples = PairExamples(
        [np.array(text, np.uint8) for text in ([0, 255], [7, 8, 9], [5])], np.array([[0, 2], [1, 0]]), np.array([1, 0])
    )
    batch = PairBatches(examples, 1)[[1, 0]]
    assert batch["tokens"].tolist() == [[[8, 9, 10], [1, 256, 0]], [[1, 256, 0], [6, 0, 0]]]
    assert batch["mask"].tolist() == [[[True] * 3, [True, True, False]], [[True, True, False], [True, False, False]]]
    assert batch["label"].tolist() == [0, 1]
    assert [batch[name].dtype for name in batch] == [torch.int64, torch.bool, torch.int64]
    assert examples.lengths.tolist() == [2, 3]


def test_texts_are_cut(folder):
    module = make(folder, max_len=3)
    assert lines_of(module.split("test")) == [(1, "é,", '"ha'), (0, "b'a", "x"), (0, "y", "zz")]
    assert {batch["tokens"].shape[1:] for batch in module.train_dataloader()} == {(2, 3)}


def test_the_benchmark_is_the_default():
    module = RetrievalData()
    assert (module.max_len, module.batch_size) == (4_000, 32)


def test_an_example_is_written_as_both_texts(folder):
    module = make(folder)
    module.setup("predict")
    written = [module.describe(pair) for batch in module.predict_dataloader() for pair in batch["tokens"].numpy()]
    assert written == [f"{first}\t{second}" for _, first, second in LINES["test"]]


def test_ends_of_lines_of_other_systems_and_none_at_the_end_are_read(tmp_path):
    (tmp_path / "pairs.tsv").write_bytes(b"1.0\tP\tQ\tone\ttwo\r\n0.0\tP\tQ\tone\ttwo")
    assert list(read_pairs(tmp_path / "pairs.tsv", 9)) == [(1, b"one", b"two"), (0, b"one", b"two")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1.0\tP\tQ\tone", "a line must be label, id, id, text and text with tabs between, got 4 fields"),
        ("1.0\tP\tQ\tone\ttwo\tthree", "a line must be .*, got 6 fields"),
        ("", "a line must be .*, got 1 fields"),
        ("2.0\tP\tQ\tone\ttwo", "the label must be 0.0 or 1.0, got '2.0'"),
        ("label\tid1\tid2\ttext1\ttext2", "the label must be 0.0 or 1.0, got 'label'"),
        ("1.0\tP\tQ\t\ttwo", "both texts must have at least one byte, got an empty one"),
    ],
)
def test_a_broken_line_is_named(folder, line, reason):
    with (folder / "tsv_data/new_aan_pairs.eval.tsv").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"new_aan_pairs\.eval\.tsv, line 3: {reason}$"):
        make(folder)


def test_a_missing_file_is_named(folder):
    (folder / "tsv_data/new_aan_pairs.test.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"tsv_data/new_aan_pairs\.test\.tsv must be .*, got no such file; put"):
        make(folder)


def test_a_text_has_at_least_one_byte():
    with pytest.raises(ValueError, match=r"^max_len must be at least 1, got 0$"):
        RetrievalData(max_len=0)


def test_it_is_trained_tested_and_predicted(folder, run_task):
    data = {
        "class_path": "lineara.tasks.long_range_arena.RetrievalData",
        "init_args": {"data_root": ".", "batch_size": 1},
    }
    scores, predictions = run_task(data, num_classes=2, max_len=4000, num_sequences=2)
    assert "test/accuracy_of_majority_class" in scores
    assert [row["tokens"] for row in predictions] == [f"{first}\t{second}" for _, first, second in LINES["test"]]
    assert [row["label"] for row in predictions] == list("100")
