"""Losses, optimiser, schedule, measurement and predictions of a small detector on images of two rectangles each."""

import csv
import json
import math
import shutil
import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from pycocotools import mask as run_lengths
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader
from torchvision.ops import FrozenBatchNorm2d

from lineara.models import mask_rcnn
from lineara.runs.nonfinite import CheckFinite
from lineara.runs.training import TrainingCommand
from lineara.tasks.instance_segmentation import InstanceSegmentation
from lineara.tasks.instance_segmentation.metrics import STATISTICS, as_results, evaluate

# Advice that `lineara fit` silences too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # of pycocotools' own code
]

ALL_STATISTICS = {f"{kind}_{name}" for kind in ("box", "mask") for name in STATISTICS}
SQUARES = {1: "red thing", 2: "green thing"}
HEIGHT, WIDTH = 61, 43


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def example(number):
    """An image with a red rectangle above a green one, and its target."""
    random = torch.Generator().manual_seed(number)
    image, boxes = torch.zeros(3, HEIGHT, WIDTH), torch.zeros(2, 4)
    masks = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.uint8)
    for row, top in enumerate((2, 32)):
        left, height, width = (int(torch.randint(*span, (), generator=random)) for span in ((1, 10), (9, 25), (9, 30)))
        image[row, top : top + height, left : left + width] = 1.0
        masks[row, top : top + height, left : left + width] = 1
        boxes[row] = torch.tensor([left, top, left + width, top + height])
    return image, {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": masks, "image_id": 100 + number}


def run_lengths_of(mask):
    encoded = run_lengths.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def collate(examples):
    return {"images": [image for image, _ in examples], "targets": [target for _, target in examples]}


class Squares(LightningDataModule):
    """As `CocoData` is: batches, `batch_size`, `categories` and `annotations`. Test is the validation split."""

    def __init__(self, *, num_train=13, num_val=7, batch_size=3, predict=()):
        super().__init__()
        self.batch_size = batch_size
        self.categories = SQUARES
        self.parts = {"train": list(map(example, range(num_train)))}
        self.parts["val"] = self.parts["test"] = [example(50 + i) for i in range(num_val)]
        self.predict = predict

    def annotations(self, split):
        images, annotations = [], []
        for _, target in self.parts[split]:
            images.append({"id": target["image_id"], "height": HEIGHT, "width": WIDTH})
            for label, box, mask in zip(target["labels"].tolist(), target["boxes"].tolist(), target["masks"].numpy()):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": target["image_id"],
                        "category_id": label,
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": run_lengths_of(mask),
                    }
                )
        categories = [{"id": number, "name": name} for number, name in self.categories.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def loader(self, part):
        return DataLoader(self.parts[part], self.batch_size, collate_fn=collate, generator=torch.Generator())

    def train_dataloader(self):
        return self.loader("train")

    def val_dataloader(self):
        return self.loader("val")

    def test_dataloader(self):
        return self.loader("test")

    def predict_dataloader(self):
        return DataLoader(self.predict, batch_size=None)


class RectangleFinder(nn.Module):
    """A detector in small: a class for each pixel, and around the pixels of a class a box. Called as torchvision's."""

    def __init__(self, *, trained=False):
        super().__init__()
        self.normalization = FrozenBatchNorm2d(3)
        self.classes = nn.Conv2d(3, 2, 1)
        if trained:
            with torch.no_grad():
                self.classes.weight.copy_(torch.eye(3)[:2, :, None, None] * 20)
                self.classes.bias.fill_(-10)

    def forward(self, images, targets=None):
        logits = [self.classes(self.normalization(image[None]))[0] for image in images]
        if not self.training:
            return [self.detections(values.sigmoid()) for values in logits]
        truths = [target["masks"].to(values) for values, target in zip(logits, targets)]
        losses = [binary_cross_entropy_with_logits(values, truth) for values, truth in zip(logits, truths)]
        return {"loss_mask": torch.stack(losses).mean(), "loss_size": 1e-3 * self.classes.weight.square().sum()}

    def detections(self, probabilities):
        found = [(label, map_) for label, map_ in enumerate(probabilities, start=1) if (map_ > 0.5).any()]
        boxes = torch.zeros(len(found), 4)
        for box, (_, map_) in zip(boxes, found):
            rows, columns = (map_ > 0.5).nonzero().unbind(1)
            box.copy_(torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]))
        return {
            "boxes": boxes,
            "labels": torch.tensor([label for label, _ in found]).long(),
            "scores": torch.tensor([float(map_[map_ > 0.5].mean()) for _, map_ in found]),
            "masks": torch.stack([map_ for _, map_ in found])[:, None] if found else torch.zeros(0, 1, HEIGHT, WIDTH),
        }


