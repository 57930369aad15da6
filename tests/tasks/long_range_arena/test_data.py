"""Examples to batches: what a batch holds, which batches an epoch has, and where the examples come from."""

import numpy as np
import pytest
import torch

from lineara.tasks.long_range_arena import ListOpsData
from lineara.tasks.long_range_arena.data import LengthBucketSampler, SequenceBatches
from lineara.tasks.long_range_arena.listops import ListOpsExamples, decode, encode, evaluate

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


def examples_of(*expressions):
    tokens = [encode(expression) for expression in expressions]
    offsets = np.cumsum([0, *map(len, tokens)])
    return ListOpsExamples(
        np.concatenate(tokens), offsets, np.array([evaluate(text) for text in expressions], np.uint8)
    )


def expressions_in(batch):
    return [decode(tokens[mask].numpy()) for tokens, mask in zip(batch["tokens"], batch["mask"])]


# A batch.


def test_a_batch_is_padded_tokens_their_mask_and_labels():
    batch = SequenceBatches(examples_of("[MAX 1 2 ]", "7", "[SM 9 [MIN 3 4 ] ]"))[[2, 1]]
    assert list(batch) == ["tokens", "mask", "label"]
    assert batch["tokens"].tolist() == [[14, 10, 11, 4, 5, 15, 15], [8, 0, 0, 0, 0, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 7, [True] + [False] * 6]
    assert batch["label"].tolist() == [2, 7]
    assert [batch[name].dtype for name in batch] == [torch.int64, torch.bool, torch.int64]


def test_a_batch_is_as_wide_as_its_longest_example():
    batches = SequenceBatches(examples_of("[MAX 1 2 ]", "7", "[SM 9 [MIN 3 4 ] ]"))
    assert len(batches) == 3
    assert [tuple(batches[[index]]["tokens"].shape) for index in range(3)] == [(1, 4), (1, 1), (1, 7)]
    assert tuple(batches[[0, 1]]["tokens"].shape) == (2, 4)


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_loaders_give_every_example_once_with_its_value(data, split):
    loader = getattr(data, f"{split}_dataloader")()
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(data.split(split)) // 7)
    found = []
    for batch in batches:
        assert torch.equal(batch["mask"], batch["tokens"] != 0)  # 0 is padding, and nothing else is
        assert batch["mask"].sum(dim=1).max() == batch["mask"].shape[1]
        assert [evaluate(expression) for expression in expressions_in(batch)] == batch["label"].tolist()
        found += expressions_in(batch)
    assert sorted(found) == sorted(decode(tokens) for tokens, _ in data.split(split))


# The sampler.


def sampler(lengths, batch_size=7, *, epoch=0, **options):
    made = LengthBucketSampler(np.asarray(lengths), batch_size, **{"shuffle": True, **options})
    made.set_epoch(epoch)
    return made


@pytest.fixture
def lengths():
    return np.random.default_rng(0).integers(500, 2000, 1003)


def test_an_epoch_has_every_example_once(lengths):
    batches = list(sampler(lengths))
    assert len(batches) == len(sampler(lengths)) == 144
    assert sorted(index for batch in batches for index in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [2] + [7] * 143


def test_the_order_depends_on_seed_and_epoch_alone(lengths):
    first = list(sampler(lengths, seed=3, epoch=5))
    assert list(sampler(lengths, seed=3, epoch=5)) == first
    again = sampler(lengths, seed=3)
    list(again)
    again.set_epoch(5)
    assert list(again) == first  # whatever it did before
    for other in ({"seed": 3, "epoch": 6}, {"seed": 4, "epoch": 5}):
        batches = list(sampler(lengths, **other))
        assert batches != first
        assert {frozenset(batch) for batch in batches} != {frozenset(batch) for batch in first}


def test_batches_do_not_come_in_the_order_of_their_lengths(lengths):
    longest = [lengths[batch].max() for batch in sampler(lengths)]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def padding(batches, lengths):
    return sum(len(batch) * lengths[batch].max() - lengths[batch].sum() for batch in batches)


def test_little_of_a_batch_is_padding(lengths):
    order = np.random.default_rng(1).permutation(1003)
    at_random = padding([order[i : i + 7] for i in range(0, 1003, 7)], lengths)
    assert padding(list(sampler(lengths)), lengths) < 0.05 * at_random
    assert padding(list(sampler(lengths)), lengths) < 0.03 * lengths.sum()


@pytest.mark.parametrize("start", [0, 1, 77, 143, 144])
def test_it_goes_on_where_a_stopped_epoch_was_and_only_once(lengths, start):
    resumed = sampler(lengths, epoch=2, start=start)
    assert list(resumed) == list(sampler(lengths, epoch=2))[start:]
    resumed.set_epoch(3)
    assert list(resumed) == list(sampler(lengths, epoch=3))


def test_without_shuffling_batches_run_from_short_to_long(lengths):
    batches = list(sampler(lengths, shuffle=False))
    in_order = [lengths[index] for batch in batches for index in batch]
    assert in_order == sorted(lengths)
    assert batches == list(sampler(lengths, shuffle=False, seed=9, epoch=4))
    assert list(sampler([3, 1, 3, 1, 2], 2, shuffle=False)) == [[1, 3], [4, 0], [2]]  # equal lengths keep their order


# The data module.


def test_the_order_of_training_batches_is_that_of_the_seed(generated, data):
    def epoch(module, number):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        return [expressions_in(batch) for batch in loader]

    again = ListOpsData(data_root=str(generated), batch_size=7, **FEW)
    again.setup("fit")
    assert epoch(data, 2) == epoch(again, 2)
    assert epoch(data, 2) != epoch(data, 1)
    again.load_state_dict({"batches_done": 3})
    assert epoch(again, 2) == epoch(data, 2)[3:]
    assert epoch(again, 2) == epoch(data, 2)  # only the first epoch is cut


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_loading_draws_no_random_number_of_the_training(data, split):
    before = torch.get_rng_state()
    assert list(getattr(data, f"{split}_dataloader")())
    assert torch.equal(torch.get_rng_state(), before)


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


def test_trivial_accuracies_are_counted_on_the_training_split(data):
    train, test = data.split("train"), data.split("test")
    majority = np.bincount(train.labels).argmax()
    assert data.trivial_accuracies("test")["majority_class"] == pytest.approx(np.mean(test.labels == majority))


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_has_an_example(batch_size):
    with pytest.raises(ValueError, match=f"^batch_size must be at least 1, got {batch_size}$"):
        ListOpsData(batch_size=batch_size)


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


@pytest.mark.parametrize(("stage", "split"), [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test")])
def test_a_split_without_examples_is_refused(published, stage, split):
    (published / f"basic_{split}.tsv").write_text(HEADER)
    module = ListOpsData(published_folder=str(published))
    with pytest.raises(ValueError, match=f"^the {split} split must hold at least 1 example, got none"):
        module.setup(stage)


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
