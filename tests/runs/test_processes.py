"""Runs of several processes, as the command line starts them: stopped, resumed, and with one of them killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lineara.runs.processes import Companions, Word, _sentence


def complaints(done):
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
    assert complaints(done) == [stopped[0], refused, stopped[1]]  # which both processes found, and one says
    assert "weights_only" not in done.stderr
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
        pytest.raises(ChildProcessError, match=r"^[^(]* got one that process 0 no longer reaches; look"),
        Companions().watched(Alone),
    ):
        raise RuntimeError("gloo: Connection closed by peer")


def words_of_two_processes(tmp_path, monkeypatch, others):
    """Of a first process, this one, and of another, each in the same command."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(Word, "_commands", {})
    monkeypatch.setattr("lineara.runs.processes._SECONDS_FOR_THE_FIRST", 0.1)
    first = Word(os.getpid())
    Word._commands.clear()
    monkeypatch.setattr("lineara.runs.processes.os", others)
    return first, Word(first.first)


class Other:
    """What the module os says to a process that this one has started."""

    getuid = os.getuid
    getpid = staticmethod(lambda: 7)
    getppid = staticmethod(os.getpid)


def test_one_of_two_processes_speaks_and_the_first_one_before_the_other(tmp_path, monkeypatch):
    first, other = words_of_two_processes(tmp_path, monkeypatch, Other)
    assert not first.is_taken()
    assert first.take()
    assert first.take()
    assert not first.is_taken()
    assert other.is_taken()
    assert not other.take()
    assert len(list(tmp_path.glob("*/*"))) == 1
    assert Word(None).take()


def test_another_process_speaks_where_the_first_one_does_not(tmp_path, monkeypatch):
    first, other = words_of_two_processes(tmp_path, monkeypatch, Other)
    assert other.take()
    assert not first.take()
    monkeypatch.setattr(Other, "getppid", staticmethod(lambda: 1))
    assert other.first_is_gone()


def test_who_loses_another_process_is_silent_where_that_one_speaks(tmp_path, monkeypatch):
    first, other = words_of_two_processes(tmp_path, monkeypatch, Other)
    first.take()
    companions = Companions()
    trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=SimpleNamespace(launcher=None))
    monkeypatch.setattr(companions, "_begin", lambda trainer: setattr(companions, "_word", other))
    with pytest.raises(SystemExit, match="2"), companions.watched(trainer):
        raise RuntimeError("gloo: Connection closed by peer")
    with pytest.raises(SystemExit, match="2"), companions.watched(trainer):
        raise ValueError("what both found")


def test_how_a_process_ended_is_said():
    assert "process 3 ended with status 1; go on" in _sentence(3, 1)
    assert "process 3 killed by SIGTERM; go on" in _sentence(3, -15)
