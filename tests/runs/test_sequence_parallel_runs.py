"""Two real processes that share the positions of every batch, as the command line starts them."""

import csv
import json

import pytest
import torch
import torch.distributed as dist

from lineara.cli import main
from lineara.runs.sharding import ShardedStrategy, ShardedTask
from lineara.runs.training import TrainingCommand, load_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]
SHARED = "--model.sequence_parallel 2"
REPLICATED = "--trainer.strategy lineara.runs.sharding.ShardedStrategy --trainer.strategy.weights replicated"
ROUTED = (
    "--model.network.attention lineara.nn.MultiresolutionAttention --model.network.attention.num_heads 2 "
    "--model.load_balancing 0"
)
# Attention that notes how many positions it was given; beside the script that both processes run.
WATCHED = """
import os
from pathlib import Path
from lineara.nn import EfficientAttention

class Watched(EfficientAttention):
    def forward(self, x, context=None, *, key_mask=None):
        with Path("positions" + os.environ.get("LOCAL_RANK", "0")).open("a") as file:
            print(x.shape[1], file=file)
        return super().forward(x, context, key_mask=key_mask)
"""
# By folder: the words of a run by two processes, and those that one process is given too.
RUNS = {
    "spread": (f"{SHARED} --trainer.strategy fsdp", ""),
    "replicated": (f"{SHARED} {REPLICATED}", ROUTED),
}


@pytest.fixture(scope="module")
def plain(tiny_recipe):
    return f"--config {tiny_recipe} --model.network.dropout 0 --trainer.max_steps 8"


@pytest.fixture(scope="module")
def runs(tiny_recipe, plain, two_processes, tmp_path_factory):
    """One start of two processes, which run everything below one after the other."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "watched.py").write_text(WATCHED)
    dropping = f"fit --config {tiny_recipe} --trainer.max_steps 8 {SHARED} --trainer.strategy fsdp "
    dropping += "--model.network.attention watched.Watched --model.network.attention.num_heads 2"
    lines = [
        *(f"fit {plain} {two} {both} --run_dir {name}" for name, (two, both) in RUNS.items()),
        f"test {plain} {RUNS['spread'][0]} --run_dir spread",
        f"{dropping} --run_dir whole",
        f"{dropping} --run_dir cut",
        f"{dropping} --run_dir cut --ckpt_path last",
    ]
    done = two_processes(folder, lines, where=[["cut", 1, 2]])
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        statuses = json.loads((folder / f"statuses{rank}").read_text())
        assert statuses == [0] * (len(lines) - 2) + [0 if rank else 143], done.stderr
    return folder


def losses(run_dir):
    with (run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_that_share_positions_learn_what_one_does(runs, plain, tmp_path, name):
    TrainingCommand(["fit", *plain.split(), *RUNS[name][1].split(), "--run_dir", str(tmp_path)])
    assert len(set(losses(tmp_path))) == 8
    assert losses(runs / name) == pytest.approx(losses(tmp_path), rel=1e-5)
    one, two = checkpoint(tmp_path), checkpoint(runs / name)
    assert one["global_step"] == two["global_step"] == 5
    for key, weight in one["state_dict"].items():
        # A bias of all keys cancels in their softmax: its gradient is rounding, which the optimiser makes large.
        atol = 1e-4 if key.endswith("attention.key.bias") else 1e-5
        torch.testing.assert_close(two["state_dict"][key], weight, rtol=1e-4, atol=atol, msg=key)


def test_one_process_reads_their_checkpoint_and_measures_what_they_do(runs, plain, monkeypatch):
    monkeypatch.chdir(runs)
    one = TrainingCommand(["test", *plain.split(), "--run_dir", "spread"]).trainer.callback_metrics
    two = json.loads((runs / "spread/test.json").read_text())
    assert {"test/loss", "test/accuracy", "test/accuracy_of_majority_class"} <= one.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(float(value), rel=1e-6), key


def test_a_checkpoint_that_carries_its_recipe_is_drawn_from_by_one_process(runs):
    task, _ = load_run(runs / "replicated/checkpoints/last.ckpt")
    assert task.sequence_parallel == 2
    assert task.network(torch.ones(2, 29, dtype=torch.int64)).isfinite().all()


def test_each_process_attends_from_a_half_of_the_positions(runs):
    first, second = (list(map(int, (runs / f"positions{rank}").read_text().split())) for rank in (0, 1))
    assert len(first) == len(second) >= 8
    assert all(0 <= theirs - ours <= 1 for ours, theirs in zip(first, second, strict=True))
    assert 8 < max(second) <= 15  # of at most 30


def test_weights_are_spread_or_held_by_both(runs):
    held = {name: json.loads((runs / name / "fit.json").read_text())["share"] for name in RUNS}
    assert held["replicated"] == 1
    assert 0.45 < held["spread"] < 0.55


def test_processes_drop_by_random_numbers_of_their_own_and_go_on_with_them(runs):
    whole, cut = checkpoint(runs / "whole"), checkpoint(runs / "cut")
    # Cloned, because torch crashes over a state that lies within a larger tensor.
    states = [state.clone() for state in whole["lineara_random_state"]]
    assert [torch.Generator().set_state(state).initial_seed() for state in states] == [0, 1]
    assert whole["global_step"] == cut["global_step"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], weight), name


# What cannot be.


@pytest.fixture
def left_as_found():
    """A run that ends early leaves torch.distributed as its strategy began it."""
    assert not dist.is_initialized()
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("left_as_found")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--model.sequence_parallel 2",
            "sequence_parallel must be 1 unless the strategy is fsdp, got 2; set",
        ),
        ("--model.sequence_parallel 2 --trainer.strategy ddp", "sequence_parallel must be 1 unless the strategy is fs"),
        ("--model.sequence_parallel 3 --trainer.strategy fsdp", "must divide the number of processes, got 3 and 1; se"),
        ("--model.sequence_parallel 0", "sequence_parallel must be at least 1, got 0"),
        (
            "--model.sequence_parallel 2 --model.network.attention lineara.nn.SoftmaxAttention",
            "sequence_parallel must be 1 for this network, got 2: every block must have an attention layer that can "
            "take a group, EfficientAttention or MultiresolutionAttention, got SoftmaxAttention in block 0",
        ),
    ],
)
def test_one_sentence_says_what_cannot_share_positions(plain, tmp_path, capsys, words, said):
    assert main(["fit", *plain.split(), "--run_dir", str(tmp_path), *words.split()]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_network_of_another_kind_is_refused():
    from lineara.tasks.long_range_arena import SequenceClassification

    with pytest.raises(ValueError, match="must be 1 for this network, got 2: Linear has no method shard_positions"):
        SequenceClassification(torch.nn.Linear(3, 5), sequence_parallel=2)


@pytest.mark.parametrize(("given", "shared", "allowed"), [(1, 2, True), (2, 2, True), (4, 2, False), (2, 1, True)])
def test_a_strategy_of_another_size_is_refused(given, shared, allowed, monkeypatch):
    monkeypatch.setattr(ShardedStrategy.__base__, "setup_environment", lambda self: None)
    strategy = ShardedStrategy(same_batch_size=given)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    strategy._lightning_module = task = ShardedTask()
    task.sequence_parallel = shared
    if not allowed:
        with pytest.raises(ValueError, match=r"^same_batch_size must be sequence_parallel where .* got 4 and 2; leave"):
            strategy.setup_environment()
        return
    strategy.setup_environment()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (2, 2)
