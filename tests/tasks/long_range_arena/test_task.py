"""Loss, optimiser, schedule, logged numbers and predictions, in runs of a few steps."""

import csv

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lineara.models import SequenceClassifier
from lineara.nn import EfficientAttention, MultiresolutionAttention
from lineara.nn.router import Router
from lineara.tasks.long_range_arena import ListOpsData, SequenceClassification

# Advice that `lineara fit` silences too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
]

PEAK, WARMUP, STEPS = 0.02, 5, 13


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture
def data(folder):
    return ListOpsData(
        data_root=folder, num_train=70, num_val=20, num_test=30, min_len=5, max_len=30, num_workers=1, batch_size=7
    )


def make_task(**options):
    torch.manual_seed(0)
    network = SequenceClassifier(
        16, 10, 30, attention=lambda dim: EfficientAttention(dim, 2), dim=8, mlp_dim=8, head_dim=8, dropout=0.0
    )
    return SequenceClassification(network, **{"peak_lr": PEAK, "warmup_steps": WARMUP, **options})


def make_trainer(tmp_path, *callbacks, **options):
    settings = {"max_steps": STEPS, "limit_val_batches": 0, "logger": False, **options}
    return Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


class Recorder(Callback):
    """The learning rate of every step, its loss, and what the loss is by definition."""

    def __init__(self):
        self.rates, self.losses, self.expected = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        with torch.no_grad():
            logits = pl_module.network(batch["tokens"], mask=batch["mask"])
        right = logits[torch.arange(len(logits)), batch["label"]]
        self.expected.append((logits.logsumexp(dim=1) - right).mean().item())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


class FirstDigit(nn.Module):
    """Gives class (first digit) a probability of 3/4, and shares the rest evenly."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(27.0).log())

    def forward(self, tokens, *, mask):
        digits = torch.where((tokens > 0) & (tokens < 11), tokens - 1, -1)
        first = torch.stack([row[row >= 0][0] for row in digits])
        return self.weight * nn.functional.one_hot(first, 10)


# Training.


def test_loss_optimiser_and_schedule_are_those_of_the_published_harness(tmp_path, data):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, recorder)
    task = make_task()
    trainer.fit(task, data)

    assert recorder.losses == pytest.approx(recorder.expected, rel=1e-5)

    [optimizer] = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    [group] = optimizer.param_groups
    assert {name: group[name] for name in ("betas", "eps", "weight_decay", "amsgrad")} == {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.0,
        "amsgrad": False,
    }
    assert {id(weight) for weight in group["params"]} == {id(weight) for weight in task.network.parameters()}

    # One cycle, linear: from a 25th of the peak up to it at the last step of the warm-up, then down to a 10,000th of
    # where it began, at the last step.
    start = PEAK / 25
    last = start / 1e4
    up = [start + (PEAK - start) * step / (WARMUP - 1) for step in range(WARMUP)]
    down = [PEAK + (last - PEAK) * step / (STEPS - WARMUP) for step in range(1, STEPS - WARMUP + 1)]
    assert len(recorder.rates) == STEPS
    assert recorder.rates == pytest.approx(up + down)
    assert (recorder.rates[0], recorder.rates[WARMUP - 1], recorder.rates[-1]) == pytest.approx((8e-4, 0.02, 8e-8))


class RoutedRun(Callback):
    """What routers decided in every step, and what was logged and differentiated."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        lasts = [module.last for module in pl_module.modules() if isinstance(module, Router)]
        logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
        self.steps.append((float(outputs["loss"]), logged, lasts))


