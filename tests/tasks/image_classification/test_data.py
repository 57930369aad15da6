"""Images to batches: what a batch holds, which images an epoch has, and what becomes of broken ones."""

import importlib.util
import re
import runpy
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from lineara.tasks import image_classification
from lineara.tasks.image_classification.data import EpochOrder, ImageClassificationData
from lineara.tasks.image_files import BrokenImageError

SPLITS = ("train", "val", "test")


class Few:
    """Images of one colour, (start + i) / 1000 for image i, labelled by i modulo 5; some are broken."""

    def __init__(self, size, start=0, broken=()):
        self.targets = [index % 5 for index in range(size)]
        self.start = start
        self.broken = broken

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenImageError(f"image {index} must be an image that can be read, got none")
        return torch.full((3, 4, 7), (self.start + index) / 1000), self.targets[index]


def shake(image):
    return image + 1000 * torch.rand(()).round(decimals=3)


class FewData(ImageClassificationData):
    """Splits from memory; the random part of a training image is its thousands."""

    augment = staticmethod(shake)
    fit = staticmethod(lambda image: image)
    to_input = v2.ToPureTensor()

    def __init__(self, *, sizes=(101, 23, 17), broken=(), **options):
        settings = {"batch_size": 7, "num_workers": 0, "skip_broken": False, "shuffle_seed": 0, "predict_folder": None}
        super().__init__(**(settings | options))
        self.sizes = dict(zip(SPLITS, sizes))
        self.broken = broken
        self.times_read = []

    classes = property(lambda self: list("abcde"))

    def source(self):
        return "memory"

    def read(self, split):
        self.times_read.append(split)
        return Few(self.sizes[split], broken=self.broken)


@pytest.fixture
def data():
    module = FewData()
    module.setup("fit")
    return module


def numbers_of(batches):
    """The image numbers of each batch."""
    return [(batch["image"][:, 0, 0, 0] % 1 * 1000).round().int().tolist() for batch in batches]


def draws_of(batches):
    """By image number, what its augmentation drew."""
    values = torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]).double()
    return dict(zip(*((values % 1 * 1000).round().int().tolist(), values.floor().tolist())))


# A batch.


