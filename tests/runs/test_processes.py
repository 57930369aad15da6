"""Runs of several processes, as the command line starts them: stopped, resumed, and with one of them killed."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch


def reasons(done):
    return [line for line in done.stderr.splitlines() if line.startswith(("lineara: error", "lineara: stopped"))]


def test_two_processes_stop_for_a_signal_to_one_and_go_on_as_if_there_had_been_none(
    tiny_recipe, two_processes, tmp_path
):
    done = two_processes(
        tmp_path,
        [
            f"fit --config {tiny_recipe} --trainer.strategy ddp --run_dir {end}"
            for end in ("whole", "cut", "cut --ckpt_path last", "none --model.warmup_steps 99", "last")
        ],
        where=[["cut", 1, 2], ["last", 0, 1]],  # the second process in one run, the first in the other
    )
    assert done.returncode == 143, done.stderr
    # Of the second process the status is 0: it must not seem to fail, for the first one has the status of the run.
    assert json.loads((tmp_path / "statuses0").read_text()) == [0, 143, 0, 2]
    assert json.loads((tmp_path / "statuses1").read_text()) == [0, 0, 0, 2]
    stopped = [
        f"lineara: stopped by SIGTERM after step {step}, which {name}/checkpoints/last.ckpt holds; go on with the same "
        "command and --ckpt_path last"
        for step, name in ((3, "cut"), (2, "last"))
    ]
    refused = (
        "lineara: error: warmup_steps must lie between 1 and the run's 23 steps, got 99; set "
        "--model.init_args.warmup_steps or --trainer.max_steps"
    )
    assert reasons(done) == [stopped[0], refused, refused, stopped[1]]  # which both processes found
    assert "weights_only" not in done.stderr
    whole, cut = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, cut["state_dict"][name]), name


def test_torchrun_trains_and_resumes(tiny_recipe, two_processes, tmp_path):
    line = f"fit --config {tiny_recipe} --run_dir"
    done = two_processes(tmp_path, [f"{line} cut"], where=[["cut", 1, 7]], torchrun=True)
    assert done.returncode != 0
    assert "stopped by SIGTERM after step 8" in done.stderr
    for name in ("cut --ckpt_path last", "whole"):
        assert two_processes(tmp_path, [f"{line} {name}"], torchrun=True).returncode == 0
    whole, cut = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("whole", "cut"))
    assert whole["global_step"] == cut["global_step"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(weight, cut["state_dict"][name]), name


@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_ends_the_run_of_a_killed_rank_and_names_it(tiny_recipe, two_processes, tmp_path, rank):
    """That this returns at all shows that no process is left: each would hold the pipe open."""
    begin = time.monotonic()
    done = two_processes(
        tmp_path,
        [f"fit --config {tiny_recipe} --run_dir run"],
        where=[["run", rank, 6]],
        number=signal.SIGKILL,
        torchrun=True,
    )
    assert done.returncode == 1
    assert time.monotonic() - begin < 60  # with the imports of both
    assert re.search(rf"rank\s*: {rank} .*\s*exitcode\s*: -9 ", done.stderr)
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
    [reason] = reasons(done)
    assert "the processes that load data must live until the run ends, got: DataLoader worker (pid" in reason
    assert "is killed by signal: Killed" in reason