def make_task(network=None, **options):
    torch.manual_seed(0)
    return InstanceSegmentation(network or RectangleFinder(), **{"num_classes": 3, "warmup_steps": 2, **options})


def make_trainer(tmp_path, *callbacks, **options):
    settings = {"max_epochs": 1, "limit_val_batches": 0, "logger": False, "num_sanity_val_steps": 0, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


class Recorder(Callback):
    """The learning rate of every optimiser step, and every batch's loss beside what is logged of it."""

    def __init__(self):
        self.rates, self.losses, self.logged = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


# Training.


def test_the_loss_is_the_sum_of_the_networks_own_and_each_is_logged(tmp_path):
    recorder = Recorder()
    task = make_task()
    make_trainer(tmp_path, recorder, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(task, Squares())
    assert len(recorder.losses) == 5
    for loss, logged in zip(recorder.losses, recorder.logged):
        assert set(logged) == {"train/loss", "train/loss_mask", "train/loss_size"}
        assert logged["train/loss_mask"] > 0 < logged["train/loss_size"]
        assert logged["train/loss"] == pytest.approx(logged["train/loss_mask"] + logged["train/loss_size"], rel=1e-6)
        assert loss == pytest.approx(logged["train/loss"], rel=1e-6)
    with torch.no_grad():
        expected = make_task().network(*collate(Squares().parts["train"][:3]).values())
    assert recorder.losses[0] == pytest.approx(float(sum(expected.values())), rel=1e-6)


# 13 images in batches of 3 are 5 batches: 3 steps of two batches each in an epoch, of 6 images.
@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 12}], ids=str)
def test_optimiser_and_schedule_are_the_usual_ones(tmp_path, length):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, accumulate_grad_batches=2, **length)
    task = make_task(base_lr=0.08, milestones=(2, 3), warmup_steps=4)
    trainer.fit(task, Squares())
    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    [group] = optimizer.param_groups
    assert {name: group[name] for name in ("momentum", "weight_decay", "nesterov", "dampening")} == {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
        "dampening": 0,
    }
    full = 0.08 * 6 / 16
    rise = [0.001, 0.25075, 0.5005, 0.75025]
    assert recorder.rates == pytest.approx([full * part for part in [*rise, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]])


def test_the_defaults_are_the_1x_schedule():
    task = InstanceSegmentation(RectangleFinder())
    assert (task.base_lr, task.reference_batch, task.milestones, task.gamma) == (0.02, 16, (8, 11), 0.1)
    assert (task.warmup_steps, task.momentum, task.weight_decay, task.num_classes) == (500, 0.9, 1e-4, 91)


@pytest.mark.parametrize("warmup_steps", [5, 20])
def test_a_warmup_that_does_not_fit_the_run_is_refused(tmp_path, warmup_steps):
    sentence = rf"^warmup_steps must be below the run's 5 steps, got {warmup_steps}; set --model"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path).fit(make_task(warmup_steps=warmup_steps), Squares())


def test_a_trial_of_one_step_needs_no_shorter_warmup(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, fast_dev_run=True)
    trainer.fit(make_task(warmup_steps=500), Squares())
    assert len(recorder.rates) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_the_images(tmp_path, value):
    data = Squares()
    data.parts["train"][7][0][1, 5, 3] = value  # in the third batch, of the images 106 to 108
    sentence = (
        r"^the loss must be finite, got (nan|-?inf) in step 2 on batch 2 of the epoch \(image 106, image 107, "
        r"image 108\); lower"
    )
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, CheckFinite(tmp_path)).fit(make_task(), data)


