"""The search for what was not finite first; `test_stopping.py` has it in whole runs."""

import math
import os
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lineara.runs.nonfinite import find_cause, first_nonfinite, last_good, random_state


class Task(LightningModule):
    """A network with dropout and batch normalisation; the layer of number `bad` answers with infinities."""

    def __init__(self, bad=None):
        super().__init__()
        layers = [nn.Linear(5, 7), nn.Dropout(0.5), nn.BatchNorm1d(7), nn.Sequential(nn.Linear(7, 3), nn.ReLU())]
        self.network = nn.Sequential(*layers)
        self.seen, self.bad = [], bad
        if bad is not None:
            self.network.get_submodule(bad).register_forward_hook(lambda layer, given, answer: answer / 0)

    def training_step(self, batch, batch_index):
        answer = self.network(batch["image"])
        self.seen.append(answer.detach())
        self.log("train/loss", answer.sum())
        return answer.square().mean()


@pytest.fixture
def search():
    def run(task, batch, optimizers=()):
        plugin = SimpleNamespace(train_step_context=nullcontext)
        trainer = SimpleNamespace(precision_plugin=plugin, optimizers=list(optimizers))
        return find_cause(trainer, task, batch, 11, run.state)

    torch.manual_seed(0)
    run.state = random_state(torch.device("cpu"))
    return run


@pytest.fixture
def batch():
    return {"image": torch.randn(13, 5, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("bad", ["0", "1", "2", "3.0"])
def test_the_innermost_first_layer_is_named(search, batch, bad):
    task = Task(bad)
    kind = type(task.network.get_submodule(bad)).__name__
    assert search(task, batch) == f"the layer network.{bad} ({kind}) was the first to answer so"


def test_an_input_comes_before_the_layers_and_a_weight_before_both(search, batch):
    task = Task()
    batch["image"][7, 3] = float("inf")
    assert search(task, batch) == "image of the batch is not finite"
    with torch.no_grad():
        task.network[2].weight[4] = float("nan")
    assert search(task, batch) == "the weight network.2.weight has not been finite since the step before"
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1, momentum=0.9)
    optimizer.state[task.network[2].weight]["momentum_buffer"] = torch.full((7,), float("nan"))
    assert search(task, batch, [optimizer]).endswith("since the step before, for its gradient was not")


def test_nothing_is_found_where_all_is_finite_and_nothing_of_the_search_stays(search, batch):
    task = Task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    torch.manual_seed(17)
    expected = torch.rand(3)
    torch.manual_seed(17)
    assert search(task, batch) is None
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    assert not any(module._forward_hooks for module in task.modules())
    assert "log" not in vars(task)
    search(task, batch)
    assert torch.equal(*task.seen)  # the same was dropped


def test_the_first_name_is_given():
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf")])
    assert first_nonfinite(iter([("a", good), ("b", bad), ("c", bad)])) == "b"
    assert first_nonfinite(iter([("a", good), ("n", torch.ones(3, dtype=torch.int64))])) is None


def test_the_newest_checkpoint_that_is_finite_is_the_last_good_one(tmp_path):
    def checkpoint(name, time, weight, moment=0.0, other=math.inf):
        content = {"state_dict": {"weight": torch.tensor(weight), "other": torch.tensor(other)}}
        torch.save(content | {"optimizer_states": [{"state": {0: {"exp_avg": torch.tensor(moment)}}}]}, tmp_path / name)
        os.utime(tmp_path / name, (time, time))

    found = [last_good(tmp_path, "weight".__eq__)]
    checkpoint("best.ckpt", 3, 1.0)
    found.append(last_good(tmp_path, "weight".__eq__))
    checkpoint("last.ckpt", 5, math.nan)
    (tmp_path / "damaged.ckpt").write_bytes(b"half")
    checkpoint(".last-hidden.ckpt", 7, 1.0)
    found.append(last_good(tmp_path, "weight".__eq__))
    checkpoint("last.ckpt", 5, 1.0, moment=math.inf)
    found.append(last_good(tmp_path, "weight".__eq__))
    checkpoint("last.ckpt", 5, 1.0)
    found.append(last_good(tmp_path, "weight".__eq__))
    assert [path and path.name for path in found] == [None, "best.ckpt", "best.ckpt", "best.ckpt", "last.ckpt"]
