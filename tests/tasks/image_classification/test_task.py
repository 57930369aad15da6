"""Loss, optimiser, schedule, scores, predictions, and runs of the training commands, over tiny sets."""

import csv
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from PIL import Image
from torch import nn

from lineara.cli import main
from lineara.nn import EfficientAttention2d
from lineara.runs.training import TrainingCommand, load_run
from lineara.tasks.image_classification import DigitsData, ImageClassification

# Advice that `lineara fit` silences too, and a remark about resumed runs, which do go on with the next batch.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]


class TinyNetwork(nn.Module):
    """Strided convolution, attention, dropout, classes: what a run has to keep, and little of it."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.attention = EfficientAttention2d(8, key_dim=5)
        self.dropout = nn.Dropout(0.1)
        self.fc = nn.Linear(8 * 16, num_classes)

    def forward(self, images):
        return self.fc(self.dropout(self.attention(self.stem(images))).flatten(1))


def make_task(**options):
    torch.manual_seed(0)
    return ImageClassification(TinyNetwork(), **({"num_classes": 10, "milestones": ()} | options))


def make_trainer(folder, *callbacks, **options):
    settings = {"limit_val_batches": 0, "logger": False, "max_epochs": 1, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


# 11 batches of 37 images make an epoch; 6 steps of 74, the last of 37.
def digits(**options):
    return DigitsData(**{"num_val": 150, "num_test": 1240, "upscale": 1, "batch_size": 37} | options)


class Recorder(Callback):
    """The learning rate of every batch, its loss, and what the loss is by definition."""

    def __init__(self, smoothing=0.0):
        self.rates, self.losses, self.expected, self.smoothing = [], [], [], smoothing

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        state = torch.get_rng_state()
        with torch.no_grad():
            kept = {name: weight.clone() for name, weight in pl_module.state_dict().items()}
            logits = pl_module.network(batch["image"])
            pl_module.load_state_dict(kept)  # what normalisation counts
        torch.set_rng_state(state)
        likelihood = logits - logits.logsumexp(dim=1, keepdim=True)
        right = likelihood[torch.arange(len(logits)), batch["label"]]
        self.expected.append(-((1 - self.smoothing) * right + self.smoothing * likelihood.mean(dim=1)).mean().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


# Training.


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_the_loss_is_cross_entropy_with_smoothed_targets(tmp_path, smoothing):
    recorder = Recorder(smoothing)
    make_trainer(tmp_path, recorder).fit(make_task(label_smoothing=smoothing), datamodule=digits())
    assert len(recorder.losses) == 11
    assert recorder.losses == pytest.approx(recorder.expected, rel=1e-4)


def test_optimiser_and_schedule(tmp_path):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder, max_epochs=5, accumulate_grad_batches=2)
    task = make_task(base_lr=0.3, milestones=[1, 3], gamma=0.2, warmup_steps=3)
    trainer.fit(task, datamodule=digits())
    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    [group] = optimizer.param_groups
    assert {name: group[name] for name in ("momentum", "weight_decay", "nesterov", "dampening")} == {
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": False,
        "dampening": 0,
    }
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in task.network.parameters()}
    peak = 0.3 * 2 * 37 / 256
    rise = [0.001 * peak, 0.334 * peak, 0.667 * peak]  # a third of the way in each of 3 steps
    first = [rate for rate in rise for _ in range(2)] + 5 * [peak]
    later = 22 * [0.2 * peak] + 22 * [0.04 * peak]
    assert recorder.rates == pytest.approx(first + later)


def test_accuracies_and_losses_are_means_over_the_split(tmp_path):
    data = digits(num_test=200)
    trainer = make_trainer(tmp_path, limit_val_batches=1.0)
    task = make_task(label_smoothing=0.2)
    trainer.fit(task, datamodule=data)
    validated = dict(trainer.callback_metrics)
    [tested] = trainer.test(task, datamodule=data, verbose=False)
    task.eval()
    for stage, logged in (("val", validated), ("test", tested)):
        batches = list(getattr(data, f"{stage}_dataloader")())
        with torch.no_grad():
            logits = torch.cat([task(batch["image"]) for batch in batches])
        label = torch.cat([batch["label"] for batch in batches])
        assert len(label) == {"val": 150, "test": 200}[stage] != 37 * (len(label) // 37)  # batches of different sizes
        rank = (logits > logits[torch.arange(len(label)), label][:, None]).sum(dim=1)
        assert float(logged[f"{stage}/accuracy"]) == pytest.approx((rank == 0).double().mean().item())
        assert float(logged[f"{stage}/accuracy_top5"]) == pytest.approx((rank < 5).double().mean().item())
        assert float(logged[f"{stage}/accuracy"]) < float(logged[f"{stage}/accuracy_top5"]) < 1
        loss = nn.functional.cross_entropy(logits, label).item()
        assert float(logged[f"{stage}/loss"]) == pytest.approx(loss, rel=1e-4)


def test_with_few_classes_the_top_5_are_all(tmp_path, write_set):
    recipe = write_recipe(tmp_path, write_set)
    command = run("fit", recipe, tmp_path / "run", "--trainer.max_epochs", "1")
    assert float(command.trainer.callback_metrics["val/accuracy_top5"]) == 1


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"milestones": [3, 2]}, r"milestones must be epochs from 1, each later than the last, got \[3, 2\]"),
        ({"milestones": [0]}, r"milestones must be epochs from 1, each later than the last, got \[0\]"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"base_lr": 0.0}, "base_lr must be a finite number above 0, got 0.0"),
        ({"momentum": -0.9}, "momentum must be a finite number of at least 0, got -0.9"),
        ({"weight_decay": -1.0}, "weight_decay must be a finite number of at least 0, got -1.0"),
        ({"label_smoothing": 1.5}, r"label_smoothing must lie in 0\.\.1, got 1.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must lie in 0\.\.1, got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        make_task(**wrong)


def test_numbers_of_classes_that_do_not_agree_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"^num_classes must be that of the data, got 9 and 10; set --model\.init_args"
    ):
        make_trainer(tmp_path).fit(make_task(num_classes=9), datamodule=digits())
    task = make_task()
    task.network = TinyNetwork(11)
    with pytest.raises(
        ValueError, match=r"^the network must have num_classes = 10 logits, got 11; set --model\.init_arg"
    ):
        make_trainer(tmp_path).fit(task, datamodule=digits())


# Runs by the training commands.

# 4 batches of 6 make an epoch.
CLASSES = {"n01": 8, "n02": 9, "n03": 8}


def write_recipe(folder, write_set, **data):
    if not (folder / "set").exists():
        write_set(folder / "set", train=CLASSES, val={"n01": 5, "n02": 5, "n03": 4})
    network = {"class_path": f"{TinyNetwork.__module__}.TinyNetwork", "init_args": {"num_classes": 3}}
    settings = {"image_size": 8, "resize_size": 9, "batch_size": 6, "num_workers": 0, "data_root": str(folder / "set")}
    recipe = {
        "seed_everything": 0,
        "model": {
            "class_path": "lineara.tasks.image_classification.ImageClassification",
            "init_args": {"num_classes": 3, "base_lr": 0.5, "milestones": [1], "network": network},
        },
        "data": {
            "class_path": "lineara.tasks.image_classification.ImageFolderData",
            "init_args": settings | data,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 3,
            "val_check_interval": 0.5,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def recipe(folder, write_set):
    return write_recipe(folder, write_set)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run from its beginning to its end: its folder, its batches and its weights."""
    run_dir = tmp_path_factory.mktemp("finished")
    with recorded() as batches:
        command = run("fit", recipe, run_dir)
    assert len(batches) == 12
    return run_dir, batches, {name: weight.clone() for name, weight in command.model.state_dict().items()}