def test_what_is_frozen_stays_frozen(tmp_path):
    network = RectangleFinder()
    network.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
    network.evaluated = nn.BatchNorm2d(3).eval().requires_grad_(False)
    forward = network.classes.forward
    network.classes.forward = lambda image: forward(network.evaluated(network.frozen(image)))
    task = make_task(network)
    kept = {name: value.clone() for name, value in network.state_dict().items() if not name.startswith("classes")}
    before = network.classes.weight.clone()
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=1.0)
    with pytest.warns(UserWarning, match=r"Found 1 module\(s\) in eval mode"):
        trainer.fit(task, Squares())
    assert len(kept) == 4 + 2 + 5
    for name, value in kept.items():
        assert torch.equal(network.state_dict()[name], value), name
    assert not torch.equal(network.classes.weight, before)
    trained = {id(weight) for group in trainer.optimizers[0].param_groups for weight in group["params"]}
    assert trained == {id(network.classes.weight), id(network.classes.bias)}


@pytest.mark.parametrize("trained", [True, False])
def test_training_finds_the_rectangles(tmp_path, trained):
    """Also the proof that an untrained network would not."""
    task = make_task(base_lr=16.0, milestones=())
    trainer = make_trainer(tmp_path, max_epochs=12)
    if trained:
        trainer.fit(task, Squares())
    [measured] = trainer.test(task, Squares(), verbose=False)
    assert (measured["test/mask_ap"] > 0.95) is trained


# The network and the data must fit.


def test_data_of_more_categories_than_the_network_has_are_refused(tmp_path):
    data = Squares()
    data.categories = {1: "one", 3: "three"}
    for call in ("fit", "test", "validate"):
        with pytest.raises(ValueError, match=r"^num_classes must exceed the categories' ids, got 3 and the id 3; "):
            getattr(make_trainer(tmp_path), call)(make_task(), datamodule=data)


def test_a_network_of_another_number_of_classes_is_refused():
    network = RectangleFinder()
    network.roi_heads = nn.Module()
    network.roi_heads.box_predictor = nn.Module()
    network.roi_heads.box_predictor.cls_score = nn.Linear(5, 91)
    InstanceSegmentation(network)
    with pytest.raises(ValueError, match=r"^num_classes must be the network's, .*, got 3 and 91; set both alike"):
        make_task(network)


