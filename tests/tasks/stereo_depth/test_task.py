"""Loss, optimiser, schedules, measurement and predictions of small networks on small pairs."""

import csv
import json
import math
import re
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
from torch import nn
from torch.utils.data import DataLoader

from lineara.models import PSMNet
from lineara.nn import EfficientAttention3d
from lineara.runs.nonfinite import CheckFinite
from lineara.runs.training import TrainingCommand, load_run
from lineara.tasks.stereo_depth import StereoDepth
from lineara.tasks.stereo_depth.batches import FrameLoader, PairsToPredict
from lineara.tasks.stereo_depth.metrics import PROTOCOLS, StereoScores
from lineara.tasks.stereo_depth.pfm import read_pfm

# Advice that `lineara fit` silences too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]

MOST = 32
HEIGHT, WIDTH = 13, 19
SCORES = {f"{name}{mean}" for name in ("epe", "over_1px", "over_3px", "d1") for mean in ("", "_per_image")}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def frame(number, *, height=HEIGHT, width=WIDTH):
    """A frame whose disparity is 10 times the left view's red; what is not valid, negative or too far is anything."""
    random = torch.Generator().manual_seed(number)
    left, right = torch.rand(2, 3, height, width, generator=random)
    disparity = 10 * left[0]
    valid = torch.rand(height, width, generator=random) < 0.7
    disparity[0, :8] = torch.tensor([math.nan, math.inf, -math.inf, -5.0, 0.0, MOST - 0.5, MOST, 1000.0])
    valid[0, :8] = torch.tensor([False, False, False, True, True, True, True, True])
    return {"left": left, "right": right, "disparity": disparity, "valid": valid, "name": f"frame {number}"}


def collate(frames):
    return {
        name: [one[name] for one in frames] if name == "name" else torch.stack([one[name] for one in frames])
        for name in frames[0]
    }


class Pairs(LightningDataModule):
    """As `StereoData` is: batches and `batch_size`; frames to measure come one by one. Test is the validation split."""

    def __init__(self, *, num_train=11, num_val=5, batch_size=2, predict=()):
        super().__init__()
        self.batch_size = batch_size
        self.train = [frame(number) for number in range(num_train)]
        self.val = [frame(50 + number, height=HEIGHT + 2 * number) for number in range(num_val)]
        self.predict = predict

    def train_dataloader(self):
        return DataLoader(self.train, self.batch_size, collate_fn=collate, generator=torch.Generator())

    def val_dataloader(self):
        return DataLoader(self.val, 1, collate_fn=collate, generator=torch.Generator())

    test_dataloader = val_dataloader

    def predict_dataloader(self):
        return DataLoader(self.predict, batch_size=None)


class WithTrivialAnswers(Pairs):
    def trivial_answers(self, split):
        assert split == "test"
        return {"ones": torch.ones(len(self.val), HEIGHT, WIDTH), "fives": torch.full((1, HEIGHT, WIDTH), 5.0)}


class RedFinder(nn.Module):
    """A stereo network in small: each disparity is a mixture of the colours of both views."""

    def __init__(self, *, trained=False, num_answers=3):
        super().__init__()
        self.max_disparity = MOST
        self.mixtures = nn.Conv2d(6, num_answers, 1)
        if trained:
            with torch.no_grad():
                self.mixtures.weight.zero_()
                self.mixtures.bias.zero_()
                self.mixtures.weight[:, 0] = 9.0

    def forward(self, left, right):
        answers = self.mixtures(torch.cat([left, right], dim=1)).float().unbind(1)
        return answers if self.training else answers[-1]


def make_task(network=None, **options):
    torch.manual_seed(0)
    return StereoDepth(network or RedFinder(), **{"max_disparity": MOST, **options})


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


def counting_errors(answer, batch):
    """The errors of the pixels that count in the loss, one by one."""
    places = zip(answer.flatten().tolist(), batch["disparity"].flatten().tolist(), batch["valid"].flatten().tolist())
    return [abs(said - truth) for said, truth, valid in places if valid and 0 < truth < MOST]


# The loss.


