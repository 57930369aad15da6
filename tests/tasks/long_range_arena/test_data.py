"""Examples to batches: what a batch holds, which batches an epoch has, and what every data module does."""

import math
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lineara.tasks.long_range_arena.data import LengthBucketSampler, SequenceBatches, SequenceData
from lineara.tasks.long_range_arena.examples import SequenceExamples

SPLITS = ("train", "val", "test")


def examples_of(*sequences, labels=None):
    """Sequences of bytes, labelled by their lengths unless told otherwise."""
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    labels = list(map(len, sequences)) if labels is None else labels
    return SequenceExamples(np.array(list(chain(*sequences)), np.uint8), offsets, np.array(labels, np.uint8))


class Few(SequenceData):
    """Splits from memory; example i of a split is [start + i] as often as it is long."""

    def __init__(self, *, batch_size=7, shuffle_seed=0, sizes=(230, 40, 30)):
        super().__init__(batch_size=batch_size, shuffle_seed=shuffle_seed, shift=1)
        self.sizes = sizes
        self.times_read = 0

    def source(self):
        return "memory"

    def read(self):
        self.times_read += 1
        random = np.random.default_rng(0)
        return {
            split: examples_of(*([i] * random.integers(2, 9) for i in range(size)))
            for split, size in zip(SPLITS, self.sizes)
        }

    def describe(self, tokens):
        return str(tokens)


@pytest.fixture
def data():
    module = Few()
    module.setup("fit")
    return module


# A batch.


def test_a_batch_is_padded_tokens_their_mask_and_labels():
    batch = SequenceBatches(examples_of([3, 1, 2], [5], [4, 9, 9, 200, 7]))[[2, 1]]
    assert list(batch) == ["tokens", "mask", "label"]
    assert batch["tokens"].tolist() == [[4, 9, 9, 200, 7], [5, 0, 0, 0, 0]]
    assert batch["mask"].tolist() == [[True] * 5, [True] + [False] * 4]
    assert batch["label"].tolist() == [5, 1]
    assert [batch[name].dtype for name in batch] == [torch.int64, torch.bool, torch.int64]


def test_a_batch_is_as_wide_as_its_longest_example():
    batches = SequenceBatches(examples_of([3, 1, 2], [5], [4, 9, 9, 200, 7]))
    assert len(batches) == 3
    assert [tuple(batches[[index]]["tokens"].shape) for index in range(3)] == [(1, 3), (1, 1), (1, 5)]
    assert tuple(batches[[0, 1]]["tokens"].shape) == (2, 3)


def test_shifted_zeros_are_tokens_and_others_are_hidden():
    examples = examples_of([0, 255, 0], [7, 0])
    shifted = SequenceBatches(examples, 1)[[0, 1]]
    assert shifted["tokens"].tolist() == [[1, 256, 1], [8, 1, 0]]
    assert shifted["mask"].tolist() == [[True, True, True], [True, True, False]]
    hidden = SequenceBatches(examples)[[0, 1]]
    assert hidden["tokens"].tolist() == [[0, 255, 0], [7, 0, 0]]
    assert hidden["mask"].tolist() == [[False, True, False], [True, False, False]]
    assert examples.tokens.tolist() == [0, 255, 0, 7, 0]  # what is held stays as it is