def test_load_balancing_is_added_to_the_loss_and_loads_are_logged(tmp_path, data):
    run = RoutedRun()
    network = SequenceClassifier(
        16, 10, 30, attention=lambda dim: MultiresolutionAttention(dim, 4), dim=8, mlp_dim=8, head_dim=8, dropout=0.0
    )
    task = SequenceClassification(network, peak_lr=PEAK, warmup_steps=WARMUP, load_balancing=0.3)
    make_trainer(tmp_path, run, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(task, datamodule=data)
    assert len(run.steps) == STEPS
    for differentiated, logged, lasts in run.steps:
        assert len(lasts) == 2
        terms = sum(last.load_balancing.item() for last in lasts)
        assert differentiated == pytest.approx(logged["train/loss"] + 0.3 * terms, rel=1e-5)
        for layer, last in enumerate(lasts):
            shares = [logged[f"train/load_layer{layer}_head{head}"] for head in range(4)]
            assert shares == pytest.approx(last.load.tolist())
            assert sum(shares) == pytest.approx(1.0)


def test_a_network_without_routers_has_no_load_to_log(tmp_path, data):
    run = RoutedRun()
    make_trainer(tmp_path, run, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(make_task(), datamodule=data)
    for differentiated, logged, _ in run.steps:
        assert differentiated == pytest.approx(logged["train/loss"])
        assert not any("load" in name for name in logged)


def test_accuracies_and_losses_are_means_over_the_split(tmp_path, data):
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=1.0, val_check_interval=3)
    task = make_task(warmup_steps=2)
    trainer.fit(task, data)
    validated = dict(trainer.callback_metrics)
    [tested] = trainer.test(task, data, verbose=False)
    for stage, logged in (("val", validated), ("test", tested)):
        correct, losses, total = 0, 0.0, 0
        for batch in getattr(data, f"{stage}_dataloader")():
            logits = task.network(batch["tokens"], mask=batch["mask"])
            correct += int((logits.argmax(dim=1) == batch["label"]).sum())
            losses += nn.functional.cross_entropy(logits, batch["label"], reduction="sum").item()
            total += len(logits)
        assert total == len(data.split(stage)) != 7 * (total // 7)  # batches of different sizes
        assert float(logged[f"{stage}/accuracy"]) == pytest.approx(correct / total)
        assert float(logged[f"{stage}/loss"]) == pytest.approx(losses / total, rel=1e-5)
        for name, accuracy in data.trivial_accuracies(stage).items():
            assert float(logged[f"{stage}/accuracy_of_{name}"]) == pytest.approx(accuracy)


@pytest.mark.parametrize("warmup_steps", [-1, 0, 1, 13, 20])
def test_a_warmup_that_does_not_fit_the_run_is_refused(tmp_path, data, warmup_steps):
    sentence = rf"^warmup_steps must .* the run's 13 steps, got {warmup_steps}; set --model\.init_args\.warmup_steps or"
    with pytest.raises(ValueError, match=sentence):
        make_trainer(tmp_path).fit(make_task(warmup_steps=warmup_steps), data)


@pytest.mark.parametrize("warmup_steps", [2, 12])
def test_the_shortest_and_the_longest_warmup_reach_the_peak(tmp_path, data, warmup_steps):
    recorder = Recorder()
    make_trainer(tmp_path, recorder).fit(make_task(warmup_steps=warmup_steps), data)
    assert recorder.rates.index(max(recorder.rates)) == warmup_steps - 1
    assert max(recorder.rates) == pytest.approx(PEAK)


# Predictions.


def test_predictions_are_written_as_a_table(tmp_path, capsys):
    source = tmp_path / "mine.tsv"
    source.write_text("Source\tTarget\n( [MAX 4 9 ] )\t9\n( [MIN [SM 3 4 ] 2 1 ] )\t1\n7\t7\n")
    data = ListOpsData(predict_file=str(source), batch_size=2)
    run_dir = tmp_path / "run"
    batches = make_trainer(run_dir).predict(SequenceClassification(FirstDigit()), data)
    assert [len(batch["label"]) for batch in batches] == [2, 1]
    with (run_dir / "predictions.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["prediction", "probability", "label", "tokens"]
    assert rows == [
        ["4", "0.7500", "9", "[MAX 4 9 ]"],
        ["3", "0.7500", "1", "[MIN [SM 3 4 ] 2 1 ]"],
        ["7", "0.7500", "7", "7"],
    ]
    assert f"predictions: {run_dir / 'predictions.csv'}" in capsys.readouterr().out


def test_a_second_prediction_replaces_the_first(tmp_path, data):
    task = SequenceClassification(FirstDigit())
    for _ in range(2):
        make_trainer(tmp_path).predict(task, data)
    lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + 30