@pytest.mark.parametrize("score_threshold", [-0.1, 1.1, math.nan])
def test_a_score_threshold_that_is_no_score_is_refused(score_threshold):
    with pytest.raises(ValueError, match=r"^score_threshold must lie in 0\.\.1, got "):
        make_task(score_threshold=score_threshold)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"reference_batch": 0}, "reference_batch must be at least 1 image, got 0"),
        ({"base_lr": 0.0}, "base_lr must be a finite number above 0, got 0.0"),
        ({"momentum": -0.9}, "momentum must be a finite number of at least 0, got -0.9"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0, got -1.0"),
        ({"gamma": -0.1}, "gamma must be a finite number above 0, got -0.1"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"milestones": (11, 8)}, r"milestones must be epochs from 1, each later than the last, got \[11, 8\]"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_task(**wrong)


def test_initial_weights_begin_a_new_run_and_no_other(tmp_path, monkeypatch):
    path, calls = str(tmp_path / "weights.pt"), []
    monkeypatch.setattr("lineara.models.pretrained.load_plain_weights", lambda *a, **o: calls.append((a, o)))
    for name, options in (("initial_weights", {}), ("initial_backbone_weights", {"part": "backbone.body"})):
        task = make_task(**{name: path})
        make_trainer(tmp_path).validate(task, Squares(), verbose=False)
        make_trainer(tmp_path).test(task, Squares(), verbose=False)
        assert calls == []
        trainer = make_trainer(tmp_path, max_epochs=2)
        trainer.fit(task, Squares())
        assert calls == [((task.network, path), options)]
        trainer.save_checkpoint(tmp_path / "some.ckpt")
        make_trainer(tmp_path, max_epochs=3).fit(task, Squares(), ckpt_path=tmp_path / "some.ckpt", weights_only=True)
        assert len(calls) == 1
        calls.clear()


def test_weights_of_the_detector_and_of_its_backbone_exclude_each_other():
    with pytest.raises(ValueError, match=r"^at most one of initial_weights and initial_backbone_weights must be given"):
        make_task(initial_weights="a.pt", initial_backbone_weights="b.pt")


# Measurement.


class Measured(Callback):
    """What every validation, also the one before training, saw and logged."""

    def __init__(self):
        self.passes = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.passes.append((trainer.sanity_checking, dict(pl_module._results)))


def expected_statistics(task, examples, data, split="val"):
    results = []
    task.eval()
    with torch.no_grad():
        for image, target in examples:
            results += as_results(target["image_id"], task.network([image])[0])
    return evaluate(data.annotations(split), results, image_ids=[target["image_id"] for _, target in examples])


def assert_logged(logged, stage, statistics):
    assert {name for name in logged if name.startswith(stage)} == {f"{stage}/{name}" for name in ALL_STATISTICS}
    for name, value in statistics.items():
        assert float(logged[f"{stage}/{name}"]) == pytest.approx(value, rel=1e-6, nan_ok=True), name


def test_a_validation_logs_cocos_statistics_of_the_split(tmp_path):
    data, task = Squares(), make_task(Jittered(trained=True))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    trainer.validate(task, data, verbose=False)
    statistics = expected_statistics(task, data.parts["val"], data).statistics
    assert 0.05 < statistics["mask_ap"] < 0.95
    assert statistics["mask_ap"] != statistics["box_ap"]
    assert_logged(trainer.callback_metrics, "val", statistics)


class Jittered(RectangleFinder):
    """Finds red things as they are, and green ones the more shifted the wider they are."""

    def detections(self, probabilities):
        found = super().detections(probabilities)
        for box, label, mask in zip(found["boxes"], found["labels"], found["masks"]):
            if label == 2:
                shift = int(box[2] - box[0]) // 6
                box[:2] += shift // 2
                mask.copy_(mask.roll(shift, dims=2))
        return found


def test_only_the_images_seen_are_measured(tmp_path):
    """2 of 3 batches, and one before training: as if the others did not exist."""
    data, measured = Squares(), Measured()
    task = make_task(RectangleFinder(trained=True), base_lr=1e-9)
    trainer = make_trainer(tmp_path, measured, limit_val_batches=2, num_sanity_val_steps=1)
    trainer.fit(task, data)
    assert [(sanity, sorted(seen)) for sanity, seen in measured.passes] == [
        (True, [150, 151, 152]),
        (False, [150, 151, 152, 153, 154, 155]),
    ]
    assert float(trainer.callback_metrics["val/mask_ap"]) == pytest.approx(1.0)
    assert float(trainer.callback_metrics["val/box_ar100"]) == pytest.approx(1.0)


def test_a_test_of_the_same_split_gives_the_numbers_of_the_last_validation(tmp_path, capsys):
    data, task = Squares(), make_task(Jittered(), base_lr=16.0)
    trainer = make_trainer(tmp_path, max_epochs=3, limit_val_batches=1.0)
    trainer.fit(task, data)
    validated = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    [tested] = make_trainer(tmp_path).test(task, data, verbose=False)
    assert 0 < validated["val/mask_ap"] < 1
    assert set(validated) == {f"val/{name}" for name in ALL_STATISTICS}
    for name in ALL_STATISTICS:
        assert tested[f"test/{name}"] == pytest.approx(validated[f"val/{name}"], abs=0, nan_ok=True)

    results = json.loads((tmp_path / "results.json").read_text())
    written = evaluate(data.annotations("test"), results)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert (statistics.pop("images"), statistics.pop("left_out")) == (7, 0)
    assert {name: math.nan if value is None else value for name, value in statistics.items()} == pytest.approx(
        written.statistics, abs=0, nan_ok=True
    )
    assert statistics["mask_ap"] == pytest.approx(validated["val/mask_ap"], rel=1e-6)
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["red thing", "green thing"]
    assert [float(row["mask_ap"]) for row in rows] == [row["mask_ap"] for row in written.per_class]
    said = capsys.readouterr().out
    assert f"{statistics['box_ap']:.3f}  {statistics['mask_ap']:>6.3f}\n" in said
    assert "7 images" in said
    assert f"results: {tmp_path / 'results.json'}" in said


def test_results_are_those_of_this_pass_alone(tmp_path):
    task = make_task(RectangleFinder(trained=True))
    make_trainer(tmp_path).test(task, Squares(), verbose=False)
    make_trainer(tmp_path).test(task, Squares(num_val=2), verbose=False)
    make_trainer(tmp_path).validate(task, Squares(num_val=3), verbose=False)
    make_trainer(tmp_path).validate(task, Squares(num_val=2), verbose=False)
    assert {result["image_id"] for result in json.loads((tmp_path / "results.json").read_text())} == {150, 151}


def test_images_that_are_skipped_and_images_without_detections_are_no_trouble(tmp_path):
    data = Squares()
    dark, target = example(60)
    batches = [{"images": [], "targets": []}, {"images": [dark * 0], "targets": [target]}]
    data.parts["test"] = [(dark * 0, target)]
    data.test_dataloader = lambda: DataLoader(batches, batch_size=None)
    task = make_task(RectangleFinder(trained=True))
    [measured] = make_trainer(tmp_path).test(task, data, verbose=False)
    assert measured["test/mask_ap"] == 0.0
    assert json.loads((tmp_path / "results.json").read_text()) == []


# Predictions.


def photographs(*names, broken=()):
    """Batches as those of a folder of images, some of which could not be read."""
    entries = [(example(i)[0], {"file_name": name, "image_id": i}) for i, name in enumerate(names, start=1)]
    batches = [collate(entries[i : i + 2]) for i in range(0, len(entries), 2)]
    return [*batches, {"images": [], "targets": []}]


def test_every_image_of_a_folder_gets_its_picture_and_its_detections(tmp_path, capsys):
    data = Squares(predict=photographs("b.jpg", "b.png", "a.jpg"))
    task = make_task(RectangleFinder(trained=True))
    make_trainer(tmp_path).predict(task, data)
    folder = tmp_path / "predictions"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "b.png.png", "results.json"]
    content = json.loads((folder / "results.json").read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (1, "b.jpg"),
        (2, "b.png"),
        (3, "a.jpg"),
    ]
    assert content["categories"] == [{"id": 1, "name": "red thing"}, {"id": 2, "name": "green thing"}]
    assert [(entry["image_id"], entry["category_id"]) for entry in content["annotations"]] == [
        (image, label) for image in (1, 2, 3) for label in (1, 2)
    ]
    left, top, right, bottom = example(1)[1]["boxes"][0].tolist()
    assert content["annotations"][0]["bbox"] == [left, top, right - left, bottom - top]
    assert f"predictions: {folder / 'results.json'}" in capsys.readouterr().out


