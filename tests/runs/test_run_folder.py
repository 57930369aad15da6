"""The folder of a run: written by one process, and with room for its checkpoints, or refused before training."""

import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from lineara.runs.run_folder import checkpoint_bytes, folder_lock, run_lock
from lineara.runs.training import TrainingCommand
from lineara.tasks.long_range_arena import SequenceClassification

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]


def fit(recipe, run_dir):
    return TrainingCommand(["fit", "--config", str(recipe), "--run_dir", str(run_dir), "--trainer.max_steps", "5"])


@pytest.fixture
def no_steps(monkeypatch):
    """Fails if a batch is trained on."""

    def training_step(self, batch, batch_index):
        raise AssertionError("training began")

    monkeypatch.setattr(SequenceClassification, "training_step", training_step)


@pytest.mark.usefixtures("no_steps")
def test_a_folder_that_cannot_be_made_is_refused_before_training(tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("no folder")
    run_dir = tmp_path / "file" / "run"
    with pytest.raises(
        OSError, match=r"^run_dir must be a folder that can be written, got .*file/run \(Not a directory\)"
    ):
        fit(tiny_recipe, run_dir)


def test_a_full_disk_is_found_before_training(tmp_path):
    """A file that may not grow fails as one on a full disk does: it can be opened and not written."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with (
            pytest.raises(OSError, match=r"^run_dir must be a folder that can be written, got .*; free some space"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("no_steps")
def test_checkpoints_that_the_disk_has_no_room_for_are_refused_before_training(tiny_recipe, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    sentence = r"^run_dir must have room for 3 checkpoints of [\d.]+ kB, got 20 kB free in .*; free some space, or name"
    with pytest.raises(OSError, match=sentence):
        fit(tiny_recipe, tmp_path)


def test_what_a_resumed_run_will_replace_counts_as_room(tiny_recipe, tmp_path, monkeypatch):
    command = fit(tiny_recipe, tmp_path)
    least = checkpoint_bytes(command.model, command.trainer.optimizers)
    size = (tmp_path / "checkpoints/last.ckpt").stat().st_size
    assert 0.1 * size < least < size  # a checkpoint of so small a network is names, more than anything
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=least))
    TrainingCommand(
        [
            "fit",
            "--config",
            str(tiny_recipe),
            "--run_dir",
            str(tmp_path),
            "--trainer.max_steps",
            "5",
            "--ckpt_path",
            "last",
        ]
    )


@pytest.mark.parametrize(
    ("optimizer", "options", "kept"),
    [("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 1), ("AdamW", {}, 2), ("Adam", {"amsgrad": True}, 3)],
)
def test_the_estimate_is_what_tensors_take(optimizer, options, kept):
    network = nn.Linear(7, 11)
    optimizer = getattr(torch.optim, optimizer)(network.parameters(), lr=0.1, **options)
    weights = 4 * (7 * 11 + 11)
    assert checkpoint_bytes(network, [optimizer]) == weights * (1 + kept)
    network(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    moments = [
        m for state in optimizer.state.values() for m in state.values() if isinstance(m, torch.Tensor) and m.dim()
    ]
    assert sum(4 * moment.numel() for moment in moments) == weights * kept


KILLED_BEFORE_ITS_CHILD = """
import os, signal, sys, time
from pathlib import Path
from lineara.runs.run_folder import folder_lock

with folder_lock(Path(sys.argv[1])):
    child = os.fork()
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_that_load_data_do_not_hold_the_folder(tmp_path):
    words = [sys.executable, "-c", KILLED_BEFORE_ITS_CHILD, str(tmp_path)]
    child = int(subprocess.run(words, stdout=subprocess.PIPE, check=False, timeout=60).stdout)
    try:
        with folder_lock(tmp_path):
            os.kill(child, 0)  # it lives
    finally:
        os.kill(child, signal.SIGKILL)
