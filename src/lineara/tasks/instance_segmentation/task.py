"""The training of a detector with masks by the usual schedule of 12 epochs, and its measurement as COCO does it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineara.runs.sharding import ShardedTask
from lineara.tasks.instance_segmentation.metrics import Evaluation, as_results, evaluate
from lineara.tasks.instance_segmentation.predictions import (
    PredictionFolder,
    statistics_table,
    write_evaluation,
    write_results,
)
from lineara.tasks.step_schedule import StepSchedule, check_descent

_Batch = dict[str, list[Any]]
_PLAN = "lineara_plan"


class InstanceSegmentation(ShardedTask):
    """Stochastic gradient descent on the detector's own losses, by the schedule that is known as 1x.

    The learning rate is base_lr x images per optimiser step / reference_batch, over all devices and accumulated
    batches. It rises linearly from a thousandth of that over the warm-up, and falls at every milestone.

    A detector of torchvision: in training mode called as network(images, targets), it returns a dict of losses; in
    evaluation mode, called as network(images), a list of dicts of boxes, labels, scores and masks.

    Args:
        network: a detector with masks, such as `models.mask_rcnn`; what it has frozen stays frozen.
        num_classes: of the network, the background included.
        base_lr: learning rate at `reference_batch` images per step.
        reference_batch: images per step that `base_lr` is meant for.
        milestones: epochs, counted from 0, at whose beginning the learning rate is multiplied by `gamma`.
        gamma: the factor.
        warmup_steps: optimiser steps until the learning rate is reached.
        momentum: of the optimiser.
        weight_decay: of the optimiser, on all weights.
        initial_weights: file of a state dict of torchvision's detector, loaded at the beginning of a run.
        initial_backbone_weights: file of a state dict of torchvision's ResNet instead, loaded into the backbone.
        score_threshold: the least score of a detection that `predict` draws and writes; measurements use all.

    Source: He et al., Mask R-CNN, ICCV 2017, arXiv 1703.06870; the 1x schedule of Detectron: 12 epochs of COCO,
    0.02 for 16 images, weight decay 1e-4, a tenth after 8 and after 11 epochs.
    """

    prints_scores = True  # in a table of its own after a test

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 91,
        base_lr: float = 0.02,
        reference_batch: int = 16,
        milestones: Sequence[int] = (8, 11),
        gamma: float = 0.1,
        warmup_steps: int = 500,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        initial_weights: str | None = None,
        initial_backbone_weights: str | None = None,
        score_threshold: float = 0.5,
    ) -> None:
        super().__init__()
        if initial_weights is not None and initial_backbone_weights is not None:
            raise ValueError(
                "at most one of initial_weights and initial_backbone_weights must be given, got both; the former hold "
                "a backbone already"
            )
        if not 0 <= score_threshold <= 1:
            raise ValueError(f"score_threshold must lie in 0..1, got {score_threshold}")
        if not reference_batch >= 1:
            raise ValueError(f"reference_batch must be at least 1 image, got {reference_batch}")
        check_descent(base_lr=base_lr, momentum=momentum, weight_decay=weight_decay)
        StepSchedule(1, milestones, gamma, warmup_steps)  # refuses what makes no schedule now, not when the run begins
        _check_num_classes(network, num_classes)
        self.network = network
        self.num_classes = num_classes
        self.base_lr = base_lr
        self.reference_batch = reference_batch
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup_steps = warmup_steps
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.initial_weights = initial_weights
        self.initial_backbone_weights = initial_backbone_weights
        self.score_threshold = score_threshold
        self._results: dict[int, list[dict[str, Any]]] = {}  # of the images seen in this pass over a split
        self._plan: dict[str, float | str] = {}
        self._plan_of_checkpoint: dict[str, float | str] | None = None
        self._predictions: PredictionFolder | None = None

    def forward(self, batch: _Batch) -> list[dict[str, Tensor]]:
        """The detections in each image of a batch, in evaluation mode."""
        return self.network(batch["images"]) if batch["images"] else []

    def setup(self, stage: str) -> None:
        """Refuse data of more categories than the network knows."""
        if stage != "predict":
            largest = max(self._data().categories, default=0)
            if largest >= self.num_classes:
                raise ValueError(
                    f"num_classes must exceed the categories' ids, got {self.num_classes} and the id {largest}; set it "
                    "for the task and for the network alike"
                )

    def load_initial_weights(self) -> None:
        """Load the files of initial weights, if any: what a run that does not go on from a checkpoint begins with."""
        from lineara.models.pretrained import load_plain_weights

        if self.initial_weights is not None:
            load_plain_weights(self.network, self.initial_weights)
        if self.initial_backbone_weights is not None:
            load_plain_weights(self.network, self.initial_backbone_weights, part="backbone.body")

    # Training.

    def on_fit_start(self) -> None:
        """Load the initial weights, unless the run goes on from a checkpoint."""
        if self.trainer.ckpt_path is None:
            self.load_initial_weights()

    def training_step(self, batch: _Batch, batch_index: int) -> Tensor:
        losses: dict[str, Tensor] = self.network(batch["images"], batch["targets"])
        loss = torch.stack([value.float() for value in losses.values()]).sum()
        for name, value in {"loss": loss, **losses}.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch["images"]))
        return loss

    def names_in(self, batch: _Batch) -> list[str]:
        """What a reason about a batch calls its images."""
        return [f"image {target['image_id']}" for target in batch["targets"]]

    def check_length(self, total_steps: int) -> None:
        """Raise unless the warm-up fits into a run of so many steps; a fit asks before it prepares data."""
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"warmup_steps must be below the run's {total_steps} steps, got {self.warmup_steps}; "
                "set --model.init_args.warmup_steps or --trainer.max_epochs"
            )

    def configure_optimizers(self) -> Any:
        trained = [weight for weight in self.parameters() if weight.requires_grad]
        images_per_step = self._images_per_step()
        lr = self.base_lr * images_per_step / self.reference_batch
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=self.momentum, weight_decay=self.weight_decay)
        steps_per_epoch = self._steps_per_epoch()
        total_steps = self.trainer.estimated_stepping_batches
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.check_length(int(total_steps))
        self._plan = {
            "learning rate": lr,
            "images per step": images_per_step,
            "steps per epoch": steps_per_epoch,
            "milestones": str(list(self.milestones)),
            "gamma": self.gamma,
            "warmup_steps": self.warmup_steps,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
        }
        if self.trainer.ckpt_path is not None and self._plan_of_checkpoint not in (None, self._plan):
            raise ValueError(
                f"a resumed run must keep its schedule, got {_listed(self._plan)} but it was begun with "
                f"{_listed(self._plan_of_checkpoint or {})}; set them, the batch and the devices as they were, or "
                "begin a new run"
            )
        factor = StepSchedule(steps_per_epoch, self.milestones, self.gamma, self.warmup_steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what the schedule was made for."""
        checkpoint[_PLAN] = self._plan

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._plan_of_checkpoint = checkpoint.get(_PLAN)

    # Measurement.

    def validation_step(self, batch: _Batch, batch_index: int) -> None:
        self._collect(batch)

    def test_step(self, batch: _Batch, batch_index: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluate("val")
        self._results = {}

    def on_test_epoch_end(self) -> None:
        """Print the statistics, and write them and the detections into the run's folder."""
        evaluation = self._evaluate("test")
        num_images, annotations = len(self._results), self._data().annotations("test")
        results = self._with_ids(annotations)
        self._results = {}
        if not self.trainer.is_global_zero:
            return
        left_out = len(annotations["images"]) + annotations.get("num_left_out", 0) - num_images
        write_results(self.trainer.default_root_dir, results)
        if evaluation is not None:
            write_evaluation(self.trainer.default_root_dir, evaluation, num_images=num_images, left_out=left_out)
            self.print(statistics_table(evaluation.statistics, num_images=num_images, left_out=left_out))
        self.print(f"results: {Path(self.trainer.default_root_dir) / 'results.json'}")

    def _collect(self, batch: _Batch) -> None:
        for target, prediction in zip(batch["targets"], self(batch)):
            image_id = int(target["image_id"])
            self._results[image_id] = as_results(image_id, prediction)

    def _evaluate(self, stage: str) -> Evaluation | None:
        """Log the statistics of the images seen; returns them on the first process, None on others or without truth.

        Only the images seen count: a part of the split before training, or one that `limit_val_batches` cuts short, is
        measured as if the rest did not exist.
        """
        self._gather()
        evaluation = None
        annotations = self._data().annotations(stage)
        if self.trainer.is_global_zero and annotations["annotations"] is not None:
            evaluation = evaluate(annotations, self._with_ids(annotations), image_ids=sorted(self._results))
        statistics = self.trainer.strategy.broadcast(evaluation.statistics if evaluation else {})
        for name, value in statistics.items():
            # Equal on all processes: the mean over them changes nothing, and is what Lightning asks for.
            self.log(f"{stage}/{name}", value, sync_dist=True, prog_bar=name == "mask_ap")
        return evaluation

    def _with_ids(self, annotations: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The results of all images, in the order of their ids, with the file's category ids in place of labels.

        Labels that the file has no category for are left out.
        """
        labels = annotations.get("labels") or {category["id"]: category["id"] for category in annotations["categories"]}
        ids = {label: number for number, label in labels.items()}
        return [
            result | {"category_id": ids[result["category_id"]]}
            for image_id in sorted(self._results)
            for result in self._results[image_id]
            if result["category_id"] in ids
        ]

    def _gather(self) -> None:
        """Bring what all processes have seen to the first one; an image that two of them have seen counts once."""
        if self.trainer.world_size == 1:
            return
        parts = [{} for _ in range(self.trainer.world_size)] if self.trainer.is_global_zero else None
        torch.distributed.gather_object(self._results, parts, dst=0)
        for part in parts or ():
            self._results |= part

    # Predictions.

    def on_predict_start(self) -> None:
        if self.trainer.world_size > 1:
            raise ValueError(
                f"predict must run on one device, got {self.trainer.world_size}; call it with --trainer.devices 1"
            )
        categories = self._data().categories
        folder = Path(self.trainer.default_root_dir) / "predictions"
        self._predictions = PredictionFolder(folder, categories, score_threshold=self.score_threshold)

    def predict_step(self, batch: _Batch, batch_index: int) -> list[str]:
        assert self._predictions is not None
        return [
            str(self._predictions.add(image, prediction, file_name=target["file_name"], image_id=target["image_id"]))
            for image, target, prediction in zip(batch["images"], batch["targets"], self(batch))
        ]

    def on_predict_end(self) -> None:
        """Write the detections in all images beside their pictures."""
        assert self._predictions is not None
        self.print(f"predictions: {self._predictions.finish()}")
        self._predictions = None

    # What the run's size says.

    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def _images_per_step(self) -> int:
        return self._data().batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _steps_per_epoch(self) -> int:
        self.trainer.fit_loop.setup_data()  # as `estimated_stepping_batches` does it, but without epochs it does not
        return max(1, -(-int(self.trainer.num_training_batches) // self.trainer.accumulate_grad_batches))


def _check_num_classes(network: nn.Module, num_classes: int) -> None:
    """Raise if the network is one of torchvision's with another number: its error would come late, from the device."""
    try:
        layer = network.get_submodule("roi_heads.box_predictor.cls_score")
    except AttributeError:
        return
    if getattr(layer, "out_features", num_classes) != num_classes:
        raise ValueError(
            f"num_classes must be the network's, background included, got {num_classes} and {layer.out_features}; set "
            "both alike"
        )


def _listed(plan: Mapping[str, float | str]) -> str:
    return ", ".join(
        f"{name} {value if isinstance(value, str) else format(value, 'g')}" for name, value in plan.items()
    )
