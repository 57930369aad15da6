"""The data module: loaders of each stage, what it refuses, and an epoch that goes on where a checkpoint left it."""

import importlib.util
import runpy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lineara.tasks import stereo_depth
from lineara.tasks.stereo_depth.data import StereoData
from lineara.tasks.stereo_depth.frames import Frame
from lineara.tasks.stereo_depth.transforms import Augmentation

SIZES = {"train": 23, "val": 5, "test": 3}
SILENT = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    # Lightning's own call.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Few:
    """Frames of 11 x 17 pixels; no two pixels of any of them have the same truth."""

    def __init__(self, split, number):
        self.names = [f"{split}/{index}" for index in range(number)]

    def __len__(self):
        return len(self.names)

    def read(self, index, *, both_truths=False):
        view = torch.full((3, 11, 17), index, dtype=torch.uint8)
        truth = 1000.0 * index + torch.arange(11 * 17).reshape(11, 17)
        return Frame(view, view, truth, truth >= 3)


class FewData(StereoData):
    def __init__(self, sizes=SIZES, **options):
        settings = {"predict_left": None, "predict_right": None, "predict_calibration": None, "num_workers": 0}
        settings |= {"data_root": "memory", "batch_size": 3, "shuffle_seed": 0}
        super().__init__(**{**settings, "augmentation": Augmentation(5, 7, vertical_flip=0.5), **options})
        self.sizes = sizes
        self.times_read = []

    def read(self, split):
        self.times_read.append(split)
        return Few(split, self.sizes[split])


def corners(batches):
    """What tells each crop from all others: its upper left truth, and the one below it."""
    return [batch["disparity"][:, :2, 0].tolist() for batch in batches]


def epoch(number=0, **options):
    data = FewData(**options)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def test_training_batches_are_crops_and_others_whole_frames():
    batches = epoch()
    assert len(batches) == 7
    assert {tuple(batch["left"].shape) for batch in batches} == {(3, 3, 5, 7)}
    data = FewData()
    for stage, loader, split in (("validate", data.val_dataloader, "val"), ("test", data.test_dataloader, "test")):
        data.setup(stage)
        batches = list(loader())
        assert [batch["name"] for batch in batches] == [[f"{split}/{index}"] for index in range(SIZES[split])]
        assert {tuple(batch["disparity"].shape) for batch in batches} == {(1, 11, 17)}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_an_epoch_follows_from_seed_and_number_whatever_the_workers():
    first = corners(epoch(2))
    torch.manual_seed(3)
    assert corners(epoch(2)) == first
    assert corners(epoch(2, num_workers=2)) == first
    assert corners(epoch(3)) != first
    assert corners(epoch(2, shuffle_seed=1)) != first


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, _):
        self.seen += corners([batch])
        return self.weight * 0

    def validation_step(self, batch, batch_index):
        raise AssertionError("no validation was asked for")

    def test_step(self, batch, batch_index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(folder, steps, resume=None):
    task = Recorder()
    keep = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = Trainer(max_steps=steps, callbacks=[keep], **SILENT)
    trainer.fit(task, FewData(), ckpt_path=resume, weights_only=True)
    return task.seen


@pytest.mark.parametrize("stop", [3, 7, 10])
def test_a_resumed_run_goes_on_with_the_next_batch_and_its_changes(tmp_path, stop):
    whole = train(tmp_path / "whole", 17)  # 2 epochs of 7 batches, and 3 batches
    assert len(whole) == 17
    assert whole[:7] != whole[7:14]
    begun = train(tmp_path / "begun", stop)
    assert begun + train(tmp_path / "begun", 17, resume=tmp_path / "begun" / f"step={stop}.ckpt") == whole


def test_a_resumed_run_keeps_its_seed_and_a_test_needs_none(tmp_path):
    train(tmp_path, 3)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    resumed = {"ckpt_path": tmp_path / "step=3.ckpt", "weights_only": True}
    with pytest.raises(ValueError, match=r"^a resumed run must keep its shuffle_seed, got 8 but it was begun with \d;"):
        Trainer(max_steps=5, callbacks=[keep], **SILENT).fit(Recorder(), FewData(shuffle_seed=8), **resumed)
    Trainer(callbacks=[keep], **SILENT).test(Recorder(), FewData(shuffle_seed=8), verbose=False, **resumed)


class Predictor(LightningModule):
    def predict_step(self, batch):
        return batch["name"]


def test_prediction_goes_on_past_broken_pairs(tmp_path, make):
    for name in "abcd":
        for place in "lr":
            make.write_image(tmp_path / place / f"{name}.png", make.random_image(0))
    (tmp_path / "l" / "b.png").write_bytes(b"text")
    (tmp_path / "r" / "d.png").write_bytes(b"text")
    data = FewData(predict_left=str(tmp_path / "l"), predict_right=str(tmp_path / "r"))
    with pytest.warns(RuntimeWarning, match=r"left out: .* must be an image that can be read") as caught:
        found = Trainer(**SILENT).predict(Predictor(), data)
    assert found == [["a"], ["c"]]
    assert len([warning for warning in caught if "left out" in str(warning.message)]) == 2
    assert data.times_read == []


def test_a_calibration_comes_with_the_pairs(tmp_path, make):
    for name in ("one.png", "two.png"):
        make.write_image(tmp_path / name, make.random_image(0))
    (tmp_path / "calib.txt").write_text("cam0=[1000 0 3; 0 1000 4; 0 0 1]\nbaseline=200\n")
    data = FewData(
        predict_left=str(tmp_path / "one.png"),
        predict_right=str(tmp_path / "two.png"),
        predict_calibration=str(tmp_path / "calib.txt"),
    )
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"left", "right", "name", "calibration"}
    assert batch["name"] == [f"{tmp_path.name}/one"]
    camera = {"focal_length": 1000.0, "center_x": 3.0, "center_y": 4.0, "baseline": 0.2, "doffs": 0.0}
    assert batch["calibration"] == [camera]