def run(subcommand, recipe, run_dir, *words):
    return TrainingCommand([subcommand, "--config", str(recipe), "--run_dir", str(run_dir), *words])


class StoppedError(Exception):
    """What ends a run early in these tests."""


@contextmanager
def recorded(stop_after=None):
    """Epoch, pixels and labels of every training batch; `StoppedError` in place of the batch after so many."""
    batches = []
    step = ImageClassification.training_step

    def training_step(self, batch, batch_index):
        if len(batches) == stop_after:
            raise StoppedError
        batches.append((self.current_epoch, batch["image"].sum(dim=(1, 2, 3)).tolist(), batch["label"].tolist()))
        return step(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageClassification, "training_step", training_step)
        yield batches


@pytest.mark.parametrize(("stop_after", "checkpoint"), [(3, 2), (7, 6)])
def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(finished, recipe, tmp_path, stop_after, checkpoint):
    _, batches, weights = finished
    with recorded(stop_after) as before, pytest.raises(StoppedError):
        run("fit", recipe, tmp_path)
    assert before == batches[:stop_after]
    with recorded() as after:
        command = run("fit", recipe, tmp_path, "--ckpt_path", "last")
    assert after == batches[checkpoint:]
    for name, weight in command.model.state_dict().items():
        if "network" in name:
            torch.testing.assert_close(weight, weights[name], msg=name)


