"""End a fit at the first loss or gradient that is not finite, before it reaches the weights."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

_ADVICE = (
    "lower the learning rate, clip gradients by --trainer.gradient_clip_val, or call again with "
    "--trainer.detect_anomaly true, which names the operation"
)


class CheckFinite(Callback):
    """Raise where the loss, the norm of the gradients, or a weight about to be saved is not finite.

    Under a gradient scaler, as with 16-mixed, the scaler leaves out updates by gradients that are not finite: there the
    loss alone counts.

    Cost: one pass over the gradients before each update. On a GPU nothing waits: the assertion fails on the device, a
    few steps may have been issued by then, and torch's message holds the sentence without numbers.

    Args:
        folder: of the checkpoints, named in the message.
    """

    def __init__(self, folder: Path | str) -> None:
        self._last = Path(folder) / "last.ckpt"
        self._batch = ""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        names = getattr(pl_module, "names_in", lambda batch: [])(batch)
        self._batch = f"batch {batch_idx} of the epoch" + (f" ({', '.join(map(str, names))})" if names else "")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not _is_scaled(trainer):
            self._check(trainer, "loss", loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        gradients = [weight.grad for weight in pl_module.parameters() if weight.grad is not None]
        if gradients and not _is_scaled(trainer):
            norm = get_total_norm(gradients)
            self._check(trainer, "norm of the gradients", getattr(norm, "full_tensor", lambda: norm)())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if loss is not None and _is_scaled(trainer):
            self._check(trainer, "loss", loss.detach())

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep weights that are not finite from taking the place of good ones."""
        names = {name for name, _ in pl_module.named_parameters()}
        for name, tensor in checkpoint["state_dict"].items():
            if (name in names or ".running_" in name) and not tensor.isfinite().all():
                raise ValueError(
                    f"the weights must be finite, got {name} that is not after step {trainer.global_step}; {_ADVICE}; "
                    f"{self._kept()}"
                )

    def _check(self, trainer: Trainer, what: str, number: Tensor) -> None:
        is_finite = number.isfinite().all()
        if number.is_cuda:
            torch._assert_async(  # pyright: ignore[reportPrivateImportUsage]
                is_finite, f"the {what} must be finite; {_ADVICE}; {self._kept()}"
            )
        elif not is_finite:
            raise ValueError(
                f"the {what} must be finite, got {number.item()} in step {trainer.global_step} on {self._batch}; "
                f"{_ADVICE}; {self._kept()}"
            )

    def _kept(self) -> str:
        return f"the last good checkpoint is {self._last if self._last.exists() else 'none yet'}"


def _is_scaled(trainer: Trainer) -> bool:
    return getattr(trainer.precision_plugin, "scaler", None) is not None
