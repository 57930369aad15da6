"""Runs in which something is not finite: they end before it reaches the weights, and the checkpoint is good."""

import pytest
import torch

from lineara.runs.nonfinite import CheckFinite
from lineara.runs.training import TrainingCommand
from lineara.tasks.long_range_arena import SequenceClassification

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step"),
    pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)"),
]


def fit(recipe, run_dir, *words):
    return TrainingCommand(["fit", "--config", str(recipe), "--run_dir", str(run_dir), *words])


def before_step(monkeypatch, step, spoil):
    """Do something to the task before one step."""
    training_step = SequenceClassification.training_step

    def spoil_first(self, batch, index):
        if self.global_step == step:
            spoil(self)
        return training_step(self, batch, index)

    monkeypatch.setattr(SequenceClassification, "training_step", spoil_first)


def multiply_answers(value):
    return lambda task: task.network.head.register_forward_hook(lambda module, given, answer: answer * value)


def multiply_a_gradient(task):
    task.network.head[2].bias.register_hook(lambda gradient: gradient * float("inf"))


def fill_a_weight(task):
    with torch.no_grad():
        task.network.head[0].weight[0, 0] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (multiply_answers(float("nan")), "loss must be finite, got nan"),
        (fill_a_weight, "loss must be finite, got nan"),
        (multiply_a_gradient, "norm of the gradients must be finite, got (inf|nan)"),
    ],
)
def test_the_run_ends_with_the_step_the_batch_and_the_last_good_checkpoint(
    tiny_recipe, tmp_path, monkeypatch, spoil, what
):
    before_step(monkeypatch, 7, spoil)
    with pytest.raises(ValueError, match=rf"^the {what} in step 7 on batch 7 of the epoch.*; lower the") as error:
        fit(tiny_recipe, tmp_path)
    last = tmp_path / "checkpoints/last.ckpt"
    assert f"the last good checkpoint is {last}" in str(error.value)
    saved = torch.load(last, weights_only=True)
    assert saved["global_step"] == 5
    assert all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_before_the_first_checkpoint_none_is_named(tiny_recipe, tmp_path, monkeypatch):
    before_step(monkeypatch, 0, multiply_answers(float("inf")))
    with pytest.raises(ValueError, match=r"in step 0 .* the last good checkpoint is none yet"):
        fit(tiny_recipe, tmp_path)


def test_weights_that_are_not_finite_do_not_take_the_place_of_good_ones(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(SequenceClassification, "on_train_batch_end", lambda self, *_: spoil_at_step_10(self))

    def spoil_at_step_10(task):
        if task.global_step == 10:
            fill_a_weight(task)

    with pytest.raises(ValueError, match=r"^the weights must be finite, got network\.head\.0\.weight .* after step 10"):
        fit(tiny_recipe, tmp_path)
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


def test_infinite_gradients_under_a_scaler_are_no_fault(tiny_recipe, tmp_path, monkeypatch):
    """As with float16: the scaled loss overflows, the loss does not, and the scaler leaves the update out."""
    seen = []
    check = CheckFinite.on_before_backward

    def overflow(self, trainer, task, loss):
        trainer.precision_plugin.scaler = object()
        seen.append(trainer.global_step)
        check(self, trainer, task, loss * float("inf") if trainer.global_step == 3 else loss)

    monkeypatch.setattr(CheckFinite, "on_before_backward", overflow)
    command = fit(tiny_recipe, tmp_path, "--trainer.max_steps", "6")
    assert seen == list(range(6))
    assert command.trainer.global_step == 6


def test_a_loss_that_is_not_finite_ends_a_run_with_a_scaler(tiny_recipe, tmp_path, monkeypatch):
    def scaled(task):
        task.trainer.precision_plugin.scaler = object()
        multiply_answers(float("nan"))(task)

    before_step(monkeypatch, 2, scaled)
    with pytest.raises(ValueError, match=r"^the loss must be finite, got nan in step 3 on batch 2"):
        fit(tiny_recipe, tmp_path)