def test_the_loss_is_the_weighted_smooth_l1_of_the_pixels_that_count(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(make_task(loss_weights=(0.25, 0.5, 2.0)), Pairs())
    batch = collate(Pairs().train[:2])
    with torch.no_grad():
        answers = make_task().network.train()(batch["left"], batch["right"])
    means, errors = [], []
    for answer in answers:
        errors = counting_errors(answer, batch)
        means.append(sum(e * e / 2 if e < 1 else e - 0.5 for e in errors) / len(errors))
    assert 100 < len(errors) < 2 * HEIGHT * WIDTH
    assert len({round(mean, 3) for mean in means}) == 3
    expected = 0.25 * means[0] + 0.5 * means[1] + 2.0 * means[2]
    assert recorder.losses[0] == pytest.approx(expected, rel=1e-5)
    assert recorder.logged[0] == pytest.approx(
        {"train/loss": expected, "train/epe": sum(errors) / len(errors)}, rel=1e-5
    )
    assert len(recorder.losses) == 6
    assert all(loss == pytest.approx(logged["train/loss"]) for loss, logged in zip(recorder.losses, recorder.logged))


def gradients(task, batch):
    task.zero_grad()
    task.log = lambda *words, **options: None
    loss = task.training_step(batch, 0)
    loss.backward()
    return loss, [weight.grad for weight in task.parameters()]


def test_only_pixels_that_count_have_gradients():
    task, batch = make_task(RedFinder(num_answers=1), loss_weights=(1.0,)), collate([frame(0)])
    answer = torch.full((1, HEIGHT, WIDTH), 3.0, requires_grad=True)
    task.network.forward = lambda left, right: (answer,)
    task.log = lambda *words, **options: None
    task.training_step(batch, 0).backward()
    counts = batch["valid"] & (batch["disparity"] > 0) & (batch["disparity"] < MOST)
    assert torch.equal(answer.grad != 0, counts)
    assert answer.grad.isfinite().all()


def test_a_batch_without_pixels_that_count_has_a_loss_and_gradients_of_0():
    task, batch = make_task(), collate([frame(0), frame(1)])
    _, usual = gradients(task, batch)
    assert any(gradient.any() for gradient in usual)
    for nothing in ({"valid": batch["valid"] & False}, {"disparity": batch["disparity"] * math.nan}):
        loss, found = gradients(task, {**batch, **nothing})
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in found)


def test_training_goes_on_behind_a_batch_without_pixels_that_count(tmp_path):
    data, recorder = Pairs(num_train=6), Recorder()
    for one in data.train[2:4]:
        one["valid"][:] = False
    task = make_task()
    trainer = make_trainer(tmp_path, recorder, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    trainer.fit(task, data)
    assert recorder.losses[1] == 0.0
    assert min(recorder.losses[0], recorder.losses[2]) > 0
    assert all(weight.isfinite().all() for weight in task.parameters())
    assert all(math.isfinite(value) for logged in recorder.logged for value in logged.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_step_and_the_pairs(tmp_path, value):
    data = Pairs()
    data.train[5]["left"][1] = value
    sentence = (
        r"^the loss must be finite, got (nan|-?inf) in step 2 on batch 2 of the epoch \(frame 4, frame 5\); lower"
    )
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path, CheckFinite(tmp_path)).fit(make_task(), data)


def test_loss_weights_are_as_many_as_the_networks_answers(tmp_path):
    with pytest.raises(ValueError, match=r"^loss_weights must be as many as the network's disparities, got 2 and 3$"):
        make_trainer(tmp_path).fit(make_task(loss_weights=(1.0, 1.0)), Pairs())


@pytest.mark.parametrize("trained", [True, False])
def test_training_finds_the_disparity(tmp_path, trained):
    """Also the proof that an untrained network would not."""
    task = make_task(peak_lr=0.3)
    if trained:
        make_trainer(tmp_path, max_epochs=40).fit(task, Pairs())
    [measured] = make_trainer(tmp_path).test(task, Pairs(), verbose=False)
    assert (measured["test/over_1px"] < 0.05) is trained


# Optimisers and schedules. 11 frames in batches of 2 are 6 batches.


def test_the_defaults_are_the_published_ones(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, max_epochs=2)
    task = StereoDepth(RedFinder(), max_disparity=MOST)
    trainer.fit(task, Pairs())
    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.Adam
    [group] = optimizer.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.0)
    assert recorder.rates == [1e-3] * 12
    assert task.loss_weights == (0.5, 0.7, 1.0)
    assert task.protocol is PROTOCOLS["default"]
    assert StereoDepth(nn.Identity()).max_disparity == 192


