"""The training commands over a tiny ListOps set: what a run leaves behind, how it goes on, what its checkpoints are."""

import csv
import errno
import fcntl
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchvision
import yaml
from torch.nn.functional import cross_entropy

from lineara.cli import _users_mistake
from lineara.nn import SoftmaxAttention
from lineara.runs.checkpoints import AtomicCheckpointIO, check_usable
from lineara.runs.run_folder import folder_lock
from lineara.runs.training import TrainingCommand, begin_run, load_run
from lineara.tasks.long_range_arena import SequenceClassification

# Advice that `lineara fit` silences too, two remarks about resumed runs, which do go on with the next batch, and what
# Lightning's command line still calls of jsonargparse.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]

# 10 batches make an epoch: the run ends within its third one.
STEPS, BATCHES, VALIDATE_EVERY = 26, 10, 5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Several threads round differently from process to process, and a key's bias is moved by rounding alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe beside its data, with dropout: the order of batches is not all that is random."""
    folder = tmp_path_factory.mktemp("recipe")
    path = folder / "tiny.yaml"
    path.write_text(f"""\
seed_everything: 0
model:
  class_path: lineara.tasks.long_range_arena.SequenceClassification
  init_args:
    peak_lr: 1.0e-1
    warmup_steps: 3
    network:
      class_path: lineara.models.SequenceClassifier
      init_args:
        vocab_size: 16
        num_classes: 10
        max_len: 30
        dim: 8
        mlp_dim: 8
        head_dim: 8
        dropout: 0.1
        attention:
          class_path: lineara.nn.EfficientAttention
          init_args:
            num_heads: 2
data:
  class_path: lineara.tasks.long_range_arena.ListOpsData
  init_args:
    data_root: {folder}
    num_train: 200
    num_val: 40
    num_test: 40
    min_len: 5
    max_len: 30
    batch_size: 20
    num_workers: 1
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  val_check_interval: {VALIDATE_EVERY}
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  log_every_n_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
""")
    return path


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    """A run from its beginning to its end without interruption, and the batches it was given."""
    run_dir = tmp_path_factory.mktemp("finished")
    with recorded() as batches:
        command = run("fit", recipe, run_dir)
    assert len(batches) == STEPS
    return Finished(run_dir, batches, {name: weight.clone() for name, weight in command.model.state_dict().items()})


class Finished(NamedTuple):
    run_dir: Path
    batches: list
    weights: dict


def run(subcommand, recipe, run_dir, *words):
    return TrainingCommand([subcommand, "--config", str(recipe), "--run_dir", str(run_dir), *words])


class StoppedError(Exception):
    """What ends a run early in these tests."""


@contextmanager
def recorded(stop_after=None):
    """The epoch, tokens and labels of every training batch; `StoppedError` in place of the batch after so many."""
    batches = []
    step = SequenceClassification.training_step

    def training_step(self, batch, batch_index):
        if len(batches) == stop_after:
            raise StoppedError
        batches.append((self.current_epoch, batch["tokens"].tolist(), batch["label"].tolist()))
        return step(self, batch, batch_index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SequenceClassification, "training_step", training_step)
        yield batches


def read(checkpoint):
    return torch.load(checkpoint, weights_only=True)


def last_of(run_dir):
    return read(run_dir / "checkpoints" / "last.ckpt")


def assert_same_weights(one, other):
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def answers(task, data, split):
    """Logits and labels over a split, in the order of its loader."""
    data.prepare_data()
    data.setup("test")
    task.eval()
    with torch.no_grad():
        pairs = [(task(batch), batch["label"]) for batch in getattr(data, f"{split}_dataloader")()]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


# What a run leaves behind.


