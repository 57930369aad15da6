"""DDP and FSDP on a recipe of every task, in two real processes, as the command line starts them."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm

from lineara.models import PSMNet, SequenceClassifier, mask_rcnn, resnet
from lineara.nn import EfficientAttention
from lineara.runs.sharding import ShardedStrategy, ShardedTask, _blocks, shares
from lineara.runs.training import TrainingCommand, load_run
from lineara.tasks.image_classification import ImageClassification

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]
RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = (
    "--trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.log_every_n_steps 1"
)
# Of every other task a recipe that ships, made small: how it is trained, and what is tested of it.
OTHERS = {
    "digits": ("image_classification/digits", "--model.warmup_steps 1 --data.upscale 1"),
    "coins": ("instance_segmentation/coins_efficient", "--model.warmup_steps 1 --data.batch_size 1"),
    "motorcycle": (
        "stereo_depth/motorcycle_ea_psmnet",
        "--model.network.channels 4 --model.network.num_blocks [1,1,1,1] --data.batch_size 2",
    ),
}
EVALUATED = "--trainer.limit_test_batches 3"


def others(name):
    recipe, words = OTHERS[name]
    return f"--config {RECIPES / recipe}.yaml {words} --run_dir {name}"


@pytest.fixture(scope="module")
def runs(tiny_recipe, two_processes, tmp_path_factory):
    """One start of two processes, which run everything below one after the other."""
    folder = tmp_path_factory.mktemp("two")
    tiny = f"--config {tiny_recipe} --model.network.dropout 0 --trainer.max_steps 8"
    lines = [
        *(f"fit {tiny} --trainer.strategy {name} --run_dir {name}" for name in ("ddp", "fsdp")),
        *(f"test {tiny} --trainer.strategy {name} --run_dir {name}" for name in ("ddp", "fsdp")),
        f"fit {tiny} --trainer.strategy fsdp --run_dir cut",
        f"fit {tiny} --trainer.strategy fsdp --run_dir cut --ckpt_path last",
        *(
            line
            for name in OTHERS
            for line in (
                f"fit {others(name)} --trainer.strategy ddp {SHORT}",
                f"test {others(name)} --trainer.strategy ddp {EVALUATED}",
            )
        ),
    ]
    done = two_processes(folder, lines, where=[["cut", 1, 2]])
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        statuses = json.loads((folder / f"statuses{rank}").read_text())
        assert statuses == [0, 0, 0, 0, 0 if rank else 143] + [0] * (len(lines) - 6), done.stderr
    return folder


def losses(run_dir):
    with (run_dir / "metrics/version_0/metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def checkpoint(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_of_half_the_batch_learn_what_one_does(runs, tiny_recipe, tmp_path, strategy):
    words = ["--model.network.dropout", "0", "--trainer.max_steps", "8", "--data.batch_size", "22"]
    words += ["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "1.0"]
    TrainingCommand(["fit", "--config", str(tiny_recipe), "--run_dir", str(tmp_path), *words])
    assert losses(runs / strategy) == pytest.approx(losses(tmp_path), rel=1e-5)
    assert len(losses(tmp_path)) == 8
    assert len(set(losses(tmp_path))) == 8


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(runs, tiny_recipe, strategy, monkeypatch):
    monkeypatch.chdir(runs)
    words = ["--model.network.dropout", "0", "--run_dir", strategy]
    one = TrainingCommand(["test", "--config", str(tiny_recipe), *words]).trainer.callback_metrics
    two = json.loads((runs / strategy / "test.json").read_text())
    assert {"test/loss", "test/accuracy", "test/accuracy_of_majority_class"} <= one.keys()
    assert yaml.safe_load(tiny_recipe.read_text())["data"]["init_args"]["num_test"] % 2  # they do not come out even
    for name, value in one.items():
        assert two[name] == pytest.approx(float(value), rel=1e-6), name


def test_fsdp_holds_a_half_of_the_weights_and_writes_the_whole(runs):
    shares_held = {name: json.loads((runs / name / "fit.json").read_text())["share"] for name in ("ddp", "fsdp")}
    assert shares_held["ddp"] == 1
    assert 0.45 < shares_held["fsdp"] < 0.55
    spread, whole = checkpoint(runs / "fsdp"), checkpoint(runs / "ddp")
    assert spread["global_step"] == whole["global_step"] == 5
    assert spread["optimizer_states"][0]["state"].keys() == whole["optimizer_states"][0]["state"].keys()
    for name, weight in whole["state_dict"].items():
        torch.testing.assert_close(spread["state_dict"][name], weight, rtol=1e-4, atol=1e-5, msg=name)


def test_a_spread_run_that_was_stopped_goes_on_as_if_it_had_not_been(runs):
    whole, cut = checkpoint(runs / "fsdp"), checkpoint(runs / "cut")
    assert (runs / "cut/metrics/version_1").is_dir()
    assert whole["global_step"] == cut["global_step"]
    for name, weight in whole["state_dict"].items():
        assert torch.equal(cut["state_dict"][name], weight), name
    moments, others = (state["optimizer_states"][0]["state"] for state in (whole, cut))
    assert moments.keys() == others.keys()
    for number, state in moments.items():
        assert torch.equal(state["exp_avg"], others[number]["exp_avg"])


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_task_is_trained_and_measured_by_two_processes_as_by_one(runs, name, monkeypatch):
    monkeypatch.chdir(runs)
    two = json.loads((runs / name / "test.json").read_text())
    task, _ = load_run(runs / name / "checkpoints/last.ckpt")
    assert all(weight.isfinite().all() for weight in task.parameters())
    words = [*others(name).split(), "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    # Each of the two processes has evaluated so many batches.
    one = TrainingCommand(["test", *words, "--trainer.limit_test_batches", "6"]).trainer.callback_metrics
    assert one.keys() <= two.keys()
    for key, value in one.items():
        assert two[key] == pytest.approx(float(value), rel=1e-4, nan_ok=True), key


# What is spread.


@pytest.mark.parametrize(
    ("network", "inside"),
    [
        (
            lambda: SequenceClassifier(
                7, 3, 11, attention=lambda dim: EfficientAttention(dim, num_heads=1), num_layers=3
            ),
            {"blocks.0", "blocks.1", "blocks.2"},
        ),
        (lambda: resnet("resnet18", num_classes=3), {"layer1.0", "layer4.1"}),
        (lambda: mask_rcnn("resnet18", num_classes=3), {"backbone.body.layer4.1"}),
        (lambda: PSMNet(64, channels=4, num_blocks=(1, 1, 1, 1)), {"hourglasses.0", "hourglasses.2"}),
    ],
)
def test_blocks_are_what_repeats_in_a_network(network, inside):
    network = network()
    names = {id(module): name for name, module in network.named_modules()}
    found = [names[id(block)] for block in _blocks(network)]
    assert inside <= set(found)
    assert len(found) == len(set(found))
    # A block within a block is spread before it.
    for position, name in enumerate(found):
        assert not any(later.startswith(f"{name}.") for later in found[position + 1 :])
    assert not any(isinstance(network.get_submodule(name), nn.ModuleList | nn.ModuleDict) for name in found)


def test_without_a_mesh_a_task_is_as_it_was():
    class Task(ShardedTask):
        def __init__(self):
            super().__init__()
            self.network = nn.Sequential(nn.Sequential(nn.Linear(3, 5)))

    task = Task()
    before = dict(task.named_parameters())
    task.configure_model()
    assert {name: id(weight) for name, weight in task.named_parameters()} == {n: id(w) for n, w in before.items()}
    assert not any(isinstance(module, SyncBatchNorm) for module in task.modules())


def test_a_batch_without_images_is_refused_where_layers_wait_for_other_processes():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5))
    empty = {"image": torch.empty(0, 3, 0, 0), "label": torch.empty(0, dtype=torch.int64)}
    assert ImageClassification(network, num_classes=5).training_step(empty, 0) == 0
    network = SyncBatchNorm.convert_sync_batchnorm(network)
    with pytest.raises(ValueError, match=r"^a batch must hold an image that can be read where layers wait for other"):
        ImageClassification(network, num_classes=5).training_step(empty, 0)


def test_batches_are_shared_over_the_first_dimension_alone():
    class Trainer:
        world_size, global_rank = 6, 5

        class Strategy:
            distributed_sampler_kwargs = {"num_replicas": 3, "rank": 2}  # noqa: RUF012

        strategy = Strategy()

    assert shares(Trainer()) == (3, 2)
    Trainer.strategy = object()
    assert shares(Trainer()) == (6, 5)
    assert shares(None) == (1, 0)


@pytest.mark.parametrize("size", [0, 3])
def test_the_second_dimension_must_divide_the_processes(size):
    strategy = ShardedStrategy(same_batch_size=size)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    with pytest.raises(ValueError, match=rf"^same_batch_size must divide the number of processes, got {size} and 2;"):
        strategy.setup_environment()


def test_batch_normalisation_over_processes_is_refused_on_cpus(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"^sync_batchnorm must be false on CPUs"):
        TrainingCommand(
            ["fit", "--config", str(tiny_recipe), "--run_dir", str(tmp_path), "--trainer.sync_batchnorm", "true"]
        )