def test_adamw_decays_weights(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(optimizer="adamw", weight_decay=0.05, peak_lr=0.01), Pairs())
    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert [optimizer.param_groups[0][name] for name in ("lr", "weight_decay")] == [0.01, 0.05]


@pytest.mark.parametrize("length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 12}], ids=str)
def test_one_cycle_goes_over_the_whole_run(tmp_path, length):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, accumulate_grad_batches=2, **length)
    trainer.fit(make_task(schedule="one_cycle", warmup_share=0.25, peak_lr=0.9), Pairs())
    assert recorder.rates == pytest.approx(
        [0.9 * part for part in [0.04, 0.36, 0.68, *[i / 9 for i in range(9, 0, -1)]]]
    )


def test_steps_fall_at_the_milestones(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, accumulate_grad_batches=2, max_epochs=3)
    trainer.fit(make_task(schedule="steps", milestones=(1, 2), gamma=0.5, peak_lr=0.8), Pairs())
    assert recorder.rates == pytest.approx([0.8] * 3 + [0.4] * 3 + [0.2] * 3)


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set")
def test_one_cycle_refuses_a_run_without_end(tmp_path):
    with pytest.raises(
        ValueError, match=r"^the schedule 'one_cycle' must know the run's length, got a run without end;"
    ):
        make_trainer(tmp_path, max_epochs=-1).fit(make_task(schedule="one_cycle"), Pairs())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"optimizer": "sgd"}, "optimizer must be one of adam, adamw, got 'sgd'"),
        ({"schedule": "cosine"}, "schedule must be one of constant, steps, one_cycle, got 'cosine'"),
        ({"schedule": "steps", "milestones": [3, 2]}, r"milestones must be epochs from 1, .*, got \[3, 2\]"),
        ({"schedule": "steps", "milestones": [0]}, r"milestones must be epochs from 1, .*, got \[0\]"),
        ({"schedule": "steps"}, r"milestones must be given for the schedule 'steps' and .*, got \[\] for 'steps'"),
        ({"milestones": [3]}, r"milestones must be given for the .*, got \[3\] for 'constant'"),
        ({"warmup_share": 1.0}, "warmup_share must be from 0 to below 1, got 1.0"),
        ({"warmup_share": -0.1}, "warmup_share must be from 0 to below 1, got -0.1"),
        ({"peak_lr": 0.0}, "peak_lr must be a number above 0, got 0.0"),
        ({"peak_lr": math.nan}, "peak_lr must be a number above 0, got nan"),
        ({"gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"gamma": math.nan}, "gamma must be a finite number above 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be a finite number of at least 0, got nan"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number of at least 0, got inf"),
        ({"loss_weights": ()}, r"loss_weights must be numbers of at least 0, not all 0, got \[\]"),
        ({"loss_weights": (0.0, 0.0)}, r"loss_weights must be .*, not all 0, got \[0.0, 0.0\]"),
        ({"loss_weights": (1.0, -1.0)}, r"loss_weights must be .*, not all 0, got \[1.0, -1.0\]"),
        ({"loss_weights": (1.0, math.nan)}, r"loss_weights must be .*, not all 0, got \[1.0, nan\]"),
        ({"max_disparity": 192}, "max_disparity must be at least 1 and the network's, got 192 and 32; set both alike"),
        ({"protocol": "none"}, "protocol must be one of default, psmnet, gwcnet, raft, got 'none'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_task(**options)


# Measurement.


def expected_scores(network, data, protocol="default"):
    scores = StereoScores(protocol, MOST)
    network.eval()
    for one in data.val:
        batch = collate([one])
        with torch.no_grad():
            scores.update(network(batch["left"], batch["right"]), batch["disparity"], batch["valid"], batch["name"])
    return scores.compute()


def test_a_validation_logs_the_scores_of_the_split(tmp_path):
    data, task = Pairs(), make_task(RedFinder(trained=True))
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    for _ in range(2):  # the second time of the same frames alone
        trainer.validate(task, data, verbose=False)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        expected = expected_scores(task.network, data)
        assert logged == pytest.approx(
            {f"val/{name}": expected[name] for name in (*SCORES, "beyond_max_disparity")}, rel=1e-5
        )
    errors = []
    for one in data.val:
        errors.append(counting_errors(9 * one["left"][0], one))
    assert logged["val/epe"] == pytest.approx(sum(map(sum, errors)) / sum(map(len, errors)), rel=1e-5)
    assert logged["val/epe_per_image"] == pytest.approx(np.mean([np.mean(of_frame) for of_frame in errors]), rel=1e-5)
    assert logged["val/epe"] != pytest.approx(logged["val/epe_per_image"], rel=1e-4)


@pytest.mark.parametrize(
    ("protocol", "sizes"),
    [
        ("default", [(13, 19), (519, 971)]),
        ("psmnet", [(16, 32), (528, 976)]),
        ("gwcnet", [(13, 19), (512, 960)]),
        ("raft", [(32, 32), (544, 992)]),
    ],
)
def test_frames_are_cut_and_padded_as_the_protocol_demands(tmp_path, protocol, sizes):
    """An exact network measures as exact, so that what is compared lies at the same places."""
    data, seen = Pairs(), []
    data.val = [frame(50), frame(51, height=519, width=971)]
    task = make_task(RedFinder(trained=True), protocol=protocol)
    with torch.no_grad():
        task.network.mixtures.weight[:, 0] = 10.0
    for one in data.val:
        one["valid"][0] = False
    forward = task.network.forward
    task.network.forward = lambda left, right: seen.append(tuple(left.shape[2:])) or forward(left, right)
    trainer = make_trainer(tmp_path)
    trainer.test(task, data, verbose=False)
    assert seen == sizes
    assert float(trainer.callback_metrics["test/epe"]) < 1e-5
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert (statistics["protocol"], statistics["max_disparity"], statistics["frames"]) == (protocol, MOST, 2)
    assert ("epe_per_image" in statistics) == (protocol == "default")


def test_a_test_of_the_same_split_gives_the_numbers_of_the_last_validation(tmp_path, capsys):
    data, task = Pairs(), make_task(peak_lr=0.1)
    trainer = make_trainer(tmp_path, max_epochs=3, limit_val_batches=1.0, num_sanity_val_steps=2)
    trainer.fit(task, data)
    validated = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    [tested] = make_trainer(tmp_path).test(task, data, verbose=False)
    assert {name.replace("test/", "val/"): value for name, value in tested.items()} == validated
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert {name: statistics[name] for name in SCORES} == pytest.approx(
        {name: validated[f"val/{name}"] for name in SCORES}, rel=1e-6
    )
    assert (statistics["frames"], statistics["frames_without_valid_pixels"]) == (5, 0)
    assert "trivial_answers" not in statistics
    said = capsys.readouterr().out
    assert "5 frames, protocol default, 0.9% of the truths left out, which max_disparity does not reach\n" in said
    assert re.search(rf"^network +{statistics['epe']:.3f} +{100 * statistics['over_1px']:.2f} %", said, re.MULTILINE)
    assert f"statistics: {tmp_path / 'statistics.json'}\npicture: {tmp_path / 'comparison.png'}\n" in said
    with Image.open(tmp_path / "comparison.png") as picture:
        assert np.asarray(picture).std() > 0


def test_trivial_answers_of_the_data_are_measured_beside_the_network(tmp_path, capsys):
    data = WithTrivialAnswers(num_val=1)
    make_trainer(tmp_path).test(make_task(), data, verbose=False)
    answers = json.loads((tmp_path / "statistics.json").read_text())["trivial_answers"]
    for name, value in (("ones", 1.0), ("fives", 5.0)):
        errors = counting_errors(torch.full((HEIGHT, WIDTH), value), data.val[0])
        assert answers[name]["epe"] == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    said = capsys.readouterr().out
    for name in ("ones", "fives"):
        assert re.search(rf"^{name} +{answers[name]['epe']:.3f} ", said, re.MULTILINE)


def test_what_a_trivial_answer_lacks_is_said_before_the_test(tmp_path):
    class Lacking(Pairs):
        def trivial_answers(self, split):
            raise ImportError("block matching needs a library")

    task = make_task()
    task.network.forward = None
    with pytest.raises(ImportError, match=r"^block matching needs a library$"):
        make_trainer(tmp_path).test(task, Lacking(), verbose=False)


def test_frames_without_pixels_that_count_are_counted_and_never_nan_in_the_files(tmp_path, capsys):
    data, task = Pairs(num_val=3), make_task()
    data.val[1]["valid"][:] = False
    make_trainer(tmp_path).test(task, data, verbose=False)
    statistics = json.loads((tmp_path / "statistics.json").read_text())
    assert (statistics["frames"], statistics["frames_without_valid_pixels"]) == (3, 1)
    assert statistics["epe"] > 0
    for one in data.val:
        one["valid"][:] = False
    make_trainer(tmp_path).test(task, data, verbose=False)
    assert json.loads((tmp_path / "statistics.json").read_text())["epe"] is None
    assert "3 frames, protocol default, 3 without valid pixels left out" in capsys.readouterr().out


# Predictions.

CAMERAS = {"focal_length": 1000.0, "baseline": 0.5, "doffs": 2.0}


def pair(number, name, **more):
    one = collate([frame(number)])
    return {"left": one["left"], "right": one["right"], "name": [name], **more}


def test_every_pair_gets_its_files(tmp_path, capsys):
    data = Pairs(predict=[pair(1, "a"), pair(2, "b", calibration=[CAMERAS]), pair(3, "a")])
    task = make_task(RedFinder(trained=True))
    make_trainer(tmp_path).predict(task, data)
    folder = tmp_path / "predictions"
    names = {path.name for path in folder.iterdir()}
    assert names == {*("a.pfm", "a.png", "a-2.pfm", "a-2.png"), *(f"b{end}" for end in ENDS)}
    for number, name in ((1, "a"), (2, "b"), (3, "a-2")):
        np.testing.assert_allclose(read_pfm(folder / f"{name}.pfm"), 9 * frame(number)["left"][0].numpy(), rtol=1e-5)
    np.testing.assert_allclose(read_pfm(folder / "b_depth.pfm"), 500 / (9 * frame(2)["left"][0].numpy() + 2), rtol=1e-5)
    assert f"predictions: {folder}" in capsys.readouterr().out


def test_predictions_of_which_no_pair_can_be_read_fail(tmp_path):
    class Broken(Pairs):
        def predict_dataloader(self):
            pairs = PairsToPredict([("a", tmp_path / "l.png", tmp_path / "r.png")])
            return FrameLoader(pairs, sampler=[[(0, 0)]], batch_size=None)

    sentence = r"^predict must be given a pair that can be read, got none; see the warnings above$"
    with pytest.warns(RuntimeWarning, match="left out: "), pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path).predict(make_task(), Broken())


def test_predictions_are_made_on_one_device(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "world_size", 2)
    with pytest.raises(ValueError, match=r"^predict must run on one device, got 2; call it with --trainer\.devices 1"):
        make_trainer(tmp_path).predict(make_task(), Pairs(predict=[pair(1, "a")]))
    assert not (tmp_path / "predictions").exists()


# Initial weights and going on.


def test_initial_weights_begin_a_new_run_and_no_other(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("lineara.models.pretrained.load_plain_weights", lambda *words: calls.append(words))
    task = make_task(initial_weights="weights.pt")
    make_trainer(tmp_path, limit_val_batches=1.0).validate(task, Pairs(), verbose=False)
    make_trainer(tmp_path).test(task, Pairs(), verbose=False)
    assert calls == []
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(task, Pairs())
    assert calls == [(task.network, "weights.pt")]
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    make_trainer(tmp_path, max_epochs=3).fit(task, Pairs(), ckpt_path=tmp_path / "some.ckpt", weights_only=True)
    assert len(calls) == 1


def test_weights_of_another_run_are_taken(tmp_path):
    before, after = make_task(RedFinder(trained=True)), make_task(RedFinder())
    make_trainer(tmp_path).fit(before, Pairs())
    trainer = make_trainer(tmp_path)
    trainer.strategy.connect(before)
    trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    after.initial_weights = str(tmp_path / "some.ckpt")
    after.load_initial_weights()
    for name, value in before.network.state_dict().items():
        assert torch.equal(after.network.state_dict()[name], value), name


CYCLE = {"schedule": "one_cycle", "warmup_share": 0.25}
FALLS = {"schedule": "steps", "milestones": [2]}


@pytest.mark.parametrize(
    ("begun", "changed", "said"),
    [
        ({}, {"peak_lr": 0.002}, "peak_lr 0.002, .* begun with .*peak_lr 0.001,"),
        ({}, {"weight_decay": 0.5}, "weight_decay 0.5, .* begun with .*weight_decay 0,"),
        ({}, {"optimizer": "adamw"}, "optimizer adamw, .* begun with optimizer adam,"),
        ({}, CYCLE, "schedule one_cycle, .* begun with .*schedule constant,"),
        ({}, {"batch_size": 3}, "pairs per step 3, .* begun with .*pairs per step 2,"),
        ({}, {"num_train": 7}, "steps per epoch 4 .* begun with .*steps per epoch 6;"),
        (CYCLE, {"num_train": 7, "max_epochs": 3}, "steps per epoch 4, .* begun with .*steps per epoch 6,"),
        ({}, {"loss_weights": (1, 1, 1)}, r"loss_weights \[1, 1, 1\], .* begun with .*loss_weights \[0.5, 0.7, 1.0\],"),
        (CYCLE, {"max_epochs": 5}, "steps 30, .* begun with .*steps 12,"),
        (CYCLE, {"warmup_share": 0.5}, "warmup_share 0.5 .* begun with .*warmup_share 0.25;"),
        (FALLS, {"milestones": [3]}, r"milestones \[3\], .* begun with .*milestones \[2\],"),
        (FALLS, {"gamma": 0.5}, "gamma 0.5 .* begun with .*gamma 0.1;"),
    ],
    ids=str,
)
def test_a_resumed_run_must_keep_its_schedule(tmp_path, begun, changed, said):
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(make_task(**begun), Pairs())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    changed = dict(changed)
    data = Pairs(batch_size=changed.pop("batch_size", 2), num_train=changed.pop("num_train", 11))
    epochs = changed.pop("max_epochs", 2)
    with pytest.raises(ValueError, match=f"^a resumed run must keep its schedule, got .*{said}"):
        make_trainer(tmp_path, max_epochs=epochs).fit(
            make_task(**{**begun, **changed}), data, ckpt_path=tmp_path / "some.ckpt", weights_only=True
        )


def test_a_constant_rate_may_go_on_for_longer(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit(make_task(), Pairs())
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    recorder = Recorder()
    make_trainer(tmp_path, recorder, max_epochs=3).fit(
        make_task(), Pairs(), ckpt_path=tmp_path / "some.ckpt", weights_only=True
    )
    assert len(recorder.rates) == 12


# Several processes.

TWO_PROCESSES = """
import importlib.util, json, sys

spec = importlib.util.spec_from_file_location("this_test", sys.argv[1])
this_test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(this_test)
task = this_test.make_task(this_test.RedFinder(trained=True))
trainer = this_test.make_trainer(sys.argv[2], strategy="ddp_fork", devices=2)
trainer.test(task, this_test.Pairs(num_val=6), verbose=False)
print(json.dumps({name: float(value) for name, value in trainer.callback_metrics.items()}))
"""


def test_two_processes_measure_what_one_does(tmp_path):
    words = [sys.executable, "-W", "ignore", "-c", TWO_PROCESSES, __file__, str(tmp_path / "two")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    logged = json.loads(done.stdout.splitlines()[-1])
    make_trainer(tmp_path / "one").test(make_task(RedFinder(trained=True)), Pairs(num_val=6), verbose=False)
    one, two = (json.loads((tmp_path / name / "statistics.json").read_text()) for name in ("one", "two"))
    assert two == {name: value if isinstance(value, str) else pytest.approx(value) for name, value in one.items()}
    assert two["frames"] == 6
    assert logged["test/epe"] == pytest.approx(two["epe"])


# PSMNet itself.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_psmnet_with_attention_is_trained_and_measured(tmp_path, precision):
    torch.manual_seed(0)
    network = PSMNet(MOST, lambda dim: EfficientAttention3d(dim), channels=4, num_blocks=(1, 1, 1, 1))
    before = [weight.clone() for weight in network.parameters()]
    recorder = Recorder()
    trainer = make_trainer(
        tmp_path, recorder, limit_val_batches=1.0, logger=CSVLogger(tmp_path), log_every_n_steps=1, precision=precision
    )
    data = Pairs(num_train=4, num_val=1)
    for one in (*data.train, *data.val):
        for name in ("left", "right", "disparity", "valid"):
            one[name] = one[name].repeat_interleave(3, -1).repeat_interleave(3, -2)
    trainer.fit(make_task(network), data)
    assert all(math.isfinite(loss) for loss in recorder.losses)
    assert 0 < float(trainer.callback_metrics["val/epe"]) < MOST
    changed = [not torch.equal(old, new.to(old)) for old, new in zip(before, network.parameters())]
    assert sum(changed) > 0.9 * len(changed)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_truths_are_not_rounded(tmp_path, precision):
    """Half precision would round a disparity of 60.3 pixels to 60.25, in what is measured too."""
    sentence = (
        rf"^precision must keep disparities in 32 bits or more, got {precision}, .*; set --trainer\.precision bf16-m"
    )
    for call in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match=sentence):
            getattr(make_trainer(tmp_path, precision=precision), call)(make_task(), datamodule=Pairs())


# By the command line, on the pair that ships.

# 7 crops in batches of 2 are 3 batches: the run ends within its third epoch.
STEPS = 8


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("motorcycle")
    networks = ModuleType("networks_of_this_test")
    networks.RedFinder = RedFinder
    path = folder / "motorcycle.yaml"
    path.write_text(f"""\
seed_everything: 0
model:
  class_path: lineara.tasks.stereo_depth.StereoDepth
  init_args:
    max_disparity: {MOST}
    peak_lr: 0.5
    schedule: one_cycle
    network:
      class_path: networks_of_this_test.RedFinder
data:
  class_path: lineara.tasks.stereo_depth.MotorcycleData
  init_args:
    data_root: {folder / "set"}
    samples_per_epoch: 7
    batch_size: 2
    augmentation:
      class_path: lineara.tasks.stereo_depth.transforms.Augmentation
      init_args:
        crop_height: 23
        crop_width: 41
        vertical_flip: 0.5
        brightness: 0.3
checkpoint:
  monitor: val/epe
  mode: min
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: 2
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, networks.__name__, networks)
        yield path


class StoppedError(Exception):
    """What ends a run early in these tests."""


@contextmanager
def recorded(stop_after=None):
    """What every training batch holds; `StoppedError` in place of the batch after so many."""
    batches = []
    step = StereoDepth.training_step

    def training_step(self, batch, batch_index):
        if len(batches) == stop_after:
            raise StoppedError
        batches.append([batch["left"].sum().item(), batch["disparity"][batch["valid"]].sum().item()])
        return step(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StereoDepth, "training_step", training_step)
        yield batches


def run(subcommand, recipe, run_dir, *words):
    return TrainingCommand([subcommand, "--config", str(recipe), "--run_dir", str(run_dir), *words])


def validations(run_dir):
    """(step, score) of each validation, over all starts of a run."""
    rows = []
    for path in sorted(run_dir.glob("metrics/version_*/metrics.csv")):
        with path.open(newline="") as file:
            rows += [(int(row["step"]), float(row["val/epe"])) for row in csv.DictReader(file) if row["val/epe"]]
    return rows


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A whole run: its folder, its batches, and its command."""
    run_dir = tmp_path_factory.mktemp("finished")
    with recorded() as batches:
        command = run("fit", recipe, run_dir)
    return run_dir, batches, command


@pytest.mark.parametrize(("stop_after", "checkpoint"), [(3, 2), (5, 4), (7, 6)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(recipe, finished, tmp_path, stop_after, checkpoint):
    run_dir, expected, whole = finished
    assert len(expected) == STEPS
    assert len({left for left, _ in expected}) == STEPS
    with recorded(stop_after) as before, pytest.raises(StoppedError):
        run("fit", recipe, tmp_path)
    with recorded() as after:
        resumed = run("fit", recipe, tmp_path, "--ckpt_path", "last")
    assert before == expected[:stop_after]
    assert after == expected[checkpoint:]
    assert validations(tmp_path) == validations(run_dir)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_the_best_checkpoint_is_tested_beside_the_trivial_answers(recipe, finished, capsys):
    run_dir = finished[0]
    run("validate", recipe, run_dir)
    scores = [score for _, score in validations(run_dir)]
    assert len(set(scores)) == 4
    validated = run("validate", recipe, run_dir).trainer.callback_metrics
    assert float(validated["val/epe"]) == pytest.approx(min(scores), rel=1e-5)
    capsys.readouterr()
    tested = run("test", recipe, run_dir).trainer.callback_metrics
    statistics = json.loads((run_dir / "statistics.json").read_text())
    assert float(tested["test/epe"]) == pytest.approx(statistics["epe"])
    assert set(statistics["trivial_answers"]) == {"constant_median", "block_matching"}
    assert statistics["trivial_answers"]["block_matching"]["epe"] < statistics["epe"]
    said = capsys.readouterr().out
    for line in (
        r"1 frame, protocol default, 37\.5% of the truths left out, .*$",
        "network  ",
        "constant_median  ",
        "block_matching  ",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE), line
    assert "Test metric" not in said
    assert (run_dir / "comparison.png").is_file()


# Of the files of a pair whose cameras are known.
ENDS = (".pfm", ".png", ".ply", "_depth.pfm", "_depth.png")


def test_pairs_are_predicted_and_broken_ones_reported(recipe, finished, tmp_path):
    run_dir = finished[0]
    for side in ("left", "right"):
        (tmp_path / side).mkdir()
        for number, name in enumerate(("a.png", "b.png", "c.png")):
            pixels = (frame(number)[side] * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(tmp_path / side / name)
    (tmp_path / "right/b.png").write_bytes(b"no image")
    (tmp_path / "left/d.png").write_bytes((tmp_path / "left/a.png").read_bytes())
    (tmp_path / "calib.txt").write_text("cam0=[500 0 9; 0 500 6; 0 0 1]\ndoffs=3\nbaseline=200\n")
    words = [f"--data.predict_{side}={tmp_path / side}" for side in ("left", "right")]
    with pytest.warns(RuntimeWarning) as caught:
        run("predict", recipe, run_dir, *words, f"--data.predict_calibration={tmp_path / 'calib.txt'}")
    said = " ".join(str(warning.message) for warning in caught)
    assert str(tmp_path / "right/b.png") in said
    assert str(tmp_path / "left/d.png") in said
    written = {path.name for path in (run_dir / "predictions").iterdir()}
    assert written == {f"{name}{end}" for name in "ac" for end in ENDS}
    task, _ = load_run(run_dir / "checkpoints/best.ckpt")
    assert isinstance(task, StereoDepth)
    disparity = read_pfm(run_dir / "predictions/c.pfm")
    assert disparity.shape == (HEIGHT, WIDTH)
    shift = disparity.astype(float) + 3
    expected = np.where(shift > 0, 100 / np.where(shift > 0, shift, 1), math.inf)
    np.testing.assert_allclose(read_pfm(run_dir / "predictions/c_depth.pfm"), expected, rtol=1e-4)