def test_detections_below_the_score_threshold_are_left_out(tmp_path):
    task = make_task(RectangleFinder(trained=True), score_threshold=1.0)
    make_trainer(tmp_path).predict(task, Squares(predict=photographs("a.jpg")))
    assert json.loads((tmp_path / "predictions/results.json").read_text())["annotations"] == []
    assert (tmp_path / "predictions/a.png").exists()


def test_predictions_are_made_on_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"^predict must run on one device, got 2; call it with --trainer\.devices 1"):
        make_trainer(tmp_path).predict(make_task(), Squares(predict=photographs("a.jpg")))
    assert not (tmp_path / "predictions").exists()


# Going on.


def test_a_resumed_run_must_keep_its_schedule(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(), Squares())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    for task, data, sentence in (
        (
            make_task(base_lr=0.1),
            Squares(),
            "got learning rate 0.01875, .* but it was begun with learning rate 0.00375, ",
        ),
        (
            make_task(),
            Squares(batch_size=5),
            "got .* images per step 5, steps per epoch 3, .* but it was .* images per step 3, steps per epoch 5, ",
        ),
        *(
            (make_task(**{name: value}), Squares(), f"got .*{name} {said}[,;]? .*but it was .*{name} {was}[,;] ")
            for name, value, said, was in (
                ("milestones", (2,), r"\[2\]", r"\[8, 11\]"),
                ("gamma", 0.5, "0.5", "0.1"),
                ("warmup_steps", 3, "3", "2"),
                ("momentum", 0.5, "0.5", "0.9"),
                ("weight_decay", 0.0, "0", "0.0001"),
            )
        ),
    ):
        with pytest.raises(ValueError, match=rf"^a resumed run must keep its schedule, {sentence}"):
            make_trainer(tmp_path, max_epochs=2).fit(task, data, ckpt_path=tmp_path / "some.ckpt", weights_only=True)