def test_a_run_folder_holds_checkpoints_recipe_and_logs(finished):
    run_dir = finished.run_dir
    names = {path.relative_to(run_dir).as_posix() for path in run_dir.rglob("*") if path.is_file()}
    [events] = [name for name in names if name.startswith("tensorboard/version_0/events.out.tfevents")]
    assert names >= {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics/version_0/metrics.csv"}
    assert (run_dir / events).stat().st_size > 0
    assert not list(run_dir.rglob("*.tmp"))


def test_metrics_are_logged_at_every_validation_and_every_few_steps(finished):
    run_dir = finished.run_dir
    with (run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train/loss", "train/accuracy"):
        assert [int(row["step"]) for row in rows if row[name]] == list(range(1, STEPS, 2))
    validated = [row for row in rows if row["val/accuracy"]]
    assert [int(row["step"]) for row in validated] == [4, 9, 14, 19, 24]
    for row in validated:
        assert 0 < float(row["val/accuracy_of_majority_class"]) <= float(row["val/accuracy_of_root_operator"]) < 1
        assert float(row["val/loss"]) > 0


def test_the_written_recipe_means_the_same_as_the_one_given(finished, recipe):
    run_dir = finished.run_dir
    written, given = (
        TrainingCommand(["--config", str(path), "--run_dir", "same"], run=False, instantiate=False).config
        for path in (run_dir / "config.yaml", recipe)
    )
    written, given = written.as_dict(), given.as_dict()
    assert written.pop("config") != given.pop("config")
    assert written == given
    assert read(run_dir / "checkpoints/best.ckpt")["lineara_recipe"] == (run_dir / "config.yaml").read_text()


def test_the_written_recipe_names_its_run_folder(finished):
    run_dir = finished.run_dir
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run_dir"] == str(run_dir)


def test_best_is_kept_and_last_is_the_newest_whether_better_or_not(recipe, tmp_path):
    run("fit", recipe, tmp_path, "--model.init_args.peak_lr", "1e-12")  # nothing is learned: the first is the best
    assert read(tmp_path / "checkpoints/best.ckpt")["global_step"] == VALIDATE_EVERY
    assert last_of(tmp_path)["global_step"] >= STEPS // VALIDATE_EVERY * VALIDATE_EVERY


def test_best_is_the_checkpoint_of_highest_validation_accuracy(finished):
    run_dir = finished.run_dir
    with (run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        accuracies = {
            int(row["step"]) + 1: float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]
        }
    assert len(set(accuracies.values())) > 1
    best = read(run_dir / "checkpoints/best.ckpt")["global_step"]
    assert accuracies[best] == max(accuracies.values())


# Starting again, and going on.


@pytest.mark.parametrize("words", [[], ["--trainer.max_steps", "50"]])
def test_a_run_is_not_overwritten(finished, recipe, words):
    run_dir = finished.run_dir
    before = contents(run_dir)
    with (
        recorded() as batches,
        pytest.raises(ValueError, match=r"^run_dir must be a folder without a run, got ") as error,
    ):
        run("fit", recipe, run_dir, *words)
    assert "--ckpt_path last" in str(error.value)
    assert str(run_dir) in str(error.value)
    assert contents(run_dir) == before
    assert batches == []


def test_a_folder_that_another_run_is_writing_to_is_left_alone(recipe, tmp_path):
    with (tmp_path / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        sentence = r"^run_dir must be a folder that no other `lineara fit` is writing to, got "
        with recorded() as batches, pytest.raises(ValueError, match=sentence):
            run("fit", recipe, tmp_path)
    assert batches == []
    assert not list(tmp_path.rglob("*.ckpt"))


def test_what_a_killed_run_had_half_written_is_removed(recipe, tmp_path):
    half = tmp_path / "checkpoints" / ".best-killed.ckpt"
    half.parent.mkdir()
    half.write_bytes(b"half of a checkpoint")
    run("fit", recipe, tmp_path, "--trainer.max_steps", "6")
    assert sorted(path.name for path in half.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(finished, recipe, tmp_path, monkeypatch):
    write = Path.write_bytes

    def fill_the_disk(path, content):
        if torch.load(io.BytesIO(content), weights_only=True)["global_step"] > 12:
            write(path, b"half of a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="No space left on device"):
        run("fit", recipe, tmp_path)
    monkeypatch.undo()
    assert last_of(tmp_path)["global_step"] == 10
    with recorded() as after:
        run("fit", recipe, tmp_path, "--ckpt_path", "last")
    assert after == finished.batches[10:]


def test_going_on_where_nothing_is_yet_starts_from_the_beginning(finished, recipe, tmp_path):
    with recorded() as batches:
        run("fit", recipe, tmp_path, "--ckpt_path", "last", "--trainer.max_steps", "6")
    assert batches == finished.batches[:6]


def test_a_run_cannot_be_made_longer_later(recipe, tmp_path):
    with recorded(7), pytest.raises(StoppedError):
        run("fit", recipe, tmp_path)
    sentence = (
        r"^a resumed run must keep its number of steps, got 50 but it was begun with 26; set --trainer\.max_steps 26"
    )
    with recorded() as batches, pytest.raises(ValueError, match=sentence):
        run("fit", recipe, tmp_path, "--ckpt_path", "last", "--trainer.max_steps", "50")
    assert batches == []


def test_a_trial_of_one_step_leaves_no_checkpoint(recipe, tmp_path):
    with recorded() as batches:
        run("fit", recipe, tmp_path, "--trainer.fast_dev_run", "true")
    assert len(batches) == 1
    assert not list(tmp_path.rglob("*.ckpt"))


ONCE_PER_EPOCH = ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]
TWICE_PER_EPOCH = ["--trainer.val_check_interval", "0.5", "--trainer.check_val_every_n_epoch", "1"]


@pytest.mark.parametrize(
    ("words", "stop_after", "checkpoint"),
    [
        ([], 7, 5),  # in the middle of the first epoch
        ([], 16, 15),  # in the middle of a later one
        ([], 10, 10),  # exactly at an epoch's end
        ([], 13, 10),  # its checkpoint is at an epoch's end, it is not
        (TWICE_PER_EPOCH, 23, 20),
        (ONCE_PER_EPOCH, 13, 10),
        (ONCE_PER_EPOCH, 20, 20),
    ],
    ids=str,
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(finished, recipe, tmp_path, words, stop_after, checkpoint):
    with recorded(stop_after) as before, pytest.raises(StoppedError):
        run("fit", recipe, tmp_path, *words)
    assert before == finished.batches[:stop_after]
    assert last_of(tmp_path)["global_step"] == checkpoint
    with recorded() as after:
        command = run("fit", recipe, tmp_path, "--ckpt_path", "last", *words)
    assert command.trainer.global_step == STEPS
    assert len(after) == STEPS - checkpoint
    assert after == finished.batches[checkpoint:]
    assert_same_weights(command.model.state_dict(), finished.weights)
    assert (tmp_path / "metrics/version_1/metrics.csv").exists()


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(finished, recipe, tmp_path):
    script = """
import os, signal, sys
from lineara.cli import main
from lineara.tasks.long_range_arena import SequenceClassification

step = SequenceClassification.training_step

def training_step(self, batch, batch_index):
    if self.global_step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_index)

SequenceClassification.training_step = training_step
sys.exit(main())
"""
    words = ["fit", "--config", str(recipe), "--run_dir", str(tmp_path)]
    killed = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    start = last_of(tmp_path)["global_step"]
    assert start == 10
    with recorded() as after:
        command = run("fit", recipe, tmp_path, "--ckpt_path", "last")
    assert command.trainer.global_step == STEPS
    assert after == finished.batches[start:]
    # The killed process may round otherwise than this one, and a key's bias is moved by rounding alone: it cancels in
    # the softmax over positions.
    for name, weight in command.model.state_dict().items():
        if not name.endswith("key.bias"):
            torch.testing.assert_close(weight, finished.weights[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_resumed_run_remembers_its_best_checkpoint(recipe, tmp_path):
    words = ["--model.init_args.peak_lr", "1e-12"]  # nothing is learned: the first is the best
    with recorded(13), pytest.raises(StoppedError):
        run("fit", recipe, tmp_path, *words)
    best = (tmp_path / "checkpoints/best.ckpt").read_bytes()
    run("fit", recipe, tmp_path, "--ckpt_path", "last", *words)
    assert (tmp_path / "checkpoints/best.ckpt").read_bytes() == best


# Reading checkpoints.


def test_test_and_validate_measure_the_best_checkpoint(finished, recipe):
    best = finished.run_dir / "checkpoints/best.ckpt"
    for subcommand, split in (("test", "test"), ("validate", "val")):
        measured = run(subcommand, recipe, finished.run_dir).trainer.callback_metrics
        logits, labels = answers(*load_run(best), split)
        assert len(labels) == 40
        assert float(measured[f"{split}/accuracy"]) == pytest.approx((logits.argmax(dim=1) == labels).float().mean())
        assert float(measured[f"{split}/loss"]) == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-5)
    with (finished.run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        logged = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert float(measured["val/accuracy"]) == pytest.approx(max(logged))


def test_another_checkpoint_can_be_named(finished, recipe, tmp_path):
    paths = {
        "best": "best",
        "last": "last",
        str(shutil.copy(finished.run_dir / "checkpoints/last.ckpt", tmp_path)): "last",
    }
    losses = {}
    for given, meant in paths.items():
        command = run("test", recipe, finished.run_dir, "--ckpt_path", given)
        weights = read(finished.run_dir / f"checkpoints/{meant}.ckpt")["state_dict"]
        assert_same_weights(command.model.state_dict(), weights)
        losses.setdefault(meant, float(command.trainer.callback_metrics["test/loss"]))
    assert losses["best"] != losses["last"]


def test_testing_leaves_the_run_as_it_is(finished, recipe):
    before = contents(finished.run_dir)
    run("test", recipe, finished.run_dir)
    assert contents(finished.run_dir) == before


def test_predict_writes_what_the_best_checkpoint_answers(finished, recipe):
    run_dir = finished.run_dir
    run("predict", recipe, run_dir)
    with (run_dir / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    logits, labels = answers(*load_run(run_dir / "checkpoints/best.ckpt"), "predict")
    probabilities, predicted = logits.softmax(dim=1).max(dim=1)
    assert [int(row["prediction"]) for row in rows] == predicted.tolist()
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [float(row["probability"]) for row in rows] == pytest.approx(probabilities.tolist(), abs=6e-5)


def test_a_checkpoint_alone_rebuilds_its_network_and_its_data(finished, tmp_path):
    checkpoint = shutil.copy(finished.run_dir / "checkpoints/best.ckpt", tmp_path / "alone.ckpt")
    task, data = load_run(checkpoint)
    assert isinstance(task, SequenceClassification)
    assert not any(module.training for module in task.modules())
    assert_same_weights(task.state_dict(), read(checkpoint)["state_dict"])
    assert task.network.blocks[0].attention.num_heads == 2
    assert (task.peak_lr, task.warmup_steps) == (1e-1, 3)
    assert (data.batch_size, data.num_train, data.num_val, data.num_test) == (20, 200, 40, 40)
    assert [path.name for path in tmp_path.iterdir()] == ["alone.ckpt"]


# What is no checkpoint of ours.


class Malicious:
    """What would make a folder when it is unpickled without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def missing(good, path):
    return "must be a checkpoint, got no such file; train first with `lineara fit`, or name another file"


def empty(good, path):
    path.touch()
    return "must be a whole checkpoint of lineara, got a file that torch cannot read"


def cut_short(good, path):
    path.write_bytes(good.read_bytes()[:3000])
    return "must be a whole checkpoint of lineara, got a file that torch cannot read"


def no_checkpoint_at_all(good, path):
    path.write_text("trainer:\n  max_steps: 26\n")
    return "must be a whole checkpoint of lineara, got a file that torch cannot read"


def malicious(good, path):
    torch.save(read(good) | {"state_dict": Malicious(path.with_name("made"))}, path)
    return "must be a whole checkpoint of lineara, got a file that torch cannot read"


def weights_alone(good, path):
    torch.save(read(good)["state_dict"], path)
    return "must be a checkpoint written by `lineara fit`, got one without a recipe inside"


def one_tensor(good, path):
    torch.save(torch.ones(3), path)
    return "must be a checkpoint written by `lineara fit`, got one without a recipe inside"


@pytest.mark.parametrize(
    "spoil",
    [missing, empty, cut_short, no_checkpoint_at_all, malicious, weights_alone, one_tensor],
    ids=lambda spoil: spoil.__name__,
)
@pytest.mark.parametrize("use", ["fit", "test", "load_run"])
def test_what_is_no_checkpoint_is_refused_in_one_sentence_and_runs_nothing(finished, recipe, tmp_path, spoil, use):
    path, run_dir = tmp_path / "given.ckpt", tmp_path / "run"
    sentence = spoil(finished.run_dir / "checkpoints/best.ckpt", path)
    command = load_run if use == "load_run" else partial(run, use, recipe, run_dir, "--ckpt_path")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        command(str(path))
    assert str(error.value) == f"{path} {sentence}"
    assert {entry.name for entry in tmp_path.iterdir()} <= {"given.ckpt"}


def without_a_weight(content):
    del content["state_dict"]["network.head.2.bias"]
    return "one without the weight network.head.2.bias"


def with_a_weight_of_another_shape(content):
    content["state_dict"]["network.head.2.weight"] = torch.ones(10, 3)
    return r"one whose weight network.head.2.weight has the shape (10, 3), not (10, 8)"


def with_a_foreign_weight(content):
    content["state_dict"]["network.tail"] = torch.ones(3)
    return "one with the weight network.tail, which the network has not"


def without_weights(content):
    del content["state_dict"]
    return "one without weights"


def without_random_state(content):
    del content["lineara_random_state"]
    return "one without lineara_random_state"


def with_a_random_state_of_another_kind(content):
    content["lineara_random_state"] = torch.ones(7)
    return "one whose lineara_random_state is none of torch"


def without_loops(content):
    del content["loops"]
    return "one without loops"


def with_empty_loops(content):
    content["loops"] = {}
    return "one whose loops are not those of a run"


def with_a_recipe_that_is_no_yaml(content):
    content["lineara_recipe"] = "model: [1, 2"
    return "one whose recipe cannot be read"


def with_a_recipe_without_a_model(content):
    content["lineara_recipe"] = "data: 3"
    return "one whose recipe cannot be read"


UNFIT = [without_a_weight, with_a_weight_of_another_shape, with_a_foreign_weight, without_weights, with_empty_loops]
RECIPES = [with_a_recipe_that_is_no_yaml, with_a_recipe_without_a_model]
REST = [without_random_state, with_a_random_state_of_another_kind, without_loops]


@pytest.fixture(scope="module")
def task(finished):
    return load_run(finished.run_dir / "checkpoints/best.ckpt")[0]


@pytest.mark.parametrize("spoil", UNFIT + REST, ids=lambda spoil: spoil.__name__)
def test_a_checkpoint_that_lacks_something_is_refused_in_one_sentence(finished, task, tmp_path, spoil):
    path = tmp_path / "given.ckpt"
    content = read(finished.run_dir / "checkpoints/last.ckpt")
    sentence = spoil(content)
    torch.save(content, path)
    for to_go_on in (True, False):
        if not to_go_on and spoil in REST:  # which only a run that goes on needs
            check_usable(path, task, to_go_on=to_go_on)
            continue
        with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
            check_usable(path, task, to_go_on=to_go_on)
        assert str(error.value).startswith(f"{path} must be a checkpoint ")
        assert f"got {sentence}; name another one" in str(error.value)


@pytest.mark.parametrize("spoil", [without_a_weight, *RECIPES], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("use", ["fit", "test", "load_run"])
def test_whoever_reads_a_checkpoint_that_lacks_something_refuses_it(finished, recipe, tmp_path, use, spoil):
    path, run_dir = tmp_path / "given.ckpt", tmp_path / "run"
    content = read(finished.run_dir / "checkpoints/last.ckpt")
    sentence = spoil(content)
    torch.save(content, path)
    command = load_run if use == "load_run" else partial(run, use, recipe, run_dir, "--ckpt_path")
    with pytest.raises(ValueError, match=sentence):
        command(str(path))
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["strategy", "dpp"], r"^strategy must be auto, ddp, fsdp or .* got dpp; set --trainer\.strategy ddp or fsdp$"),
        (["strategy", "ddp_spawn"], r"^strategy must be .* that starts the command again .* got ddp_spawn; set"),
        (["strategy", "torch.nn.Linear"], r"^strategy must be .* got torch\.nn\.Linear; set"),  # as it was written
        (["accelerator", "gpus"], r"^the trainer's options must be ones that can be had here, got accelerator gpus, "),
        (["devices", "foo"], r"^the trainer's options must .* devices foo, .*; see `lineara fit --help`$"),
        (["devices", "-2"], r"^the trainer's options must .* devices -2, "),
        (["num_nodes", "0"], r"^the trainer's options must .* num_nodes 0, .*\(`num_nodes` must be a positive integer"),
    ],
    ids=str,
)
def test_options_of_the_trainer_that_cannot_be_had_are_refused_in_one_sentence(recipe, tmp_path, words, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        run("fit", recipe, tmp_path / "run", f"--trainer.{words[0]}", words[1])
    assert "\n" not in str(error.value)
    assert _users_mistake(error.value) is error.value
    assert not (tmp_path / "run").exists()


def test_the_malicious_checkpoint_would_do_harm(finished, tmp_path):
    path = tmp_path / "given.ckpt"
    malicious(finished.run_dir / "checkpoints/best.ckpt", path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").is_dir()


def test_without_a_run_there_is_nothing_to_test(recipe, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"best\.ckpt must be a checkpoint, got no such file; train first with"):
        run("test", recipe, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--model.init_args.network.init_args.dim", "16"],
        ["--model.init_args.network.init_args.num_layers", "1"],
        ["--model.init_args.network.init_args.attention", "lineara.nn.SoftmaxAttention"],
    ],
    ids=str,
)
@pytest.mark.parametrize("subcommand", ["test", "fit"])
def test_a_checkpoint_of_another_network_is_refused_in_one_sentence(finished, recipe, tmp_path, subcommand, words):
    best = finished.run_dir / "checkpoints/best.ckpt"
    with pytest.raises(ValueError, match=r"^the recipe must describe the network of ") as error:
        run(subcommand, recipe, tmp_path / "run", "--ckpt_path", str(best), *words)
    assert str(best) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_another_attention_comes_with_its_own_defaults():
    recipes = Path(__file__).parents[2] / "recipes/long_range_arena"
    for words in (
        ["--config", str(recipes / "listops_softmax.yaml")],
        [
            "--config",
            str(recipes / "listops_efficient.yaml"),
            "--model.network.attention",
            "lineara.nn.SoftmaxAttention",
        ],
    ):
        command = TrainingCommand(words, run=False)
        layer = command.model.network.blocks[0].attention
        assert isinstance(layer, SoftmaxAttention)
        assert layer.scale is None
        assert layer.num_heads == 2


def test_a_network_can_be_looked_into_where_its_recipe_could_not_be_trained(tmp_path):
    recipe = Path(__file__).parents[2] / "recipes/image_classification/digits.yaml"
    settings = yaml.safe_load(recipe.read_text())
    plain = torchvision.models.resnet18(num_classes=10)
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    settings["model"]["init_args"]["initial_weights"] = str(tmp_path / "plain.pth")
    settings["trainer"] |= {"accelerator": "gpu", "devices": 8, "strategy": "ddp", "precision": "16-mixed"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    task, data = begin_run(tmp_path / "recipe.yaml")
    assert not task.training
    assert type(data).__name__ == "DigitsData"
    assert torch.equal(task.network.layer4[0].conv1.weight, plain.layer4[0].conv1.weight)
    assert task.network.get_submodule("layer2.attention").num_heads


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "best.ckpt"
    path.write_bytes(b"the old one")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"best\.ckpt must be writable, got .*; free some space"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"the old one"
    assert [name.name for name in tmp_path.iterdir()] == ["best.ckpt"]


def test_a_folder_that_a_run_is_writing_to_is_refused(tmp_path):
    with (
        folder_lock(tmp_path),
        pytest.raises(ValueError, match="that no other `lineara fit` is writing to"),
        folder_lock(tmp_path),
    ):
        pass
    with folder_lock(tmp_path):
        pass
