"""scikit-learn's digits as images, the stand-in for ImageNet."""

import runpy
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from lineara.tasks.image_classification import DigitsData, digits_data


def make(**options):
    module = DigitsData(**options)
    module.setup("fit")
    return module


def shades_of(data, split):
    """Each image as its 64 shades of 0..16, and its label."""
    images = getattr(data, f"{split}_dataloader")()
    rows = []
    for batch in images:
        step = data.upscale
        shades = ((batch["image"][:, 0, ::step, ::step] + 1) * 8).round().int()
        rows += [(*shade.flatten().tolist(), label) for shade, label in zip(shades, batch["label"].tolist())]
    return rows


def test_every_image_is_in_one_split_with_its_label():
    data = make(max_shift=0)
    data.batch_size = 1  # so that no training image is left out
    splits = [shades_of(data, split) for split in ("train", "val", "test")]
    assert [len(rows) for rows in splits] == [1257, 180, 360]
    digits = load_digits()
    expected = [(*image.astype(int).ravel().tolist(), int(label)) for image, label in zip(digits.images, digits.target)]
    assert sorted(chain(*splits)) == sorted(expected)
    for rows in splits:
        assert np.bincount([row[-1] for row in rows]).min() > 0.05 * len(rows)  # each class


def test_the_test_images_are_always_the_same():
    one, other = make(), make(shuffle_seed=5, batch_size=3, num_val=100)
    assert shades_of(one, "test") == shades_of(other, "test")
    assert shades_of(one, "val")[:100] == shades_of(other, "val")


def test_images_are_grey_from_minus_1_to_1_and_each_pixel_is_repeated():
    small, large = (next(iter(make(upscale=upscale).val_dataloader()))["image"] for upscale in (1, 3))
    assert (small.shape, large.shape) == ((32, 3, 8, 8), (32, 3, 24, 24))
    assert (float(small.min()), float(small.max())) == (-1, 1)
    assert torch.equal(small[:, :1].expand(-1, 3, -1, -1), small)
    assert torch.equal(large, small.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3))


def test_training_images_are_moved_by_up_to_the_shift_in_every_direction():
    still = {row[-1]: None for row in shades_of(make(), "val")}
    assert len(still) == 10
    plain, moved = make(upscale=2, max_shift=0), make(upscale=2, max_shift=1)
    originals, images = (
        torch.cat([batch["image"][:, 0] for batch in data.train_dataloader()]) for data in (plain, moved)
    )  # the order is the same
    padded = torch.nn.functional.pad(originals, (2, 2, 2, 2), value=-1.0)  # (n, 20, 20)
    seen = set()
    for image, large in zip(images, padded):
        windows = {(y, x) for y in range(5) for x in range(5) if torch.equal(large[y : y + 16, x : x + 16], image)}
        assert windows
        seen |= windows if len(windows) == 1 else set()
    assert seen == {(y, x) for y in range(5) for x in range(5)}


def test_a_photograph_is_resized_and_loses_its_colours():
    red = Image.new("RGB", (50, 40), (255, 0, 0))
    given, shown = make(upscale=2).photograph(red)
    assert (given.shape, shown.shape) == ((3, 16, 16), (16, 16, 3))
    assert len(np.unique(shown)) == 1
    assert given.mean().item() == pytest.approx(shown.mean() / 127.5 - 1, abs=1e-5)


def test_the_summary_counts():
    lines = list(DigitsData().summary())
    assert lines[0] == "scikit-learn's digits"
    assert lines[1].startswith("train: 1,257 images, 10 classes of ")


@pytest.mark.parametrize(("num_val", "num_test"), [(-1, 9), (9, -1), (900, 897)])
def test_sizes_that_leave_no_image_for_training_are_refused(num_val, num_test):
    with pytest.raises(ValueError, match=rf"^num_val and num_test must .* 1797 .*, got {num_val} and {num_test}$"):
        DigitsData(num_val=num_val, num_test=num_test)


@pytest.mark.parametrize(("name", "value", "least"), [("upscale", 0, 1), ("max_shift", -1, 0)])
def test_options_out_of_range_are_refused(name, value, least):
    with pytest.raises(ValueError, match=rf"^{name} must be at least {least}, got {value}$"):
        DigitsData(**{name: value})


def test_without_scikit_learn_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    names = runpy.run_path(digits_data.__file__)
    with pytest.raises(ImportError, match=r"^DigitsData needs scikit-learn, .*: pip install 'lineara\[train\]'$"):
        names["DigitsData"]().setup("fit")
