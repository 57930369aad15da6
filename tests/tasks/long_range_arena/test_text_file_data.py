"""Texts of one's own: read from CSV, TSV and JSONL, split, and refused where they are broken."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lineara.cli import main
from lineara.tasks.long_range_arena import TextFileData

ROWS = [("good, very", "yes"), ('a "quoted"\nline', "no"), ("é", "yes"), ("plain", "no")]


def as_csv(rows, delimiter=","):
    quoted = [[f'"{field}"'.replace('"quoted"', '""quoted""') for field in row] for row in rows]
    return "\r\n".join(delimiter.join(row) for row in [["text", "label"], *quoted, []]) + "\r\n"


def as_jsonl(rows):
    return "\n".join(json.dumps({"text": text, "label": label, "more": None}) for text, label in rows) + "\n\n"


FORMS = {"a.csv": as_csv, "a.TSV": lambda rows: as_csv(rows, "\t"), "a.jsonl": as_jsonl}


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding, newline="")
    return str(path)


def made(train_file, **options):
    data = TextFileData(train_file, **{"val_share": 0.3, "batch_size": 2, **options})
    data.setup("fit")
    return data


def texts(data, split):
    return [(bytes(tokens).decode(), data.classes[label]) for tokens, label in data.split(split)]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_every_form_is_read(tmp_path, name, encoding):
    file = write(tmp_path / name, FORMS[name](ROWS), encoding)
    data = made(file, val_file=file)
    assert data.classes == ["no", "yes"]
    assert texts(data, "train") == texts(data, "val") == texts(data, "test") == ROWS
    tokens = next(iter(data.val_dataloader()))["tokens"]
    assert data.describe(tokens[-1].numpy()) in dict(ROWS)


def test_a_part_of_the_training_texts_validates_and_always_the_same(tmp_path):
    rows = [(f"text {number}", str(number % 3)) for number in range(20)]
    file = write(tmp_path / "a.csv", as_csv(rows))
    first, again = made(file), made(file, shuffle_seed=5)
    assert texts(first, "val") == texts(again, "val") == texts(first, "test")
    assert len(texts(first, "val")) == 6
    assert sorted(texts(first, "train") + texts(first, "val")) == sorted(rows)


def test_whole_numbers_are_sorted_as_numbers_and_columns_have_other_names(tmp_path):
    lines = "".join(f'{{"review": "x", "stars": {number}}}\n' for number in (10, 9, -1, 10))
    file = write(tmp_path / "a.jsonl", lines)
    data = made(file, val_file=file, text_column="review", label_column="stars")
    assert data.classes == ["-1", "9", "10"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.csv", "text,label\na,1\nb,\n", "line 3: the column label must not be empty, got the columns text, label"),
        ("a.csv", "body,label\na,1\n", "line 2: the column text must not be empty, got the columns body, label"),
        ("a.csv", "text,label\na,b,1\n", "line 2: a row must have 2 fields as the header, got more"),
        ("a.csv", 'text,label\n"a" b,1\n', "behind line 1: .*; mend the quotes"),
        ("a.csv", "text,label\na,1\n", "must hold at least 2 texts, got 1"),
        ("a.csv", "", "must hold at least 2 texts, got none"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', "line 2: a line must be JSON"),
        ("a.jsonl", '["a", 1]\n', "line 1: a line must be an object"),
        ("a.xlsx", "x", r"must be a file \.csv, \.tsv or \.jsonl, got another end"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, sentence):
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"^{re.escape(file)}.*{sentence}"):
        made(file)


def test_other_encodings_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        made(write(tmp_path / "a.csv", "text,label\né,1\n", "latin-1"))
    with pytest.raises(FileNotFoundError, match="must be a file of texts, got no such file"):
        made(str(tmp_path / "b.csv"))


def test_labels_that_were_not_trained_on_are_refused(tmp_path):
    file = write(tmp_path / "a.csv", as_csv(ROWS))
    other = write(tmp_path / "b.csv", as_csv([("x", "yes"), ("y", "perhaps")]))
    with pytest.raises(
        ValueError, match=r"b\.csv must have the labels of the training texts \(no, yes\), got 'perhaps'"
    ):
        made(file, test_file=other)
    data = made(file)
    with pytest.raises(ValueError, match="labels that the network was trained on, bad, good, got no, yes"):
        data.load_state_dict({"batches_done": 0, "classes": ["bad", "good"]})


def test_a_tokenizer_cuts_texts(tmp_path, monkeypatch):
    class Words:
        """What the package's tokenizers do, by words of a fixed list."""

        words = ("good", "very", "plain")

        @classmethod
        def from_file(cls, path):
            return cls()

        def encode(self, text):
            return SimpleNamespace(ids=[self.words.index(word) for word in text.split()])

        def decode(self, ids):
            return " ".join(self.words[number] for number in ids)

    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=Words))
    file = write(tmp_path / "a.csv", as_csv([("very good", "1"), ("plain", "0")]))
    with pytest.raises(FileNotFoundError, match="must be a file of the package tokenizers"):
        made(file, val_file=file, tokenizer=str(tmp_path / "t.json"))
    (tmp_path / "t.json").touch()
    data = made(file, val_file=file, tokenizer=str(tmp_path / "t.json"))
    tokens = next(iter(data.val_dataloader()))["tokens"]
    assert tokens.tolist() == [[3, 0], [2, 1]]
    assert data.describe(tokens[1].numpy()) == "very good"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        made(file, tokenizer="t.json")


@pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_file_is_trained_on_with_the_recipe_that_ships(tmp_path, monkeypatch, capsys):
    recipe = Path(__file__).parents[3] / "recipes/long_range_arena/own_text.yaml"
    monkeypatch.chdir(tmp_path)
    rows = [(f"{word} {number}", word) for number in range(8) for word in ("good", "bad")]
    file = write(tmp_path / "a.csv", as_csv(rows))
    words = ["fit", "--config", str(recipe), "--data.train_file", file, "--trainer.fast_dev_run", "true"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    assert main(words) == 0
    write(tmp_path / "a.csv", as_csv([*rows, ("x", "third"), ("y", "third"), ("z", "third")]))
    assert main(words) == 2
    assert "num_classes must be that of the data, got 2 and the 3 classes bad, good, third" in capsys.readouterr().err
    assert main(["data", "texts", "--train_file", file]) == 0
