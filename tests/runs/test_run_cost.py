"""What the callback measures of a training, by a clock that the test sets."""

import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lineara.runs import run_cost
from lineara.runs.run_cost import RunCost, collect

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
MEGABYTE = 2**20
HOLDS_256_MEGABYTES = """
import sys
import torch
from lightning.pytorch import LightningModule, Trainer
from lineara.runs import run_cost

class Network(LightningModule):
    def training_step(self, batch, batch_index):
        torch.ones(256 * 2**20, dtype=torch.uint8)

    def configure_optimizers(self):
        return None

if sys.argv[2] == "0":
    run_cost.reset_high_water_mark = lambda: False
options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
options |= dict(accelerator="cpu", max_steps=3, max_epochs=1, default_root_dir=sys.argv[1])
trainer = Trainer(callbacks=[run_cost.RunCost()], **options)
trainer.fit(Network(), torch.utils.data.DataLoader(torch.ones(3, 1)))
"""


class Clock:
    now = 0.0


class Items(Dataset):
    """17 items; loading one takes 50 seconds of the clock."""

    def __len__(self):
        return 17

    def __getitem__(self, index):
        Clock.now += 50
        return torch.ones(3)


class Network(LightningModule):
    """A training step takes one second more than the one before, a validation step 1,000 seconds."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch, batch_index):
        Clock.now += 1 + self.global_step
        return self.layer(batch).mean()

    def validation_step(self, batch, batch_index):
        Clock.now += 1000
        self.log("val/loss", 7.0 - self.global_step / 10)

    def test_step(self, batch, batch_index):
        self.log("test/loss", 5.0)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(run_cost.time, "perf_counter", lambda: Clock.now)

    def start(max_steps, checkpoint=None, **options):
        trainer = Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            default_root_dir=tmp_path,
            callbacks=[
                RunCost(),
                ModelCheckpoint(tmp_path, "best", monitor="val/loss", save_last=True, save_on_train_epoch_end=False),
            ],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        network, loader = Network(), DataLoader(Items(), batch_size=1)
        trainer.fit(network, loader, loader, ckpt_path=checkpoint)
        trainer.test(network, loader, verbose=False)
        return collect(tmp_path)

    return start


def test_steps_are_timed_without_loading_validation_and_the_first_ten(start, tmp_path):
    result = start(17)
    [path] = (tmp_path / "measured").glob("start_*.json")
    assert json.loads(path.read_text())["seconds"] == list(range(1, 18))
    assert result["timed_steps"] == 7
    assert result["seconds_per_step"] == 14  # the median of 11 to 17
    assert result["starts"] == [{"first_step": 0, "steps": 17}]
    assert result["metrics"] == {"test/loss": 5.0}
    assert result["best_validation_score"] == pytest.approx(7 - 1.7)
    assert result["num_parameters"] == 4


def test_a_step_of_several_batches_takes_as_long_as_all_of_them(start):
    # Two epochs of 8 pairs and a single batch: of 34 batches, the last 24 are of the steps 5 to 17.
    result = start(18, accumulate_grad_batches=2)
    assert result["starts"] == [{"first_step": 0, "steps": 34}]
    assert result["seconds_per_step"] == 2 * 12


def test_a_second_start_is_measured_by_itself_and_counted_with_the_first(start):
    start(17)
    result = start(34, "last")
    assert result["starts"] == [{"first_step": 0, "steps": 17}, {"first_step": 17, "steps": 17}]
    assert result["timed_steps"] == 14
    assert result["seconds_per_step"] == (17 + 28) / 2  # of 11 to 17 and 28 to 34
    # Nothing is left to do, as after a run that was stopped between training and test.
    again = start(34, "last")
    assert again.pop("starts") == [*result.pop("starts"), {"first_step": 34, "steps": 0}]
    assert again.pop("peak_bytes") >= result.pop("peak_bytes")
    assert again == result


@pytest.mark.parametrize("mark_can_be_reset", [True, False])
def test_the_peak_is_what_a_step_holds_for_a_moment(mark_can_be_reset, tmp_path):
    # In a process of its own, as where the mark cannot be reset, what the process held before hides what a step holds.
    subprocess.run([sys.executable, "-c", HOLDS_256_MEGABYTES, tmp_path, str(int(mark_can_be_reset))], check=True)
    [path] = (tmp_path / "measured").glob("start_*.json")
    result = json.loads(path.read_text())
    assert result["memory"].startswith("growth of the process's resident memory during fit")
    assert 240 * MEGABYTE < result["peak_bytes"] < 1000 * MEGABYTE


def test_a_run_without_steps_to_time_has_no_median(start):
    result = start(3)
    assert result["seconds_per_step"] is None
    assert result["timed_steps"] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_run_is_measured_by_the_device(tmp_path):
    trainer = Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=13,
        default_root_dir=tmp_path,
        callbacks=[RunCost()],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    loader = DataLoader(Items(), batch_size=1)
    trainer.fit(Network(), loader, loader)
    trainer.test(Network(), loader, verbose=False)
    result = collect(tmp_path)
    assert result["memory"].startswith("torch.cuda.max_memory_allocated during fit")
    assert result["device"] == torch.cuda.get_device_name()
    assert result["timed_steps"] == 3
    assert 0 < result["seconds_per_step"] < 60


def test_the_largest_peak_and_the_median_over_all_starts_count(tmp_path):
    folder = tmp_path / "measured"
    folder.mkdir()
    last = {"memory": "m", "best_validation_score": 0.5, "num_parameters": 9, "device": "d", "versions": {}}
    for step, seconds, peak in ((0, [9.0] * 10 + [1.0, 2.0], 300), (1000, [9.0] * 10 + [6.0], 200)):
        content = {"first_step": step, "seconds": seconds, "peak_bytes": peak, **last}
        (folder / f"start_{step:09d}.json").write_text(json.dumps(content))
    (folder / "test.json").write_text('{"test/accuracy": 0.25}')
    assert collect(tmp_path) == {
        "metrics": {"test/accuracy": 0.25},
        "seconds_per_step": 2.0,
        "timed_steps": 3,
        "starts": [{"first_step": 0, "steps": 12}, {"first_step": 1000, "steps": 11}],
        "peak_bytes": 300,
        **last,
    }