def test_each_pair_of_a_pattern_has_its_own_calibration(tmp_path, make):
    for number, scene in enumerate(("attic", "barn"), start=1):
        for name in ("im0.png", "im1.png"):
            make.write_image(tmp_path / scene / name, make.random_image(0))
        (tmp_path / scene / "calib.txt").write_text(f"cam0=[{number}000 0 3; 0 1000 4; 0 0 1]\nbaseline=200\n")
    places = {name: f"{tmp_path}/*/{file}" for name, file in (("left", "im0.png"), ("right", "im1.png"))}
    data = FewData(
        predict_left=places["left"], predict_right=places["right"], predict_calibration=f"{tmp_path}/*/calib.txt"
    )
    data.setup("predict")
    found = [(*batch["name"], batch["calibration"][0]["focal_length"]) for batch in data.predict_dataloader()]
    assert found == [("attic/im0", 1000.0), ("barn/im0", 2000.0)]


def test_splits_are_listed_once_and_only_those_of_the_stage():
    data = FewData()
    for _ in range(2):
        data.setup("validate")
    assert data.times_read == ["val"]
    data.setup("fit")
    data.setup("test")
    assert data.times_read == ["val", "train", "test"]


def test_a_summary_has_a_line_for_each_split():
    assert list(FewData(SIZES | {"test": 0, "val": 1}).summary()) == [
        "memory",
        "train: 23 frames; the first: 11 x 17 pixels, 98.4% with disparities of 3.0 to 186.0",
        "val: 1 frame; the first: 11 x 17 pixels, 98.4% with disparities of 3.0 to 186.0",
        "test: 0 frames",
    ]


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(ValueError, match=r"^batch_size must be at least 1, got 0$"):
        FewData(batch_size=0)
    with pytest.raises(ValueError, match=r"^num_workers must be at least 0, got -1$"):
        FewData(num_workers=-1)
    FewData(batch_size=23).setup("fit")
    with pytest.raises(
        ValueError, match=r"^batch_size must be at most the 23 training frames of a process, got 24; set"
    ):
        FewData(batch_size=24).setup("fit")
    with pytest.raises(ValueError, match=r"^val of memory must have at least 1 frame, got none$"):
        FewData(SIZES | {"val": 0}).setup("fit")
    with pytest.raises(
        ValueError, match=r"^swap_views must be 0 without disparities of the right view, got 0\.5 and none"
    ):
        FewData(augmentation=Augmentation(5, 7, swap_views=0.5)).setup("fit")
    with pytest.raises(ValueError, match=r"^split must be one of train, val, test, got 'dev'$"):
        FewData().frames("dev")
    with pytest.raises(
        ValueError, match=r"^frame train/\d+ must be at least as large as the crop of 13 x 7 pixels, got 11"
    ):
        epoch(augmentation=Augmentation(13, 7))


def test_without_torchvision_the_drawer_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"^stereo depth needs torchvision, .*: pip install 'lineara\[train,vision\]'$"
    ):
        runpy.run_path(stereo_depth.__file__)


def test_the_drawer_has_its_classes_and_no_other_name():
    for name in stereo_depth.__all__:
        assert getattr(stereo_depth, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'Motorcycle'"):
        _ = stereo_depth.Motorcycle
