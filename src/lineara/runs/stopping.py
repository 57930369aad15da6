"""End a training run early by a signal, with its checkpoint in order.

All processes agree on it in every step: a signal may reach one of them alone.
"""

import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

_SIGNALS = [signal.Signals[name] for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # the first on Windows
_GO_ON = "go on with the same command and --ckpt_path last"


class Stopped(SystemExit):
    """The end of a run by a signal, behind its checkpoint; the exit status is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopOnSignal(Callback):
    """End a fit at SIGTERM or SIGUSR1, after a checkpoint.

    All processes finish the step in which the signal comes, the checkpoint is written, and the process ends with the
    status 143 or 138. During validation, a single process stops after the batch, and a resumed run validates from the
    beginning; several processes finish the validation, since none knows in which batch the others are.

    Cost: several processes agree by one all-reduce of a number, while the gradients are reduced; one process does
    nothing.

    Args:
        folder: of the checkpoints; `last.ckpt` is written there.
    """

    def __init__(self, folder: Path | str) -> None:
        self._last = Path(folder) / "last.ckpt"
        self._asked = 0  # the signal that this process was sent
        self._agreed = 0  # the one that all processes know of
        self._read: Callable[[], int] | None = None
        self._step = 0
        self._updated = True  # else gradients have been gathered that no checkpoint holds
        self._validation_is_cut = False

    # Signals: from here on Lightning's own answers to them, which end in other statuses, are not in force.

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _answer(signal.SIG_DFL)  # nothing has been trained

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _answer(self._ask)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _answer(signal.SIG_DFL)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _answer(signal.SIG_DFL)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    # A step of training.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if trainer.world_size > 1:
            self._read = _largest(self._asked, loss.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._agreed = self._asked if self._read is None else self._read()
        self._updated = trainer.global_step > self._step
        if self._agreed and self._updated and not _is_done(trainer) and not _validates_now(trainer):
            self._stop(trainer, self._agreed)

    # Validation.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            _answer(signal.SIG_DFL)
        elif not trainer.sanity_checking:
            self._stop_validation(trainer, self._asked if trainer.world_size == 1 else self._agreed)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and trainer.world_size == 1:
            self._stop_validation(trainer, self._asked)

    def _stop_validation(self, trainer: Trainer, number: int) -> None:
        if number and self._updated and not _is_done(trainer):
            self._validation_is_cut = True
            self._stop(trainer, number)

    # Checkpoints.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._validation_is_cut:
            _restart_validation(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"])

    def _stop(self, trainer: Trainer, number: int) -> None:
        trainer.save_checkpoint(self._last, weights_only=False)
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            print(
                f"lineara: stopped by {name} after step {trainer.global_step}, which {self._last} holds; {_GO_ON}",
                file=sys.stderr,
                flush=True,
            )
        raise Stopped(number)


def _answer(handler: Any) -> None:
    if threading.current_thread() is threading.main_thread():  # elsewhere the system does not let us
        for number in _SIGNALS:
            signal.signal(number, handler)


def _largest(number: int, device: torch.device) -> Callable[[], int]:
    """Begin to bring the largest number of all processes here; what is returned waits for it, and for no more."""
    flag = torch.tensor(number, device=device)
    work = torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, async_op=True)
    assert work is not None
    if device.type != "cuda":
        return lambda: (work.wait(), int(flag))[1]
    # Beside the stream of the backward pass, which need not wait for this, nor this for it.
    aside = torch.cuda.Stream(device)
    with torch.cuda.stream(aside):
        work.wait()
        here = torch.empty((), dtype=flag.dtype, pin_memory=True)
        here.copy_(flag, non_blocking=True)
        flag.record_stream(aside)
        arrived = aside.record_event()
    return lambda: (arrived.synchronize(), int(here))[1]


def _is_done(trainer: Trainer) -> bool:
    """Whether this was the run's last step: what is left to do is done sooner than begun anew."""
    if 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = -1 if trainer.max_epochs is None else trainer.max_epochs
    return trainer.is_last_batch and 0 <= epochs <= trainer.current_epoch + 1


def _validates_now(trainer: Trainer) -> bool:
    """Whether validation follows this step: then it is stopped there, so that a resumed run does not leave it out."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]


def _restart_validation(progress: dict[str, Any]) -> None:
    """Make a checkpoint of the middle of a validation one of its first batch: it does not hold the scores so far."""
    progress["is_last_batch"] = False
    for name, done in (("total", progress["total"]["completed"]), ("current", 0)):
        progress[name] |= {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