@pytest.mark.parametrize("epochs_before", [1, 2])
def test_a_run_that_is_continued_ends_as_one_that_was_not_interrupted(tmp_path, epochs_before):
    whole, before, after = make_task(milestones=(1, 2)), make_task(milestones=(1, 2)), make_task(milestones=(1, 2))
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_epochs=3).fit(whole, Squares())
    first = make_trainer(tmp_path, max_epochs=epochs_before)
    first.fit(before, Squares())
    first.save_checkpoint(tmp_path / "some.ckpt")
    rest = Recorder()
    make_trainer(tmp_path, rest, max_epochs=3).fit(
        after, Squares(), ckpt_path=tmp_path / "some.ckpt", weights_only=True
    )
    assert rest.rates == recorder.rates[5 * epochs_before :]
    for name, value in whole.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name


# Several processes.

TWO_PROCESSES = """
import importlib.util, json, sys

spec = importlib.util.spec_from_file_location("this_test", sys.argv[1])
this_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this_test)
data = this_test.Squares()
task = this_test.make_task(this_test.Jittered(trained=True))
trainer = this_test.make_trainer(sys.argv[2], strategy="ddp_fork", devices=2)
trainer.test(task, data, verbose=False)
print(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))
"""


def test_two_processes_measure_what_one_does(tmp_path):
    """7 images on two processes: the last of one of them is a second look at the first image."""
    words = [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, __file__, str(tmp_path / "two")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    logged = json.loads(done.stdout.splitlines()[-1])
    make_trainer(tmp_path / "one").test(make_task(Jittered(trained=True)), Squares(), verbose=False)
    one, two = (json.loads((tmp_path / name / "statistics.json").read_text()) for name in ("one", "two"))
    assert one == two
    assert 0.05 < two["mask_ap"] < 0.95
    assert logged["test/mask_ap"] == pytest.approx(two["mask_ap"])
    assert (tmp_path / "one/results.json").read_text() == (tmp_path / "two/results.json").read_text()


# By the command line, on files in COCO's format.

# 13 images in batches of 3 are 5 batches: the run ends within its third epoch.
STEPS, BATCHES = 13, 5


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe beside its data, with a flip at random: the order of batches is not all that is random."""
    networks = ModuleType("networks_of_this_test")
    networks.RectangleFinder = RectangleFinder
    monkeypatch.setitem(sys.modules, networks.__name__, networks)
    data = Squares()
    for part in ("train", "val"):
        content = data.annotations(part)
        for image, (pixels, _) in zip(content["images"], data.parts[part]):
            image["file_name"] = f"{image['id']}.png"
            path = tmp_path / "set" / f"{part}2017" / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy()).save(path)
        path = tmp_path / "set" / "annotations" / f"instances_{part}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    path = tmp_path / "rectangles.yaml"
    path.write_text(f"""\
seed_everything: 0
model:
  class_path: lineara.tasks.instance_segmentation.InstanceSegmentation
  init_args:
    num_classes: 3
    base_lr: 80.0
    milestones: [2]
    warmup_steps: 3
    network:
      class_path: networks_of_this_test.RectangleFinder
data:
  class_path: lineara.tasks.instance_segmentation.CocoData
  init_args:
    data_root: {tmp_path / "set"}
    num_classes: 3
    batch_size: 3
    num_workers: 0
checkpoint:
  monitor: val/mask_ap
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
""")
    return path


class StoppedError(Exception):
    """What ends a run early in these tests."""


@contextmanager
def recorded(stop_after=None):
    """The ids and boxes of every training batch; `StoppedError` in place of the batch after so many."""
    batches = []
    step = InstanceSegmentation.training_step

    def training_step(self, batch, batch_index):
        if len(batches) == stop_after:
            raise StoppedError
        batches.append([(target["image_id"], target["boxes"].tolist()) for target in batch["targets"]])
        return step(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstanceSegmentation, "training_step", training_step)
        yield batches


def run(subcommand, recipe, run_dir, *words):
    return TrainingCommand([subcommand, "--config", str(recipe), "--run_dir", str(run_dir), *words])


def validations(run_dir):
    """(step, score) of each validation, over all starts of a run."""
    rows = []
    for path in sorted(run_dir.glob("metrics/version_*/metrics.csv")):
        with path.open(newline="") as file:
            rows += [(int(row["step"]), row["val/mask_ap"]) for row in csv.DictReader(file) if row["val/mask_ap"]]
    return rows


@pytest.mark.parametrize(("stop_after", "checkpoint"), [(4, 3), (8, 6), (11, 9)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(recipe, tmp_path, stop_after, checkpoint):
    with recorded() as expected:
        whole = run("fit", recipe, tmp_path / "whole")
    assert len(expected) == STEPS
    assert sorted(image_id for batch in expected[:BATCHES] for image_id, _ in batch) == list(range(100, 113))
    with recorded(stop_after) as before, pytest.raises(StoppedError):
        run("fit", recipe, tmp_path / "run")
    with recorded() as after:
        resumed = run("fit", recipe, tmp_path / "run", "--ckpt_path", "last")
    assert before == expected[:stop_after]
    assert after == expected[checkpoint:]
    assert validations(tmp_path / "run") == validations(tmp_path / "whole")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    [group], [expected_group] = (command.trainer.optimizers[0].param_groups for command in (resumed, whole))
    assert group["lr"] == expected_group["lr"] == pytest.approx(80.0 * 3 / 16 * 0.1)


def test_the_best_checkpoint_is_tested_and_predicts(recipe, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run("fit", recipe, run_dir)
    scores = {step: float(value) for step, value in validations(run_dir)}
    assert len(set(scores.values())) > 1
    tested = run("test", recipe, run_dir)
    statistics = json.loads((run_dir / "statistics.json").read_text())
    assert statistics["mask_ap"] == pytest.approx(max(scores.values()))
    assert float(tested.trainer.callback_metrics["test/mask_ap"]) == pytest.approx(statistics["mask_ap"])

    photographs = tmp_path / "photographs"
    shutil.copytree(tmp_path / "set/val2017", photographs)
    (photographs / "broken.png").write_bytes((photographs / "150.png").read_bytes()[:60])
    shutil.rmtree(tmp_path / "set")  # what is needed of it is in the checkpoint
    with pytest.warns(RuntimeWarning, match=r"broken\.png"):
        run("predict", recipe, run_dir, "--data.predict_folder", str(photographs))
    content = json.loads((run_dir / "predictions/results.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"{number}.png" for number in range(150, 157)]
    assert {category["name"] for category in content["categories"]} == {"red thing", "green thing"}
    drawn = {path.name for path in (run_dir / "predictions").glob("*.png")}
    assert drawn == {f"{number}.png" for number in range(150, 157)}
    assert f"predictions: {run_dir / 'predictions/results.json'}" in capsys.readouterr().out


# With torchvision's own detector.


def test_a_mask_rcnn_is_trained_measured_and_used(tmp_path):
    data = Squares(num_train=4, num_val=2, batch_size=2, predict=photographs("a.jpg"))
    data.parts["train"][3][1].update(  # an image without objects
        boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), masks=torch.zeros(0, HEIGHT, WIDTH, dtype=torch.uint8)
    )
    torch.manual_seed(0)
    options = {"rpn_pre_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 20, "box_detections_per_img": 5}
    network = mask_rcnn(
        "resnet18", num_classes=3, min_size=64, anchor_sizes=(4, 8, 16, 32, 64), batch_norm="frozen", options=options
    )
    recorder = Recorder()
    task = make_task(network, warmup_steps=1, score_threshold=0.0)
    trainer = make_trainer(
        tmp_path,
        recorder,
        limit_val_batches=1.0,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        precision="bf16-mixed",
    )
    trainer.fit(task, data)
    [first, _] = recorder.logged
    names = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")
    assert first["train/loss"] == pytest.approx(sum(first[f"train/loss_{name}"] for name in names), rel=1e-5)
    assert {f"val/{name}" for name in ALL_STATISTICS} <= set(trainer.callback_metrics)
    make_trainer(tmp_path).predict(task, data)
    assert (tmp_path / "predictions/a.png").exists()
    with pytest.raises(ValueError, match=r"^num_classes must be the network's, background included, got 91 and 3;"):
        InstanceSegmentation(network)