def test_a_batch_holds_images_and_labels(data):
    batch = next(iter(data.val_dataloader()))
    assert list(batch) == ["image", "label", "broken"]
    assert (batch["image"].shape, batch["image"].dtype) == ((7, 3, 4, 7), torch.float32)
    assert batch["label"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch["label"].dtype == torch.int64
    assert batch["broken"] == []


@pytest.mark.parametrize("split", ["val", "test"])
def test_an_epoch_of_evaluation_has_every_image_once_in_order_and_unchanged(data, split):
    loader = getattr(data, f"{split}_dataloader")()
    numbers = numbers_of(loader)
    assert list(chain(*numbers)) == list(range(data.sizes[split]))
    assert [len(batch) for batch in numbers] == [7] * (data.sizes[split] // 7) + [data.sizes[split] % 7]
    assert set(draws_of(loader).values()) == {0}


def test_an_epoch_of_training_has_whole_batches_of_different_images(data):
    loader = data.train_dataloader()
    numbers = numbers_of(loader)
    assert [len(batch) for batch in numbers] == [7] * 14
    assert len(loader) == 14
    images = list(chain(*numbers))
    assert len(set(images)) == 98
    assert images != sorted(images)


def test_order_and_augmentation_follow_from_seed_and_epoch_alone():
    def epoch(number, *, seed=0, workers=0):
        module = FewData(shuffle_seed=seed, num_workers=workers)
        module.setup("fit")
        loader = module.train_dataloader()
        loader.sampler.set_epoch(number)
        torch.rand(number + 1)  # whatever has been drawn before
        batches = list(loader)
        return numbers_of(batches), draws_of(batches)

    first = epoch(2)
    assert epoch(2) == first
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking a process with threads
        assert epoch(2, workers=2) == first
    for other in (epoch(1), epoch(2, seed=1)):
        assert other[0] != first[0]
        both = other[1].keys() & first[1].keys()
        assert sum(other[1][number] == first[1][number] for number in both) < 0.1 * len(both)
    assert len(set(first[1].values())) > 80


def test_a_resumed_epoch_goes_on_with_the_next_batch_and_only_once(data):
    def epoch(loader, number):
        loader.sampler.set_epoch(number)
        return list(loader)

    whole = epoch(data.train_dataloader(), 2)
    data.load_state_dict({"batches_done": 3})
    loader = data.train_dataloader()
    rest = epoch(loader, 2)
    assert numbers_of(rest) == numbers_of(whole)[3:]
    assert draws_of(rest).items() <= draws_of(whole).items()
    assert len(numbers_of(epoch(loader, 3))) == 14


@pytest.mark.parametrize("split", SPLITS)
def test_loading_draws_no_random_number_of_the_training(data, split):
    before = torch.get_rng_state()
    assert list(getattr(data, f"{split}_dataloader")())
    assert torch.equal(torch.get_rng_state(), before)


# Which images a process has.


def orders(num_images, num_processes, *, epoch=0, **options):
    found = []
    for rank in range(num_processes):
        order = EpochOrder(num_images, num_processes=num_processes, rank=rank, **options)
        order.set_epoch(epoch)
        found.append(list(order))
        assert len(order) == len(found[-1])
    return found


@pytest.mark.parametrize(("num_images", "num_processes"), [(101, 3), (102, 3), (5, 7), (1, 1)])
def test_processes_share_a_shuffled_epoch_evenly(num_images, num_processes):
    shares = orders(num_images, num_processes, shuffle=True, epoch=4)
    [alone] = orders(num_images, 1, shuffle=True, epoch=4)
    assert {len(share) for share in shares} == {-(-num_images // num_processes)}
    dealt = [share[turn] for turn in range(len(shares[0])) for share in shares]
    assert dealt[:num_images] == alone  # as one process would, in turn
    assert all(item in alone for item in dealt[num_images:])
    assert sorted(index for index, _ in alone) == list(range(num_images))


def test_processes_share_an_epoch_of_evaluation_without_repeating_an_image():
    shares = orders(101, 3, shuffle=False)
    assert sorted(index for share in shares for index, _ in share) == list(range(101))
    assert [len(share) for share in shares] == [34, 34, 33]


def test_a_start_leaves_out_the_first_images_once():
    order = EpochOrder(101, shuffle=True, start=14, num_processes=2, rank=1)
    whole = orders(101, 2, shuffle=True)[1]
    assert list(order) == whole[14:]
    assert list(order) == whole


# Broken images.


def batches_to_train(module):
    """As the trainer passes them to the task."""
    return [module.on_before_batch_transfer(batch, 0) for batch in module.train_dataloader()]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_broken_image_ends_the_run_with_one_sentence(workers):
    module = FewData(sizes=(98, 0, 0), broken=[33], num_workers=workers)
    sentence = (
        r"^image 33 must be an image that can be read, got none; mend or remove it, or leave such images out by "
        r"--data\.skip_broken true$"
    )
    with pytest.raises(ValueError, match=sentence):
        batches_to_train(module)


def test_broken_images_are_left_out_when_told_and_reported_once():
    module = FewData(sizes=(98, 0, 0), broken=[3, 33], skip_broken=True)
    with pytest.warns(RuntimeWarning) as caught:
        batches = [batch for _ in range(2) for batch in batches_to_train(module)]
    said = sorted(str(warning.message) for warning in caught)
    assert said == [f"image {i} must be an image that can be read, got none; it is left out" for i in (3, 33)]
    numbers = numbers_of(batches)
    assert not {3, 33} & set(chain(*numbers))
    assert sorted({len(batch) for batch in numbers})[-1] == 7
    assert all(batch["label"].tolist() == [i % 5 for i in images] for batch, images in zip(batches, numbers))


def test_of_many_broken_images_ten_are_named():
    module = FewData(broken=range(101), skip_broken=True)
    with pytest.warns(RuntimeWarning) as caught:
        batches = batches_to_train(module)
    said = [str(warning.message) for warning in caught]
    assert len(said) == 11
    assert said[-1] == "more than 10 images are broken and left out: no more are named"
    assert all((len(batch["image"]), batch["label"].tolist()) == (0, []) for batch in batches)
    assert batches[0]["label"].dtype == torch.int64


# Images to predict.


def test_images_to_predict_are_those_of_a_folder_with_their_names(tmp_path):
    for name, grey in (("b.png", 7), ("a.jpg", 9), ("notes.txt", 0)):
        (tmp_path / name).write_bytes(b"") if name.endswith("txt") else Image.new("L", (5, 3), grey).save(
            tmp_path / name
        )
    (tmp_path / "c.png").write_bytes(b"text")
    module = FewData(predict_folder=str(tmp_path), batch_size=2)
    module.to_input = v2.Compose([v2.ToImage(), v2.ToPureTensor()])
    module.setup("predict")
    first, second = module.predict_dataloader()
    assert list(first) == ["image", "file_name", "broken"]
    assert first["file_name"] == ["a.jpg", "b.png"]
    assert first["image"].shape == (2, 3, 3, 5)
    assert first["image"].flatten(1).float().mean(dim=1).tolist() == [9, 7]
    assert second["file_name"] == []
    [sentence] = second["broken"]
    assert sentence.startswith(f"{tmp_path / 'c.png'} must be an image")
    assert module.times_read == []


def test_predicting_needs_a_folder_with_images(tmp_path):
    with pytest.raises(
        ValueError, match=r"^predict_folder must name a folder of images, got none; set --data\.predict"
    ):
        FewData().setup("predict")
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(tmp_path))} must hold images"):
        FewData(predict_folder=str(tmp_path)).setup("predict")


# The data module.


def test_splits_are_read_once_and_only_those_of_the_stage():
    module = FewData()
    for _ in range(2):
        module.setup("validate")
    assert module.times_read == ["val"]
    module.setup("fit")
    module.setup("test")
    assert module.times_read == ["val", "train", "test"]


def test_a_summary_has_a_line_for_each_split():
    assert list(FewData().summary()) == [
        "memory",
        "train: 101 images, 5 classes of 20 to 21 images",
        "val: 23 images, 5 classes of 4 to 5 images",
        "test: 17 images, 5 classes of 3 to 4 images",
    ]


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
    ],
)
def test_options_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        FewData(**wrong)


def test_a_training_split_of_less_than_a_batch_is_refused():
    FewData(batch_size=101).setup("fit")
    FewData(batch_size=102).setup("test")
    with pytest.raises(
        ValueError, match=r"^batch_size must be at most the 101 training images .*, got 102; set --data\."
    ):
        FewData(batch_size=102).setup("fit")


def test_a_photograph_is_shown_as_the_network_is_given_it():
    class Halving(FewData):
        fit = v2.Resize((2, 5))
        to_input = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])

    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(4, 10, 3), dtype=np.uint8))
    given, shown = Halving().photograph(image)
    assert (given.shape, shown.shape, shown.dtype) == ((3, 2, 5), (2, 5, 3), np.uint8)
    np.testing.assert_allclose(given.permute(1, 2, 0).numpy() * 255, shown, atol=1e-4)


def test_without_torchvision_the_drawer_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = r"^lineara\.tasks\.image_classification needs torchvision, .*: pip install 'lineara\[vision\]'$"
    with pytest.raises(ImportError, match=sentence):
        runpy.run_path(image_classification.__file__)


def test_the_drawer_has_its_classes_and_no_other_name():
    for name in image_classification.__all__:
        assert getattr(image_classification, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Digits'"):
        _ = image_classification.Digits