def test_the_checkpoint_tests_as_it_validated(finished, recipe):
    run_dir = finished[0]
    with (run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/accuracy"]]
    best = max(rows, key=lambda row: float(row["val/accuracy"]))
    tested = run("test", recipe, run_dir).trainer.callback_metrics  # on the validation split, as ImageNet's
    for name in ("accuracy", "accuracy_top5", "loss"):
        assert float(tested[f"test/{name}"]) == pytest.approx(float(best[f"val/{name}"]), rel=1e-5)
    assert len({row["val/loss"] for row in rows}) == 6


@pytest.fixture(scope="module")
def stopped(recipe, tmp_path_factory):
    """The folder of a run that was stopped in its first epoch."""
    run_dir = tmp_path_factory.mktemp("stopped")
    with recorded(3), pytest.raises(StoppedError):
        run("fit", recipe, run_dir)
    return run_dir


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.batch_size", "8"], "steps_per_epoch 3"),
        (["--model.init_args.base_lr", "0.25"], "lr 0.00585938, steps"),
        (["--model.init_args.milestones", "[2]"], r"milestones \[2\]"),
        (["--model.init_args.momentum", "0.5"], r"momentum 0\.5"),
        (["--model.init_args.weight_decay", "0.5"], r"weight_decay 0\.5"),
    ],
)
def test_a_resumed_run_keeps_its_schedule(stopped, recipe, words, named):
    sentence = (
        rf"^a resumed run must keep its schedule, got .*{named}.* but it was begun with lr 0\.0117188, "
        r"steps_per_epoch 4, milestones \[1\], gamma 0\.1, warmup_steps 0, momentum 0\.9, weight_decay 0\.0001; set"
    )
    with recorded() as batches, pytest.raises(ValueError, match=sentence):
        run("fit", recipe, stopped, "--ckpt_path", "last", *words)
    assert batches == []


def test_a_run_that_began_with_warm_up_resumes_with_it(recipe, tmp_path):
    words = ["--model.init_args.warmup_steps", "7"]
    with recorded(3), pytest.raises(StoppedError):
        run("fit", recipe, tmp_path, *words)
    command = run("fit", recipe, tmp_path, "--ckpt_path", "last", *words)
    assert command.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 * 6 / 256)


# Initial weights.


def test_initial_weights_begin_a_new_run_and_no_other(recipe, tmp_path):
    torch.manual_seed(7)
    given = TinyNetwork(3)
    torch.save(given.state_dict(), tmp_path / "weights.pth")
    words = ["--model.init_args.initial_weights", str(tmp_path / "weights.pth")]

    def starts(*more):
        seen = []

        def on_train_start(self):
            seen.append(self.network.fc.weight.clone())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageClassification, "on_train_start", on_train_start)
            run("fit", recipe, tmp_path / "run", *words, *more)
        return seen[0]

    assert torch.equal(starts("--trainer.max_epochs", "1"), given.fc.weight)
    (tmp_path / "weights.pth").unlink()
    resumed = starts("--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert not torch.equal(resumed, given.fc.weight)
    run("test", recipe, tmp_path / "run", *words)
    task, _ = load_run(tmp_path / "run/checkpoints/last.ckpt")
    assert not torch.equal(task.network.fc.weight, given.fc.weight)


def test_initial_weights_that_are_missing_are_named(recipe, tmp_path):
    path = tmp_path / "nowhere.pth"
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(str(path))} must be a file of weights"):
        run("fit", recipe, tmp_path / "run", "--model.init_args.initial_weights", str(path))


