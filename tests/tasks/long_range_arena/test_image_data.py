"""CIFAR-10 in grey, from small files of the published form."""

import hashlib
import pickle
import runpy
import sys

import numpy as np
import pytest

from lineara.tasks.long_range_arena import ImageData, image_data
from lineara.tasks.long_range_arena.image_data import grey

torchvision = pytest.importorskip("torchvision", reason="the image task needs torchvision")
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")

FILES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five files of 4 training images and one of 3 test images, with their checksums in place of the real ones."""
    random = np.random.default_rng(0)
    directory = tmp_path / "cifar-10-batches-py"
    directory.mkdir()
    checksums = {}
    for name in FILES:
        size = 3 if name == "test_batch" else 4
        content = {"data": random.integers(0, 256, (size, 3072), np.uint8), "labels": [7, 0, 9, 2][:size]}
        if name == "batches.meta":
            content = {"label_names": list("abcdefghij")}
        (directory / name).write_bytes(pickle.dumps(content))
        checksums[name] = hashlib.md5((directory / name).read_bytes()).hexdigest()
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [[name, checksums[name]] for name in FILES[:5]])
    monkeypatch.setattr(kind, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setitem(kind.meta, "md5", checksums["batches.meta"])
    return tmp_path


def make(folder, **options):
    module = ImageData(**{"data_root": str(folder), "num_val": 6, "batch_size": 7, **options})
    module.prepare_data()
    module.setup("fit")
    return module


def given(folder, name):
    """Grey images of one file, by way of its own layout: 1,024 red, then 1,024 green, then 1,024 blue pixels."""
    content = pickle.loads((folder / "cifar-10-batches-py" / name).read_bytes())
    red, green, blue = content["data"].astype(float).reshape(-1, 3, 1024).transpose(1, 0, 2)
    return np.floor(255.5 / 255 * (0.2989 * red + 0.587 * green + 0.114 * blue)), content["labels"]


def test_splits_are_the_files_in_their_order_and_the_last_images_validate(folder):
    module = make(folder)
    files = [given(folder, name) for name in FILES[:5]]
    images, labels = (np.concatenate([file[part] for file in files]) for part in (0, 1))
    for split, expected, classes in (
        ("train", images[:14], labels[:14]),
        ("val", images[14:], labels[14:]),
        ("test", *given(folder, "test_batch")),
    ):
        examples = module.split(split)
        assert examples.labels.tolist() == list(classes)
        assert np.array_equal(examples.tokens.reshape(-1, 1024), expected)


def test_a_batch_has_1024_pixels_and_hides_the_black_ones_only_when_told(folder):
    [batch] = make(folder).test_dataloader()
    assert batch["tokens"].shape == (3, 1024)
    assert batch["mask"].all()
    assert np.array_equal(batch["tokens"].numpy() - 1, given(folder, "test_batch")[0])
    hidden = make(folder, mask_zero_pixels=True)
    [batch] = hidden.test_dataloader()
    assert np.array_equal(batch["tokens"].numpy(), given(folder, "test_batch")[0])


def test_grey_is_the_luminance_of_the_published_harness():
    colours = {(0, 0, 0): 0, (255, 255, 255): 255, (255, 0, 0): 76, (0, 255, 0): 149, (0, 0, 255): 29, (1, 1, 1): 1}
    images = np.array([[list(colours)]], np.uint8)
    assert grey(images).tolist() == [[list(colours.values())]]
    assert grey(images).dtype == np.uint8


def test_the_benchmark_is_the_default():
    module = ImageData()
    assert (module.num_val, module.batch_size, module.shift) == (5_000, 256, 1)


@pytest.mark.parametrize("num_val", [-1, 20])
def test_a_validation_split_that_leaves_no_image_for_training_is_refused(folder, num_val):
    with pytest.raises(ValueError, match=rf"^num_val must be at least 0 and below the 20 training .*, got {num_val}$"):
        make(folder, num_val=num_val)


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_missing_file_is_named(folder, name):
    (folder / "cifar-10-batches-py" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{folder}/cifar-10-batches-py must hold .*, got no {name} there; "):
        make(folder)


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_damaged_file_is_refused(folder, name):
    file = folder / "cifar-10-batches-py" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"cifar-10-batches-py must hold CIFAR-10 as it was published, got files with"):
        make(folder)


def test_without_torchvision_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    names = runpy.run_path(image_data.__file__)
    with pytest.raises(ImportError, match=r"^ImageData needs torchvision, .*: pip install 'lineara\[vision\]'$"):
        names["ImageData"]().setup("fit")


def test_it_is_trained_tested_and_predicted(folder, run_task):
    data = {"class_path": "lineara.tasks.long_range_arena.ImageData", "init_args": {"data_root": ".", "num_val": 6}}
    scores, predictions = run_task(data, num_classes=10, max_len=1024)
    assert "test/accuracy_of_majority_class" in scores
    assert [row["label"] for row in predictions] == ["7", "0", "9"]
    pixels = [list(map(int, row["tokens"].split())) for row in predictions]
    assert np.array_equal(pixels, given(folder, "test_batch")[0])