@pytest.mark.parametrize("split", [*SPLITS, "predict"])
def test_loaders_give_every_example_once_with_its_label(data, split):
    loader = getattr(data, f"{split}_dataloader")()
    batches = list(loader)
    examples = data.split(split)
    assert len(batches) == len(loader) == -(-len(examples) // 7)
    found = []
    for batch in batches:
        assert batch["mask"].sum(dim=1).tolist() == batch["label"].tolist()
        assert batch["label"].max() == batch["mask"].shape[1]
        found += (batch["tokens"][:, 0] - 1).tolist()
    assert sorted(found) == list(range(len(examples)))


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


def first_tokens(loader):
    return [token for batch in loader for token in batch["tokens"][:, 0].tolist()]


def test_the_order_of_training_batches_is_that_of_the_seed(data):
    def epoch(module, number):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        return first_tokens(loader)

    again, other = Few(), Few(shuffle_seed=1)
    again.setup("fit")
    other.setup("fit")
    assert epoch(data, 2) == epoch(again, 2)
    assert epoch(data, 2) != epoch(data, 1)
    assert epoch(data, 2) != epoch(other, 2)
    again.load_state_dict({"batches_done": 3})
    assert epoch(again, 2) == epoch(data, 2)[21:]  # 3 batches of 7
    assert epoch(again, 2) == epoch(data, 2)  # only the first epoch is cut


@pytest.mark.parametrize("split", [*SPLITS, "predict"])
def test_loading_draws_no_random_number_of_the_training(data, split):
    before = torch.get_rng_state()
    assert list(getattr(data, f"{split}_dataloader")())
    assert torch.equal(torch.get_rng_state(), before)


def test_predicting_takes_the_test_split_in_its_order(data):
    assert first_tokens(data.predict_dataloader()) == list(range(1, 31))
    assert first_tokens(data.test_dataloader()) != list(range(1, 31))  # by length


def test_the_splits_are_read_once(data):
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert data.times_read == 1


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_has_an_example(batch_size):
    with pytest.raises(ValueError, match=f"^batch_size must be at least 1, got {batch_size}$"):
        Few(batch_size=batch_size)


@pytest.mark.parametrize(
    ("stage", "split"),
    [("fit", "train"), ("fit", "val"), ("validate", "val"), ("test", "test"), ("predict", "predict")],
)
def test_a_split_without_examples_is_refused(stage, split):
    names = (*SPLITS[:2], "predict") if split == "predict" else SPLITS
    module = Few(sizes=[0 if name == split else 5 for name in names])
    with pytest.raises(ValueError, match=f"^the {split} split must hold at least 1 example, got none"):
        module.setup(stage)


def test_the_trivial_answer_is_the_most_frequent_class_of_the_training_split():
    class Labelled(Few):
        def read(self):
            sequence = [1]
            return {
                "train": examples_of(*[sequence] * 5, labels=[4, 0, 4, 1, 1 + 3]),
                "val": examples_of(*[sequence] * 3, labels=[0, 0, 4]),
                "test": examples_of(sequence, labels=[1]),
            }

    module = Labelled()
    module.setup("fit")
    assert module.trivial_accuracies("val") == {"majority_class": pytest.approx(1 / 3)}
    assert module.trivial_accuracies("test") == {"majority_class": 0.0}
    assert not math.isnan(module.trivial_accuracies("train")["majority_class"])
    assert list(module.summary()) == [
        "memory",
        "train: 5 examples; classes 0: 20.0%, 1: 20.0%, 2: 0.0%, 3: 0.0%, 4: 60.0%",
        "val: 3 examples; classes 0: 66.7%, 1: 0.0%, 2: 0.0%, 3: 0.0%, 4: 33.3%",
        "test: 1 examples; classes 0: 0.0%, 1: 100.0%",
    ]


def test_a_summary_tells_of_empty_splits_too():
    assert list(Few(sizes=(2, 0, 0)).summary())[2:] == ["val: 0 examples", "test: 0 examples"]


# Several processes.


def dealt(lengths, batch_size, processes, *, shuffle, **options):
    """The batches of each process."""
    samplers = [
        LengthBucketSampler(lengths, batch_size, shuffle=shuffle, num_processes=processes, rank=rank, **options)
        for rank in range(processes)
    ]
    batches = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(part) for part in batches]
    return batches


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_steps_that_one_takes_with_all_their_examples(processes):
    lengths = np.random.default_rng(0).integers(5, 31, size=101)
    parts = dealt(lengths, 7, processes, shuffle=True, seed=3)
    [whole] = dealt(lengths, 7 * processes, 1, shuffle=True, seed=3)
    assert {len(part) for part in parts} == {len(whole)}
    for step, examples in enumerate(whole):
        shares = [part[step] for part in parts]
        assert len({len(share) for share in shares}) == 1  # gradients of unequal batches would not weigh alike
        assert sorted({index for share in shares for index in share}) == sorted(examples)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 7), (3, 50), (17, 101)])
def test_processes_evaluate_every_example_once_and_each_has_some(processes, batch_size):
    lengths = np.random.default_rng(0).integers(5, 31, size=101)
    parts = dealt(lengths, batch_size, processes, shuffle=False)
    assert min(map(len, parts)) > 0
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(101))
    assert max(len(batch) for part in parts for batch in part) <= batch_size


def trainer(function, processes):
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=12)))
    return SimpleNamespace(
        world_size=processes,
        global_rank=0,
        strategy=None,
        num_training_batches=7,
        state=SimpleNamespace(fn=function),
        fit_loop=SimpleNamespace(epoch_loop=progress),
    )


@pytest.mark.parametrize(("batch_size", "processes"), [(5, 3), (3, 2), (5, 1)])
def test_a_resumed_fit_must_have_the_steps_that_it_was_begun_with(batch_size, processes):
    begun, other = Few(batch_size=5), Few(batch_size=batch_size)
    begun.trainer = trainer("fit", 2)
    state = begun.state_dict()
    assert state == {"batches_done": 5, "examples_per_step": 10}
    other.trainer = trainer("fit", processes)
    got = batch_size * processes
    sentence = rf"^a resumed run must keep its examples per step, got {got} .* it was begun with 10; set the batch size"
    with pytest.raises(ValueError, match=sentence):
        other.load_state_dict(state)
    other.trainer = trainer("test", processes)  # which takes no steps
    other.load_state_dict(state)


def test_a_resumed_fit_may_share_its_steps_otherwise_and_older_checkpoints_do_not_say():
    for state in ({"batches_done": 5, "examples_per_step": 10}, {"batches_done": 5}):
        module = Few(batch_size=10)
        module.trainer = trainer("fit", 1)
        module.load_state_dict(state)
        assert module._batches_done == 5
