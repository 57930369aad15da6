"""ListOps as a data module: generated, published, and of one's own."""

import numpy as np
import pytest

from lineara.tasks.long_range_arena import ListOpsData
from lineara.tasks.long_range_arena.listops import decode, evaluate
from lineara.tasks.long_range_arena.metrics import majority_class_accuracy, root_operator_accuracy

FEW = {"num_train": 230, "num_val": 40, "num_test": 30, "min_len": 5, "max_len": 30, "num_workers": 1}
HEADER = "Source\tTarget\n"


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """A folder that holds the set of `FEW`."""
    folder = tmp_path_factory.mktemp("data")
    ListOpsData(data_root=str(folder), **FEW).prepare_data()
    return folder


@pytest.fixture
def data(generated):
    module = ListOpsData(data_root=str(generated), batch_size=7, **FEW)
    module.setup("fit")
    return module


def expressions_in(batch):
    return [decode(tokens[mask].numpy()) for tokens, mask in zip(batch["tokens"], batch["mask"])]


# The generated set.


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_loaders_give_every_expression_once_with_its_value(data, split):
    found = []
    for batch in getattr(data, f"{split}_dataloader")():
        assert [evaluate(expression) for expression in expressions_in(batch)] == batch["label"].tolist()
        found += expressions_in(batch)
    assert sorted(found) == sorted(decode(tokens) for tokens, _ in data.split(split))


def test_each_parameter_of_the_set_counts(generated):
    one, other = (ListOpsData(data_root=str(generated), **FEW, **options) for options in ({}, {"generator_seed": 1}))
    for module in (one, other):
        module.prepare_data()
        module.setup("fit")
    assert len(one.split("train")) == 230
    assert not np.array_equal(one.split("train").tokens, other.split("train").tokens)
    lengths = np.concatenate([one.split(split).lengths for split in ("train", "val", "test")])
    assert 5 < lengths.min() <= lengths.max() < 30


def test_predicting_takes_the_test_split_in_its_order(data):
    predicted = [expression for batch in data.predict_dataloader() for expression in expressions_in(batch)]
    assert predicted == [decode(tokens) for tokens, _ in data.split("test")]


def test_the_seed_is_that_of_the_order_of_batches_too():
    assert ListOpsData(generator_seed=3).shuffle_seed == 3


def test_both_trivial_accuracies_are_counted_on_the_training_split(data):
    train, test = data.split("train"), data.split("test")
    assert data.trivial_accuracies("test") == {
        "majority_class": majority_class_accuracy(train.labels, test.labels),
        "root_operator": root_operator_accuracy(train, test),
    }


def test_an_example_is_written_as_its_expression(data):
    [batch, *_] = data.test_dataloader()
    assert [data.describe(tokens) for tokens in batch["tokens"].numpy()] == expressions_in(batch)


def test_a_summary_begins_with_the_file(generated, data):
    file, *splits = data.summary()
    assert np.load(file)["train_labels"].shape == (230,)
    assert [line.split("; ")[0] for line in splits] == ["train: 230 examples", "val: 40 examples", "test: 30 examples"]


# The published files.


@pytest.fixture
def published(tmp_path):
    lines = {
        "train": "( ( [MAX 4 ) ( [MIN 7 2 ] ) ] )\t4\n( [SM 9 9 ] )\t8\n",
        "val": "( [MED 1 2 3 ] )\t2\n",
        "test": "( [MIN 5 6 ] )\t5\n( [MAX 1 2 3 ] )\t3\n( [SM 1 1 ] )\t2\n",
    }
    for split, text in lines.items():
        (tmp_path / f"basic_{split}.tsv").write_text(HEADER + text)
    return tmp_path


def test_published_files_are_read_in_place_of_generated_ones(published):
    module = ListOpsData(data_root=str(published / "none"), published_folder=str(published), batch_size=2)
    module.prepare_data()
    module.setup("fit")
    assert not (published / "none").exists()
    [train] = module.train_dataloader()
    assert dict(zip(expressions_in(train), train["label"].tolist())) == {"[MAX 4 [MIN 7 2 ] ]": 4, "[SM 9 9 ]": 8}
    [val] = module.val_dataloader()
    assert (expressions_in(val), val["label"].tolist()) == (["[MED 1 2 3 ]"], [2])
    tests = list(module.test_dataloader())
    assert [expressions_in(batch) for batch in tests] == [["[MIN 5 6 ]", "[SM 1 1 ]"], ["[MAX 1 2 3 ]"]]


def test_a_missing_published_file_is_named(published):
    (published / "basic_val.tsv").unlink()
    module = ListOpsData(published_folder=str(published))
    with pytest.raises(FileNotFoundError, match=r"basic_val\.tsv must be one of the published files"):
        module.setup("fit")


def test_a_file_of_ones_own_can_be_predicted_without_any_other(published):
    module = ListOpsData(
        data_root=str(published / "none"), predict_file=str(published / "basic_test.tsv"), batch_size=2
    )
    module.setup("predict")
    batches = list(module.predict_dataloader())
    # In the order of the file, not of length.
    assert [expressions_in(batch) for batch in batches] == [["[MIN 5 6 ]", "[MAX 1 2 3 ]"], ["[SM 1 1 ]"]]
    assert not (published / "none").exists()


def test_a_file_to_predict_changes_nothing_else(generated, published):
    module = ListOpsData(data_root=str(generated), predict_file=str(published / "basic_test.tsv"), **FEW)
    module.setup("fit")
    assert [len(module.split(split)) for split in ("train", "val", "test")] == [230, 40, 30]


def test_a_file_to_predict_without_expressions_is_refused(published):
    (published / "basic_test.tsv").write_text(HEADER)
    module = ListOpsData(predict_file=str(published / "basic_test.tsv"))
    with pytest.raises(ValueError, match=r"^the predict split must hold at least 1 example, got none"):
        module.setup("predict")
