"""scikit-learn's digits, the stand-in for the image task."""

import runpy
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from lineara.tasks.long_range_arena import DigitsData, digits_data

pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")


def make(**options):
    module = DigitsData(**options)
    module.prepare_data()
    module.setup("fit")
    return module


def images_of(module, split, side=8):
    examples = module.split(split)
    return examples.tokens.reshape(-1, side, side), examples.labels


def rows(images, labels):
    return sorted((*image.ravel().tolist(), label) for image, label in zip(images, labels))


def test_every_image_is_in_one_split_with_its_label():
    splits = [images_of(make(), split) for split in ("train", "val", "test")]
    assert [len(labels) for _, labels in splits] == [1257, 180, 360]
    digits = load_digits()
    found = [row for split in splits for row in rows(*split)]
    assert sorted(found) == rows(digits.images.astype(int), digits.target)
    for _, labels in splits:
        assert np.bincount(labels).min() > 0.05 * len(labels)  # each class, in no order
        assert np.any(np.diff(labels.astype(int)) < 0)


def test_the_split_is_always_the_same():
    one, other = make(), make(shuffle_seed=5, batch_size=3, num_val=100)
    assert np.array_equal(one.split("test").tokens, other.split("test").tokens)
    assert len(other.split("val")) == 100
    assert np.array_equal(images_of(one, "val")[0][:100], images_of(other, "val")[0])


def test_a_pixel_can_be_repeated():
    small, _ = images_of(make(), "val")
    large, _ = images_of(make(upscale=3), "val", side=24)
    assert np.array_equal(large, np.kron(small, np.ones((3, 3), np.uint8)))
    [batch, *_] = make(upscale=4).val_dataloader()
    assert batch["tokens"].shape == (32, 1024)


def test_black_pixels_are_hidden_only_when_told():
    shown, hidden = (make(mask_zero_pixels=flag) for flag in (False, True))
    [one, *_], [other, *_] = shown.val_dataloader(), hidden.val_dataloader()
    assert (int(one["tokens"].min()), int(one["tokens"].max())) == (1, 17)
    assert one["mask"].all()
    assert np.array_equal(other["tokens"], one["tokens"] - 1)
    assert np.array_equal(other["mask"], one["tokens"] > 1)


@pytest.mark.parametrize(("num_val", "num_test"), [(-1, 9), (9, -1), (900, 897)])
def test_sizes_that_leave_no_image_for_training_are_refused(num_val, num_test):
    with pytest.raises(ValueError, match=rf"^num_val and num_test must .* 1797 .*, got {num_val} and {num_test}$"):
        make(num_val=num_val, num_test=num_test)


def test_an_image_has_pixels():
    with pytest.raises(ValueError, match=r"^upscale must be at least 1, got 0$"):
        DigitsData(upscale=0)


def test_without_scikit_learn_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    names = runpy.run_path(digits_data.__file__)
    with pytest.raises(ImportError, match=r"^DigitsData needs scikit-learn, .*: pip install 'lineara\[train\]'$"):
        names["DigitsData"]().setup("fit")


def test_it_is_trained_tested_and_predicted(run_task):
    data = {"class_path": "lineara.tasks.long_range_arena.DigitsData", "init_args": {"num_test": 5, "num_val": 7}}
    scores, predictions = run_task(data, num_classes=10, max_len=64, vocab_size=18)
    assert "test/accuracy_of_majority_class" in scores
    assert len(predictions) == 5
    module = make(num_test=5, num_val=7)
    assert [row["label"] for row in predictions] == list(map(str, module.split("test").labels))
    assert [list(map(int, row["tokens"].split())) for row in predictions] == module.split("test").tokens.reshape(
        5, 64
    ).tolist()
