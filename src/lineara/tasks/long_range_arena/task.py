"""The training of a sequence classifier as the arena's published PyTorch harness does it."""

import csv
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lineara.nn.router import Router
from lineara.runs.files import write_text
from lineara.runs.sharding import ShardedTask


class SequenceClassification(ShardedTask):
    """Cross-entropy, AdamW without weight decay, and a linear one-cycle schedule over the steps of the run.

    Args:
        network: called as network(tokens, mask=mask) with those of a batch (see `data`), returns logits
            (batch, num_classes).
        num_classes: number of classes.
        peak_lr: highest learning rate.
        warmup_steps: optimiser steps until it is reached; it falls linearly until the last step of the run.
        load_balancing: weight in the loss of the load balancing terms of the network's routers, summed; what is logged
            as the loss is without them. Without routers it means nothing.
        sequence_parallel: processes that share the positions of each batch, under the strategy fsdp; the others share
            the batches. Not with softmax attention.

    Raises:
        ValueError: for a network whose positions cannot be shared, where that is asked for.

    Source: the settings of mlpen/Nystromformer's Long Range Arena harness: AdamW (0.9, 0.999), eps 1e-6.
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        peak_lr: float = 1e-4,
        warmup_steps: int = 1000,
        load_balancing: float = 0.01,
        sequence_parallel: int = 1,
    ) -> None:
        super().__init__()
        if sequence_parallel < 1:
            raise ValueError(f"sequence_parallel must be at least 1, got {sequence_parallel}")
        if sequence_parallel > 1:
            _check_shares_positions(network, sequence_parallel)
        self.network = network
        self.num_classes = num_classes
        self.sequence_parallel = sequence_parallel
        self.peak_lr = peak_lr
        self.warmup_steps = warmup_steps
        self.load_balancing = load_balancing
        self._routers = [module for module in network.modules() if isinstance(module, Router)]
        self.accuracy = nn.ModuleDict(
            {f"{stage}_": MulticlassAccuracy(num_classes, average="micro") for stage in ("train", "val", "test")}
        )
        self.losses = nn.ModuleDict({f"{stage}_": MeanMetric(nan_strategy="disable") for stage in ("val", "test")})
        self._rows: list[tuple[object, ...]] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.network(batch["tokens"], mask=batch["mask"])

    def setup(self, stage: str) -> None:
        """Refuse data of more classes, or fewer, than the network tells apart."""
        classes = getattr(self.trainer.datamodule, "classes", None)  # type: ignore[attr-defined]
        if classes and len(classes) != self.num_classes:
            raise ValueError(
                f"num_classes must be that of the data, got {self.num_classes} and the {len(classes)} classes "
                f"{', '.join(classes)}; set --model.init_args.num_classes and that of the network"
            )

    def on_train_start(self) -> None:
        """Raise unless a resumed run is as long as it was planned: its learning rates depend on that."""
        schedule = self.lr_schedulers()
        if not isinstance(schedule, torch.optim.lr_scheduler.OneCycleLR):
            return
        total_steps = int(self.trainer.estimated_stepping_batches)
        if schedule.total_steps != total_steps:
            raise ValueError(
                f"a resumed run must keep its number of steps, got {total_steps} but it was begun with "
                f"{schedule.total_steps}; set --trainer.max_steps {schedule.total_steps}, or begin a new run"
            )

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        loss = self._step("train", batch)
        for layer, router in enumerate(self._routers):
            routing = router.last
            assert routing is not None, "the network has just been called"
            loss = loss + self.load_balancing * routing.load_balancing
            for head, share in enumerate(routing.load):
                # Of this process's positions: where several share them, the mean.
                self.log(f"train/load_layer{layer}_head{head}", share, sync_dist=self.sequence_parallel > 1)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._step("val", batch)

    def test_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        self._step("test", batch)

    def on_validation_epoch_end(self) -> None:
        self._log_trivial_accuracies("val")

    def on_test_epoch_end(self) -> None:
        self._log_trivial_accuracies("test")

    def predict_step(self, batch: dict[str, Tensor], batch_index: int) -> dict[str, Tensor]:
        probability = self(batch).softmax(dim=1)
        confidences, answers = probability.cpu().max(dim=1)
        rows = zip(answers.tolist(), confidences.tolist(), batch["label"].tolist(), batch["tokens"].cpu().numpy())
        # As text at once: the tokens of all batches would fill the memory.
        describe = self.trainer.datamodule.describe  # type: ignore[attr-defined]
        self._rows += [
            (answer, f"{confidence:.4f}", label, describe(tokens)) for answer, confidence, label, tokens in rows
        ]
        return {"label": batch["label"], "probability": probability}

    def on_predict_end(self) -> None:
        """Write predictions.csv into the run's folder."""
        path = Path(self.trainer.default_root_dir) / "predictions.csv"
        text = io.StringIO()
        csv.writer(text).writerows([("prediction", "probability", "label", "tokens"), *self._rows])
        write_text(path, text.getvalue())
        self._rows.clear()
        self.print(f"predictions: {path}")

    def check_length(self, total_steps: int) -> None:
        """Raise unless the warm-up fits into a run of so many steps; a fit asks before it prepares data."""
        if not 1 < self.warmup_steps < total_steps:
            raise ValueError(
                f"warmup_steps must lie between 1 and the run's {total_steps} steps, got {self.warmup_steps}; "
                "set --model.init_args.warmup_steps or --trainer.max_steps"
            )

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.peak_lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0
        )
        total_steps = int(self.trainer.estimated_stepping_batches)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return optimizer
        self.check_length(total_steps)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.peak_lr,
            total_steps=total_steps,
            pct_start=self.warmup_steps / total_steps,
            anneal_strategy="linear",
            cycle_momentum=False,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, stage: str, batch: dict[str, Tensor]) -> Tensor:
        logits = self(batch)
        loss = cross_entropy(logits, batch["label"])
        accuracy = self.accuracy[f"{stage}_"]
        assert isinstance(accuracy, MulticlassAccuracy)
        accuracy(logits, batch["label"])
        options: dict[str, Any] = {
            "on_step": stage == "train",
            "on_epoch": stage != "train",
            "batch_size": len(logits),
            "prog_bar": True,
        }
        if stage == "train":  # of several processes the mean: a step's batches are equally large
            self.log("train/loss", loss, sync_dist=True, **options)
        else:
            mean = self.losses[f"{stage}_"]
            assert isinstance(mean, MeanMetric)
            mean.update(loss.expand(len(logits)))  # as a weight, torchmetrics would drop it beside "disable"
            # Metrics are of all processes by themselves, however many examples each has.
            self.log(f"{stage}/loss", mean, **options)
        self.log(f"{stage}/accuracy", accuracy, **options)
        return loss

    def _log_trivial_accuracies(self, stage: str) -> None:
        trivial = self.trainer.datamodule.trivial_accuracies(stage)  # type: ignore[attr-defined]
        for name, accuracy in trivial.items():
            self.log(f"{stage}/accuracy_of_{name}", accuracy, sync_dist=True)


def _check_shares_positions(network: nn.Module, processes: int) -> None:
    """Raise before any process is started, unless several can share the positions of the network."""
    why = f"{type(network).__name__} has no method shard_positions"
    if hasattr(network, "shard_positions"):
        try:
            network.shard_positions(None)  # type: ignore[operator]
        except ValueError as error:
            why = str(error)
        else:
            return
    raise ValueError(f"sequence_parallel must be 1 for this network, got {processes}: {why}")
