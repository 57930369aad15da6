"""Runs of several processes, as the command line starts them: stopped, resumed, and with one of them killed."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lineara.tasks.processes import Companions, _sentence


def complaints(done):
    return [line for line in done.stderr.splitlines() if line.startswith(("lineara: error", "lineara: stopped"))]


def test_two_processes_stop_for_a_signal_to_one_and_go_on_as_if_there_had_been_none(
    tiny_recipe, two_processes, tmp_path
):
    done = two_processes(
        tmp_path,
        [
            f"fit --config {tiny_recipe} --trainer.strategy ddp --run_dir {end}"
            for end in ("whole", "cut", "cut --ckpt_path last", "last")
        ],
        where=[["cut", 1, 2], ["last", 0, 1]],  # the second process in one run, the first in the other
    )
    assert done.returncode == 143, done.stderr
    # Of the second process the status is 0: it must not seem to fail, for the first one has the status of the run.
    assert json.loads((tmp_path / "statuses0").read_text()) == [0, 143, 0]
    assert json.loads((tmp_path / "statuses1").read_text()) == [0, 0, 0]
    assert complaints(done) == [
        f"lineara: stopped by SIGTERM after step {step}, which {name}/checkpoints/last.ckpt holds; go on with the same "
        "command and --ckpt_path last"
        for step, name in ((3, "cut"), (2, "last"))
    ]
    whole, cut = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, cut["state_dict"][name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_and_is_named(tiny_recipe, two_processes, tmp_path, rank):
    """That this returns at all shows that no process is left: each would hold the pipe open."""
    done = two_processes(
        tmp_path,
        [f"fit --config {tiny_recipe} --trainer.strategy ddp --run_dir run"],
        where=[["run", rank, 6]],
        number=signal.SIGKILL,
    )
    assert done.returncode == (-signal.SIGKILL if rank == 0 else 2)
    [complaint] = complaints(done)
    if rank == 1:
        assert complaint == (
            "lineara: error: all processes of the run must live until it ends, got process 1 killed by SIGKILL; where "
            "the system did it, memory ran out; go on with the same command and --ckpt_path last"
        )
    else:
        assert "must live" in complaint
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


WORKER = """
import os, signal, sys
from lineara.cli import main
from lineara.tasks.image_classification import DigitsData, ImageClassification

begin = DigitsData.__init__

def with_a_worker(self, *words, **options):
    begin(self, *words, **options)
    self.num_workers = 1

def kill_a_worker(self, batch, index):
    children = open(f"/proc/self/task/{os.getpid()}/children").read().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    return sum(weight.sum() for weight in self.network.parameters())

DigitsData.__init__ = with_a_worker
ImageClassification.training_step = kill_a_worker
sys.exit(main())
"""


def test_a_killed_loader_process_ends_the_run_and_is_named(tmp_path):
    (tmp_path / "script.py").write_text(WORKER)
    recipe = Path(__file__).parents[2] / "recipes/image_classification/digits.yaml"
    words = ["fit", "--config", str(recipe), "--run_dir", "run"]
    words += ["--trainer.enable_progress_bar", "false"]
    done = subprocess.run(
        [sys.executable, "script.py", *words], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr
    [complaint] = complaints(done)
    assert "the processes that load data must live until the run ends, got process " in complaint
    assert "killed (Killed); where the system did it, memory ran out: lower --data.num_workers" in complaint


def test_an_error_of_another_kind_stays_as_it_is():
    class Alone:
        world_size, global_rank = 1, 0

        strategy = SimpleNamespace(launcher=None)

    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$") as error, Companions().watched(Alone):
        raise RuntimeError("Connection closed by peer")
    assert error.value.__cause__ is None
    Alone.world_size = 2
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"), Companions().watched(Alone):
        raise RuntimeError("shapes do not match")
    with (
        pytest.raises(ChildProcessError, match=r"no longer reaches \(gloo: Connection closed"),
        Companions().watched(Alone),
    ):
        raise RuntimeError("gloo: Connection closed by peer")


def test_how_a_process_ended_is_said():
    assert "process 3 ended with status 1; go on" in _sentence(3, 1)
    assert "process 3 killed by SIGTERM; go on" in _sentence(3, -15)