# Predictions.


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_of_a_folder_are_predicted_and_broken_ones_reported(finished, recipe, folder, tmp_path, write_set):
    run_dir = finished[0]
    images = tmp_path / "images"
    write_set(tmp_path, images={".": 0})
    for index, name in enumerate(("n03_1.png", "n01_2.png", "n02_0.png")):
        (images / f"{index} {name}").write_bytes((folder / "set/val" / name[:3] / name).read_bytes())
    for index in range(6):  # a whole batch, and one of the next
        (images / f"0 broken {index}.png").write_bytes(b"text")
    with pytest.warns(RuntimeWarning) as caught:
        run("predict", recipe, run_dir, "--data.predict_folder", str(images))
    said = sorted(message for warning in caught if "left out" in (message := str(warning.message)))
    assert len(said) == 6
    expected = (
        f"{images / '0 broken 0.png'} must be an image that can be read, got no image that Pillow knows; it is left out"
    )
    assert said[0] == expected
    rows = rows_of(run_dir / "predictions.csv")
    assert list(rows[0]) == ["file", "class", "probability"]
    assert [row["file"] for row in rows] == ["0 n03_1.png", "1 n01_2.png", "2 n02_0.png"]
    task, data = load_run(run_dir / "checkpoints/best.ckpt")
    for row in rows:
        image, _ = data.photograph(Image.open(images / row["file"]))
        with torch.no_grad():
            probability = task(image[None]).softmax(dim=1)[0]
        assert row["class"] == f"n0{int(probability.argmax()) + 1}"
        assert float(row["probability"]) == pytest.approx(float(probability.max()), abs=6e-5)


def test_the_network_can_be_used_where_its_training_set_is_not(finished, recipe, folder, tmp_path):
    run_dir = finished[0]
    words = ["--data.predict_folder", str(folder / "set/val/n01"), "--data.data_root", str(tmp_path)]
    run("predict", recipe, run_dir, *words)
    assert {row["class"] for row in rows_of(run_dir / "predictions.csv")} <= CLASSES.keys()


def test_a_test_on_other_classes_is_refused(finished, recipe, tmp_path, write_set):
    write_set(tmp_path, val={"n01": 1, "n02": 1, "n07": 1})
    sentence = (
        r"^the classes of the data must be those that the network was trained on, got n07 but n03 for class 2; name the"
    )
    with pytest.raises(ValueError, match=sentence):
        run("test", recipe, finished[0], "--data.data_root", str(tmp_path))


# Broken images.


@pytest.fixture
def damaged(tmp_path, write_set):
    """A recipe over a set of which the first image of every class is broken."""
    recipe = write_recipe(tmp_path, write_set)
    for path in (tmp_path / "set").rglob("*_0.png"):
        path.write_bytes(path.read_bytes()[:60])
    return recipe


def test_a_broken_image_ends_the_command_with_one_sentence(damaged, tmp_path, capsys):
    words = ["--config", str(damaged), "--run_dir", str(tmp_path / "run"), "--data.num_workers", "1"]
    assert main(["fit", *words]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lineara: error")]
    pattern = r"lineara: error: .*/n0\d_0\.png must be an image that can be read, got .*; mend or remove it, or .*"
    assert re.fullmatch(pattern, line)


def test_broken_images_are_left_out_when_told(damaged, tmp_path):
    words = ["--data.skip_broken", "true", "--trainer.max_epochs", "2"]
    with recorded() as batches, pytest.warns(RuntimeWarning, match="it is left out") as caught:
        run("fit", damaged, tmp_path / "run", *words)
    assert 4 <= len({str(warning.message) for warning in caught if "left out" in str(warning.message)}) <= 6
    sizes = [len(labels) for _, _, labels in batches]
    assert len(sizes) == 8
    assert min(sizes) < 6
    assert sum(sizes) >= 2 * (24 - 3)


def test_a_batch_of_broken_images_alone_is_passed_over(tmp_path, write_set):
    recipe = write_recipe(tmp_path, write_set, skip_broken=True)
    for path in (tmp_path / "set").rglob("n0[12]_*.png"):
        path.write_bytes(b"")
    with pytest.warns(RuntimeWarning), recorded() as batches:
        command = run("fit", recipe, tmp_path / "run", "--data.batch_size", "1", "--trainer.max_epochs", "1")
    assert sum(labels == [] for _, _, labels in batches) == 17
    assert float(command.trainer.callback_metrics["val/accuracy"]) in (0.0, 1.0)


def test_what_a_run_writes(finished):
    names = {path.relative_to(finished[0]).as_posix() for path in Path(finished[0]).rglob("*.*") if path.is_file()}
    assert names >= {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics/version_0/metrics.csv"}
