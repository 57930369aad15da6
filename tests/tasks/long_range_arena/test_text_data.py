"""IMDb reviews as bytes, from small folders of the published form."""

import numpy as np
import pytest

from lineara.tasks.long_range_arena import TextData
from lineara.tasks.long_range_arena.text_data import text_of

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")


@pytest.fixture
def folder(tmp_path):
    """11 + 7 training reviews and 3 + 2 test reviews; each says where it lies."""
    for split, sizes in (("train", (11, 7)), ("test", (3, 2))):
        for name, size in zip(("neg", "pos"), sizes):
            directory = tmp_path / "aclImdb" / split / name
            directory.mkdir(parents=True)
            # Made in another order than that of their names.
            for number in reversed(range(size)):
                (directory / f"{number}_5.txt").write_text(f"{split} {name} {number} é")
            (directory / "other.feat").write_text("0:1")
            (directory / "._0_5.txt").write_bytes(b"Mac OS X")  # a hidden file that other programs leave
    (tmp_path / "aclImdb" / "train" / "unsup").mkdir()
    return tmp_path


def make(folder, **options):
    module = TextData(**{"data_root": str(folder), "num_val": 5, "batch_size": 3, **options})
    module.prepare_data()
    module.setup("fit")
    return module


def texts(examples):
    return [(bytes(tokens).decode(), label) for tokens, label in examples]


def test_a_token_is_a_byte_plus_one(folder):
    [batch, *_] = make(folder).test_dataloader()
    assert batch["label"].tolist() == [0, 0, 0]
    expected = [byte + 1 for byte in "test neg 0 é".encode()]
    assert batch["tokens"][0].tolist() == expected
    assert expected[-2:] == [0xC3 + 1, 0xA9 + 1]
    assert batch["mask"].all()


def test_reviews_come_in_the_order_of_their_names_with_their_class(folder):
    assert texts(make(folder).split("test")) == [
        *((f"test neg {number} é", 0) for number in range(3)),
        *((f"test pos {number} é", 1) for number in range(2)),
    ]
    train = texts(make(folder, num_val=0).split("train"))
    numbers = [0, 10, *range(1, 10)]  # as text
    assert train[:11] == [(f"train neg {number} é", 0) for number in numbers]
    assert [label for _, label in train] == [0] * 11 + [1] * 7


def test_validation_holds_out_training_reviews_by_chance_and_always_the_same(folder):
    whole = set(texts(make(folder, num_val=0).split("train")))
    module, again = make(folder), make(folder, shuffle_seed=4)
    train, val = texts(module.split("train")), texts(module.split("val"))
    assert (len(train), len(val)) == (13, 5)
    assert set(train) | set(val) == whole
    assert not set(train) & set(val)
    assert {label for _, label in val} == {0, 1}
    assert texts(again.split("val")) == val


def test_the_published_harness_validates_on_the_test_reviews(folder):
    module = make(folder, num_val=0)
    assert texts(module.split("val")) == texts(module.split("test"))
    assert len(module.split("train")) == 18


def test_reviews_are_cut(folder):
    module = make(folder, max_len=7, num_val=0)
    assert set(module.split("train").lengths) == {7}
    assert {text for text, _ in texts(module.split("test"))} == {"test ne", "test po"}


def test_the_benchmark_is_the_default():
    module = TextData()
    assert (module.num_val, module.max_len, module.batch_size) == (2_500, 4_000, 32)


def test_an_example_is_written_as_its_text():
    tokens = np.array([byte + 1 for byte in "so\n\0é".encode()] + [0, 0])
    assert text_of(tokens) == "so\n\0é"
    assert text_of(tokens[:5]) == "so\n\0\N{REPLACEMENT CHARACTER}"  # a letter cut in two
    assert text_of(np.array([256, 66])) == "\N{REPLACEMENT CHARACTER}A"
    assert TextData().describe(tokens) == "so\n\0é"


@pytest.mark.parametrize("options", [{"num_val": -1}, {"num_val": 18}])
def test_a_validation_split_that_leaves_no_review_for_training_is_refused(folder, options):
    with pytest.raises(ValueError, match=r"^num_val must be at least 0 and below the 18 training reviews, got "):
        make(folder, **options)


def test_a_review_has_at_least_one_byte():
    with pytest.raises(ValueError, match=r"^max_len must be at least 1, got 0$"):
        TextData(max_len=0)


@pytest.mark.parametrize("part", ["test/pos", "train/neg", "train", ""])
def test_a_missing_folder_is_named(folder, part):
    (folder / "aclImdb" / part).rename(folder / "elsewhere")
    missing = {"train": "train/neg", "": "train/neg"}.get(part, part)
    with pytest.raises(FileNotFoundError, match=rf"aclImdb/{missing} must be .*aclImdb/\{{train,test\}}/\{{neg,pos\}}"):
        make(folder)


def test_a_review_that_cannot_be_read_is_named(folder):
    review = folder / "aclImdb/train/pos/3_5.txt"
    review.unlink()
    review.mkdir()
    with pytest.raises(IsADirectoryError, match=r"train/pos/3_5\.txt must be a readable review, got Is a directory"):
        make(folder)
    review.rmdir()
    review.touch()
    with pytest.raises(ValueError, match=r"train/pos/3_5\.txt must be a review, got an empty file"):
        make(folder)


def test_it_is_trained_tested_and_predicted(folder, run_task):
    data = {"class_path": "lineara.tasks.long_range_arena.TextData", "init_args": {"data_root": ".", "num_val": 5}}
    scores, predictions = run_task(data, num_classes=2, max_len=4000)
    assert "test/accuracy_of_majority_class" in scores
    assert [row["tokens"] for row in predictions] == [text for text, _ in texts(make(folder).split("test"))]
    assert [row["label"] for row in predictions] == list("00011")
    assert {row["prediction"] for row in predictions} <= {"0", "1"}
