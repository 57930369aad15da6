"""What the tests of every data set share."""

import csv
from pathlib import Path

import pytest
import torch
import yaml

from lineara.cli import main


@pytest.fixture
def run_task(tmp_path, capsys, monkeypatch):
    """Train for three steps, test and predict by the command line: the table of logged scores, and the predictions."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(data, *, num_classes, **network):
        write_recipe("recipe.yaml", data, num_classes=num_classes, **network)
        said = {}
        for command in ("fit", "test", "predict"):
            assert main([command, "--config", "recipe.yaml"]) == 0
            said[command] = capsys.readouterr().out
        with Path("run/predictions.csv").open(newline="", encoding="utf-8") as file:
            return said["test"], list(csv.DictReader(file))

    yield run
    torch.set_num_threads(before)


def write_recipe(path, data, *, num_classes, **network):
    attention = {"class_path": "lineara.nn.EfficientAttention", "init_args": {"num_heads": 2}}
    small = {"dim": 8, "num_layers": 1, "mlp_dim": 8, "head_dim": 8, "vocab_size": 257}
    network = small | {"num_classes": num_classes, "attention": attention} | network
    model = {
        "class_path": "lineara.tasks.long_range_arena.SequenceClassification",
        "init_args": {
            "num_classes": num_classes,
            "warmup_steps": 2,
            "network": {"class_path": "lineara.models.SequenceClassifier", "init_args": network},
        },
    }
    trainer = {
        "accelerator": "cpu",
        "max_steps": 3,
        "val_check_interval": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    recipe = {"run_dir": "run", "model": model, "data": data, "trainer": trainer}
    Path(path).write_text(yaml.safe_dump(recipe))
