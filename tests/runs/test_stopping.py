"""Runs that a signal ends early, with their checkpoints in order."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch

from lineara.runs.training import TrainingCommand
from lineara.tasks.long_range_arena import SequenceClassification

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]
STEPS = 23


def fit(recipe, run_dir, *words):
    return TrainingCommand(["fit", "--config", str(recipe), "--run_dir", str(run_dir), *words])


def read(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


def rows(run_dir, name):
    """The steps at which something was logged, over all starts of a run."""
    found = []
    for path in sorted(run_dir.glob("metrics/version_*/metrics.csv")):
        with path.open(newline="") as file:
            found += [int(row["step"]) for row in csv.DictReader(file) if row.get(name)]
    return found


def signalled(monkeypatch, hook, when, number=signal.SIGTERM):
    """Let the task send its own process a signal, once."""
    sent, step = [], getattr(SequenceClassification, hook)

    def send(self, batch, index):
        if not sent and when(self, index):
            sent.append(index)
            os.kill(os.getpid(), number)
        return step(self, batch, index)

    monkeypatch.setattr(SequenceClassification, hook, send)
    return sent


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_dir = tmp_path_factory.mktemp("finished")
    command = fit(tiny_recipe, run_dir)
    torch.set_num_threads(threads)
    return run_dir, {name: weight.clone() for name, weight in command.model.state_dict().items()}


# Signals.


@pytest.mark.parametrize(
    ("hook", "step", "index", "words"),
    [
        ("training_step", 6, None, []),  # in the middle of an epoch
        ("training_step", 4, None, []),  # validation is next
        ("training_step", 9, None, []),  # so it is, and the epoch ends
        ("validation_step", 10, 1, []),  # within it
        ("training_step", 9, None, ["--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1"]),
    ],
    ids=str,
)
def test_a_run_that_sigterm_stops_goes_on_as_if_it_had_not_been(
    finished, tiny_recipe, tmp_path, monkeypatch, capsys, hook, step, index, words
):
    sent = signalled(monkeypatch, hook, lambda task, i: task.global_step == step and index in (None, i))
    with pytest.raises(SystemExit) as end:
        fit(tiny_recipe, tmp_path, *words)
    assert sent
    assert end.value.code == 143
    done = step + (hook == "training_step")
    assert read(tmp_path)["global_step"] == done
    assert capsys.readouterr().err == (
        f"lineara: stopped by SIGTERM after step {done}, which {tmp_path}/checkpoints/last.ckpt holds; go on with the "
        "same command and --ckpt_path last\n"
    )
    command = fit(tiny_recipe, tmp_path, "--ckpt_path", "last", *words)
    assert command.trainer.global_step == STEPS
    for name, weight in command.model.state_dict().items():
        assert torch.equal(weight, finished[1][name]), name
    lost = {step} if step == 6 else set()  # what is logged of a step is written behind its end
    assert rows(tmp_path, "train/loss") == [one for one in range(STEPS) if one not in lost]
    if not words:
        assert rows(tmp_path, "val/accuracy") == rows(finished[0], "val/accuracy") == [4, 9, 14, 19]


def test_a_signal_within_gathered_gradients_waits_for_the_update(tiny_recipe, tmp_path, monkeypatch):
    words = ["--trainer.accumulate_grad_batches", "3", "--trainer.max_steps", "6"]
    whole = fit(tiny_recipe, tmp_path / "whole", *words)
    signalled(monkeypatch, "training_step", lambda task, index: index == 3)
    with pytest.raises(SystemExit, match="143"):
        fit(tiny_recipe, tmp_path / "stopped", *words)
    assert read(tmp_path / "stopped")["global_step"] == 2
    resumed = fit(tiny_recipe, tmp_path / "stopped", "--ckpt_path", "last", *words)
    for name, weight in resumed.model.state_dict().items():
        assert torch.equal(weight, whole.model.state_dict()[name]), name


def test_sigusr1_has_a_status_of_its_own_and_the_last_step_is_no_place_to_stop(tiny_recipe, tmp_path, monkeypatch):
    signalled(monkeypatch, "training_step", lambda task, index: task.global_step == 2, signal.SIGUSR1)
    with pytest.raises(SystemExit, match="138"):
        fit(tiny_recipe, tmp_path / "one")
    monkeypatch.undo()
    sent = signalled(monkeypatch, "training_step", lambda task, index: task.global_step == 5)
    fit(tiny_recipe, tmp_path / "two", "--trainer.max_steps", "6")
    assert sent
    assert read(tmp_path / "two")["global_step"] == 5  # of its last validation


def test_a_second_signal_while_it_saves_leaves_a_whole_checkpoint(tiny_recipe, tmp_path, monkeypatch):
    sent = signalled(monkeypatch, "training_step", lambda task, index: task.global_step == 6)
    write, sizes = Path.write_bytes, []

    def interrupted(path, content):
        if not sent:
            return write(path, content)
        half = len(content) // 2
        write(path, content[:half])
        sizes.append(path.stat().st_size)
        os.kill(os.getpid(), signal.SIGTERM)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(SystemExit, match="143"):
        fit(tiny_recipe, tmp_path)
    assert sizes[-1] > 0
    assert read(tmp_path)["global_step"] == 7
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_signals_are_answered_as_before_once_a_run_is_over(tiny_recipe, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    fit(tiny_recipe, tmp_path, "--trainer.max_steps", "5")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
