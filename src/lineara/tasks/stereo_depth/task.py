"""The training of a stereo network on smooth absolute errors, and its measurement by a named protocol."""

from collections.abc import Callable, Mapping, Sequence
from math import ceil, isfinite
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from lineara.runs.sharding import ShardedTask
from lineara.tasks.step_schedule import StepSchedule
from lineara.tasks.stereo_depth.calibration import Calibration
from lineara.tasks.stereo_depth.metrics import StereoScores, protocol_named
from lineara.tasks.stereo_depth.one_cycle import OneCycle
from lineara.tasks.stereo_depth.predictions import PredictionFolder
from lineara.tasks.stereo_depth.report import TestReport
from lineara.tasks.stereo_depth.transforms import colours

_PLAN = "lineara_plan"
_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_SCHEDULES = ("constant", "steps", "one_cycle")


class StereoDepth(ShardedTask):
    """Smooth-L1 between predicted and true disparities, over all pixels that are valid and in range.

        loss = sum_i loss_weights_i mean(smooth_l1(prediction_i - truth) where valid and 0 < truth < max_disparity)

    Args:
        network: called as network(left, right) on images (batch, 3, height, width); returns disparities (batch,
            height, width) in pixels, in training a tuple of as many as `loss_weights`, the last one the best.
        max_disparity: in pixels; pixels of larger truth count neither in the loss nor in the scores. The network's own.
        peak_lr: the learning rate, or its largest.
        optimizer: "adam" or "adamw".
        schedule: "constant"; "steps", multiplied by `gamma` at the beginning of the epochs `milestones`; or
            "one_cycle", which rises linearly over `warmup_share` of the run and falls linearly to almost nothing.
        milestones: epochs counted from 0, for "steps".
        gamma: the factor, for "steps".
        warmup_share: of the run's steps, for "one_cycle".
        weight_decay: of the optimiser, on all weights.
        loss_weights: of the network's disparities in training.
        protocol: by which validation and test are measured: one of `metrics.PROTOCOLS`.
        initial_weights: file of weights to begin with, or checkpoint of another run: see
            `lineara.models.pretrained.load_plain_weights`. A run that is resumed, and a test, do without.
        kitti_png: whether a prediction writes what KITTI's server wants, too.

    Source: Chang and Chen, "Pyramid Stereo Matching Network", CVPR 2018, arXiv 1803.08669, for the loss, its weights
    and the constant rate; Lipson et al., "RAFT-Stereo", 3DV 2021, arXiv 2109.07547, for the cycle.
    """

    prints_scores = True  # in a table of its own after a test

    def __init__(
        self,
        network: nn.Module,
        max_disparity: int = 192,
        peak_lr: float = 1e-3,
        optimizer: Literal["adam", "adamw"] = "adam",
        schedule: Literal["constant", "steps", "one_cycle"] = "constant",
        milestones: Sequence[int] = (),
        gamma: float = 0.1,
        warmup_share: float = 0.01,
        weight_decay: float = 0.0,
        loss_weights: Sequence[float] = (0.5, 0.7, 1.0),
        protocol: str = "default",
        initial_weights: str | None = None,
        kitti_png: bool = False,
    ) -> None:
        super().__init__()
        StepSchedule(1, milestones, gamma, 0)  # refuses milestones and factors that cannot be
        _check_schedule(optimizer, schedule, milestones, warmup_share)
        _check_loss(network, max_disparity, peak_lr, weight_decay, loss_weights)
        self.network = network
        self.max_disparity = max_disparity
        self.peak_lr = peak_lr
        self.optimizer = optimizer
        self.schedule = schedule
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup_share = warmup_share
        self.weight_decay = weight_decay
        self.loss_weights = tuple(loss_weights)
        self.protocol = protocol_named(protocol)
        self.initial_weights = initial_weights
        self.kitti_png = kitti_png
        self.val_scores = StereoScores(protocol, max_disparity)
        self.test_scores = StereoScores(protocol, max_disparity)
        self._plan: dict[str, float | str] = {}
        self._plan_of_checkpoint: dict[str, float | str] | None = None
        self._report: TestReport | None = None
        self._predictions: PredictionFolder | None = None

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Disparities (batch, height, width), float32, of the left view; in evaluation mode."""
        return self.network(left, right).float()

    def setup(self, stage: str) -> None:
        """Refuse a precision in which Lightning would round the batches."""
        precision = str(self.trainer.precision)
        if precision in ("bf16-true", "16-true", "transformer-engine", "transformer-engine-float16"):
            raise ValueError(
                f"precision must keep disparities in 32 bits or more, got {precision}, which rounds truths too; set "
                "--trainer.precision bf16-mixed"
            )

    def load_initial_weights(self) -> None:
        """Load the file of initial weights, if any: what a run that does not go on from a checkpoint begins with."""
        if self.initial_weights is not None:
            from lineara.models.pretrained import load_plain_weights

            load_plain_weights(self.network, self.initial_weights)

    # Training.

    def on_fit_start(self) -> None:
        """Load the initial weights, unless the run goes on from a checkpoint."""
        if self.trainer.ckpt_path is None:
            self.load_initial_weights()

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        answers = self.network(batch["left"], batch["right"])
        answers = (answers,) if isinstance(answers, Tensor) else answers
        if len(answers) != len(self.loss_weights):
            raise ValueError(
                f"loss_weights must be as many as the network's disparities, got {len(self.loss_weights)} and "
                f"{len(answers)}"
            )
        truth, counted = batch["disparity"], self._counted(batch)
        predicted = [answer.float()[counted] for answer in answers]  # each (pixels,)
        true, number = truth[counted], max(1, int(counted.sum()))
        # A sum over no pixels is 0 and has gradients of 0; a mean would be NaN.
        losses = [smooth_l1_loss(answer, true, reduction="sum") / number for answer in predicted]
        loss = torch.stack([weight * part for weight, part in zip(self.loss_weights, losses)]).sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(truth))
        if len(true):
            self.log("train/epe", (predicted[-1].detach() - true).abs().mean(), prog_bar=True, batch_size=len(truth))
        return loss

    def names_in(self, batch: dict[str, Any]) -> list[str]:
        """What a reason about a batch calls its pairs."""
        return batch["name"]

    def configure_optimizers(self) -> Any:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = _OPTIMIZERS[self.optimizer](trained, lr=self.peak_lr, weight_decay=self.weight_decay)
        self._plan, factor = self._planned()
        if self.trainer.ckpt_path is not None and self._plan_of_checkpoint not in (None, self._plan):
            raise ValueError(
                f"a resumed run must keep its schedule, got {_listed(self._plan)} but it was begun with "
                f"{_listed(self._plan_of_checkpoint or {})}; set them, the batch and the devices as they were, or "
                "begin a new run"
            )
        if factor is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the schedule was made for."""
        checkpoint[_PLAN] = self._plan

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._plan_of_checkpoint = checkpoint.get(_PLAN)

    def _planned(self) -> tuple[dict[str, float | str], Callable[[int], float] | None]:
        """What a resumed run must keep, and what the learning rate is multiplied by; None where it is constant."""
        self.trainer.fit_loop.setup_data()  # counts the batches, unless they have been counted
        total_steps = self.trainer.estimated_stepping_batches
        steps = ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        plan: dict[str, float | str] = {
            "optimizer": self.optimizer,
            "peak_lr": self.peak_lr,
            "weight_decay": self.weight_decay,
            "loss_weights": str(list(self.loss_weights)),
            "schedule": self.schedule,
            "pairs per step": self._data().batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches,
            "steps per epoch": steps,
        }
        if self.schedule == "constant":
            return plan, None
        if self.schedule == "steps":
            plan |= {"milestones": str(list(self.milestones)), "gamma": self.gamma}
            return plan, StepSchedule(steps, self.milestones, self.gamma, 0)
        if not isfinite(total_steps):
            raise ValueError(
                "the schedule 'one_cycle' must know the run's length, got a run without end; set --trainer.max_epochs "
                "or --trainer.max_steps"
            )
        plan |= {"steps": total_steps, "warmup_share": self.warmup_share}
        return plan, OneCycle(int(total_steps), self.warmup_share)

    def _counted(self, batch: dict[str, Any]) -> Tensor:
        """(batch, height, width): the pixels that count in the loss, whatever the protocol."""
        truth = batch["disparity"]
        return batch["valid"] & (truth > 0) & (truth < self.max_disparity)

    # Measurement.

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self._measure(batch, self.val_scores)

    def test_step(self, batch: dict[str, Any], batch_index: int) -> None:
        cut, prediction = self._measure(batch, self.test_scores)
        if self._report is not None:
            self._report.add(cut, prediction, image=colours(cut["left"][0]))

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val", self.val_scores)

    def on_test_start(self) -> None:
        """Ask for the trivial answers now: what is missing for them is better said before the test than behind it."""
        trivial: Mapping[str, Tensor] = {}
        if self.trainer.world_size == 1 and hasattr(self._data(), "trivial_answers"):
            trivial = self._data().trivial_answers("test")
        self._report = None
        if self.trainer.is_global_zero:
            self._report = TestReport(self.trainer.default_root_dir, self.protocol, self.max_disparity, trivial)

    def on_test_epoch_end(self) -> None:
        """Print the scores, and write them and a picture of the first frame into the run's folder."""
        scores = self._log_scores("test", self.test_scores)
        if self._report is not None:
            self.print(self._report.finish(scores))
        self._report = None

    def _measure(self, batch: dict[str, Any], scores: StereoScores) -> tuple[dict[str, Any], Tensor]:
        """Score the disparities of a batch; returns what of it the protocol evaluates, and them."""
        images = {name: self.protocol.cut(batch[name]) for name in ("left", "right", "disparity", "valid")}
        prediction = self.protocol.predict(self, images["left"], images["right"])
        if "again" not in batch:
            scores.update(prediction, images["disparity"], images["valid"], batch["name"])
        return {**images, "name": batch["name"]}, prediction

    def _log_scores(self, stage: str, scores: StereoScores) -> dict[str, float]:
        measured = scores.compute()
        scores.reset()
        for name, value in measured.items():
            if not name.startswith("frames"):
                # Equal on all processes: the mean over them changes nothing, and is what Lightning asks for.
                self.log(f"{stage}/{name}", value, sync_dist=True, prog_bar=name == "epe")
        return measured

    # Predictions.

    def on_predict_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(
                f"predict must run on one device, got {self.trainer.world_size}; call it with --trainer.devices 1"
            )
        self._predictions = PredictionFolder(Path(self.trainer.default_root_dir) / "predictions", kitti=self.kitti_png)

    def predict_step(self, batch: dict[str, Any], batch_index: int) -> list[str]:
        assert self._predictions is not None
        names = batch["name"]
        cameras = [Calibration(**numbers) for numbers in batch.get("calibration", ())] or [None] * len(names)
        return [
            str(self._predictions.add(disparity, name=name, left=left, calibration=calibration))
            for disparity, name, left, calibration in zip(
                self(batch["left"], batch["right"]), names, colours(batch["left"]), cameras
            )
        ]

    def on_predict_end(self) -> None:
        assert self._predictions is not None
        self._predictions.check_not_empty()
        self.print(f"predictions: {self._predictions.folder}")
        self._predictions = None

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _check_schedule(optimizer: str, schedule: str, milestones: Sequence[int], warmup_share: float) -> None:
    for name, value, known in (("optimizer", optimizer, _OPTIMIZERS), ("schedule", schedule, _SCHEDULES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if bool(milestones) != (schedule == "steps"):
        raise ValueError(
            f"milestones must be given for the schedule 'steps' and for no other, got {list(milestones)} for "
            f"{schedule!r}"
        )
    if not 0 <= warmup_share < 1:
        raise ValueError(f"warmup_share must be from 0 to below 1, got {warmup_share}")


def _check_loss(
    network: nn.Module, max_disparity: int, peak_lr: float, weight_decay: float, loss_weights: Sequence[float]
) -> None:
    if not 0 < peak_lr < float("inf"):
        raise ValueError(f"peak_lr must be a number above 0, got {peak_lr}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay}")
    if not loss_weights or min(loss_weights) < 0 or not 0 < sum(loss_weights) < float("inf"):
        raise ValueError(f"loss_weights must be numbers of at least 0, not all 0, got {list(loss_weights)}")
    own = getattr(network, "max_disparity", max_disparity)
    if max_disparity < 1 or own != max_disparity:
        raise ValueError(
            f"max_disparity must be at least 1 and the network's, got {max_disparity} and {own}; set both alike"
        )


def _listed(plan: Mapping[str, float | str]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:g}'}" for name, value in plan.items())
