"""The training of an image classifier as ResNets are usually trained on ImageNet."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lineara.runs.files import write_text
from lineara.runs.sharding import ShardedTask, layers_wait
from lineara.tasks.step_schedule import StepSchedule, check_descent

_CLASSES = "lineara_classes"
_REFERENCE_BATCH = 256


class ImageClassification(ShardedTask):
    """Cross-entropy, SGD with momentum, and a learning rate that falls at some epochs.

        lr = base_lr x images per step / 256 x gamma^(milestones passed),    images per step = batch_size of the data
                                                                              x processes x accumulated batches

    Args:
        network: called on images (batch, 3, height, width), returns logits (batch, num_classes).
        num_classes: number of classes, as many as the data has.
        base_lr: learning rate for 256 images per step.
        milestones: epochs, counted from 0, at whose beginning the learning rate falls.
        gamma: what it is multiplied by.
        warmup_steps: optimiser steps in which it rises linearly from near 0.
        momentum: of SGD.
        weight_decay: of all weights.
        label_smoothing: share of the target that all classes have in common, in 0..1; counts in the training loss only.
        initial_weights: file of a plain network's weights, such as torchvision's, to begin with: see
            `lineara.models.pretrained.load_plain_weights`. A run that is resumed, and a test, do without.

    Source: He et al., CVPR 2016, arXiv 1512.03385; Goyal et al., 2017, "Accurate, Large Minibatch SGD", arXiv
    1706.02677, for the rule of the learning rate and its 90 epochs. We differ from the latter in that the scales of
    normalisation layers decay too, and that none starts at 0.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 1000,
        base_lr: float = 0.1,
        milestones: Sequence[int] = (30, 60, 80),
        gamma: float = 0.1,
        warmup_steps: int = 0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        label_smoothing: float = 0.0,
        initial_weights: str | None = None,
    ) -> None:
        super().__init__()
        check_descent(base_lr=base_lr, momentum=momentum, weight_decay=weight_decay)
        StepSchedule(1, milestones, gamma, warmup_steps)  # refuses what makes no schedule now, not when the run begins
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in 0..1, got {label_smoothing}")
        self.network = network
        self.num_classes = num_classes
        self.base_lr = base_lr
        self.milestones = list(milestones)
        self.gamma = gamma
        self.warmup_steps = warmup_steps
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.initial_weights = initial_weights
        self.class_names: list[str] | None = None
        ranks = {"accuracy": 1, "accuracy_top5": min(5, num_classes)}
        self.metrics = nn.ModuleDict(
            {
                f"{stage}/{name}": MulticlassAccuracy(num_classes, top_k=top_k, average="micro")
                for stage in ("train", "val", "test")
                for name, top_k in ranks.items()
            }
        )
        self.losses = nn.ModuleDict({f"{stage}_": MeanMetric(nan_strategy="disable") for stage in ("val", "test")})

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def load_initial_weights(self) -> None:
        """Load the file of initial weights, if any: what a run that does not go on from a checkpoint begins with."""
        if self.initial_weights is not None:
            from lineara.models.pretrained import load_plain_weights

            load_plain_weights(self.network, self.initial_weights)

    def on_fit_start(self) -> None:
        """Raise unless the data has as many classes as the network, and those of the run that is resumed."""
        self._check_classes()
        self.class_names = self._data().classes
        if self.trainer.ckpt_path is None:  # known from here on only, not yet in `setup`
            self.load_initial_weights()

    def on_test_start(self) -> None:
        self._check_classes()

    def on_validation_start(self) -> None:
        self._check_classes()

    def on_train_start(self) -> None:
        """Raise if a resumed run would go on otherwise than it was planned: its schedule counts in steps."""
        schedule: Any = self.lr_schedulers()
        [begun], [begun_lr] = schedule.lr_lambdas, schedule.base_lrs
        [group] = schedule.optimizer.param_groups  # as the checkpoint has it
        was = {"lr": begun_lr, **vars(begun), "momentum": group["momentum"], "weight_decay": group["weight_decay"]}
        plan = {"lr": self._lr(), **vars(self._schedule())}
        plan |= {"momentum": self.momentum, "weight_decay": self.weight_decay}
        if was != plan:
            raise ValueError(
                f"a resumed run must keep its schedule, got {_listed(plan)} but it was begun with {_listed(was)}; set "
                "them, the batch size and the number of processes as they were, or begin a new run"
            )

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        if len(batch["label"]) == 0 and layers_wait(self.network):
            raise ValueError(
                "a batch must hold an image that can be read where layers wait for other processes, got none in step "
                f"{self.global_step}; use --trainer.strategy ddp without sync_batchnorm, or mend the images"
            )
        if len(batch["label"]) == 0:  # nothing could be read: gradients of 0, for the other processes wait for some
            return torch.stack([weight.sum() for weight in self.network.parameters()]).sum() * 0.0
        return self._step("train", batch)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        if len(batch["label"]):
            self._step("val", batch)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        if len(batch["label"]):
            self._step("test", batch)

    def on_predict_start(self) -> None:
        self._rows: list[tuple[object, ...]] = []

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Any]:
        if not batch["file_name"]:
            return {"file_name": [], "probability": torch.empty(0, self.num_classes)}
        probability = self(batch["image"]).softmax(dim=1)
        confidences, answers = probability.cpu().max(dim=1)
        for file_name, confidence, answer in zip(batch["file_name"], confidences.tolist(), answers.tolist()):
            name = str(answer) if self.class_names is None else self.class_names[answer]
            self._rows.append((file_name, name, f"{confidence:.4f}"))
        return {"file_name": batch["file_name"], "probability": probability}

    def on_predict_end(self) -> None:
        """Write predictions.csv into the run's folder."""
        path = Path(self.trainer.default_root_dir) / "predictions.csv"
        text = io.StringIO()
        csv.writer(text).writerows([("file", "class", "probability"), *self._rows])
        write_text(path, text.getvalue())
        self.print(f"predictions: {path}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the names of the classes: their folders need not be there where the network is used."""
        checkpoint[_CLASSES] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.class_names = checkpoint[_CLASSES]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.network.parameters(), lr=self._lr(), momentum=self.momentum, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _lr(self) -> float:
        images = self._data().batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        return self.base_lr * images / _REFERENCE_BATCH

    def _schedule(self) -> StepSchedule:
        _ = self.trainer.estimated_stepping_batches  # counts the batches, unless they have been counted
        steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return StepSchedule(steps, self.milestones, self.gamma, self.warmup_steps)

    def _step(self, stage: str, batch: dict[str, Any]) -> Tensor:
        label = batch["label"]
        logits = self(batch["image"])
        if logits.shape[1] != self.num_classes:
            raise ValueError(
                f"the network must have num_classes = {self.num_classes} logits, got {logits.shape[1]}; set "
                "--model.init_args.num_classes and that of the network alike"
            )
        loss = cross_entropy(logits, label, label_smoothing=self.label_smoothing if stage == "train" else 0.0)
        options: dict[str, Any] = {
            "on_step": stage == "train",
            "on_epoch": stage != "train",
            "batch_size": len(label),
        }
        if stage == "train":
            self.log("train/loss", loss, prog_bar=True, **options)
        else:
            mean = self.losses[f"{stage}_"]
            assert isinstance(mean, MeanMetric)
            mean.update(loss.expand(len(label)))  # as a weight, torchmetrics would drop it beside "disable"
            # Metrics are of all processes by themselves, however many images each has.
            self.log(f"{stage}/loss", mean, prog_bar=True, **options)
        for name in ("accuracy", "accuracy_top5"):
            metric = self.metrics[f"{stage}/{name}"]
            assert isinstance(metric, Metric)
            metric(logits, label)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "accuracy", **options)
        return loss

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _check_classes(self) -> None:
        classes = self._data().classes
        if len(classes) != self.num_classes:
            raise ValueError(
                f"num_classes must be that of the data, got {self.num_classes} and {len(classes)}; set "
                "--model.init_args.num_classes and that of the network"
            )
        trained = self.class_names or classes
        if classes != trained:
            label = next(label for label in range(len(classes)) if classes[label] != trained[label])
            raise ValueError(
                f"the classes of the data must be those that the network was trained on, got {classes[label]} but "
                f"{trained[label]} for class {label}; name the same data set"
            )


def _listed(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value:g}" if name == "lr" else f"{name} {value}" for name, value in plan.items())
