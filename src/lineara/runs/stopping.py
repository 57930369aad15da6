"""What ends a training run early, with its checkpoint in order: a signal, and a loss that is not finite.

Both are agreed on by all processes in every step: a signal may reach one of them alone, and so may a bad batch.
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

from lineara.runs.nonfinite import RandomState, find_cause, first_nonfinite, last_good, random_state

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GO_ON = "go on with the same command and --ckpt_path last"


class Stopped(SystemExit):
    """The end of a run by a signal, behind its checkpoint; the exit status is 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class StopInTime(Callback):
    """Ends a fit by SIGTERM or SIGUSR1 behind a checkpoint, and by a loss that is not finite with its cause.

    A signal is acted on behind the step in which it comes, of all processes: the checkpoint is written, and the process
    ends with the status 143 or 138. During validation, a single process acts behind the batch, and a resumed run
    validates anew; several processes finish the validation, for none knows in which batch the others are.

    Cost: a step's loss is read once its backward pass has been issued, by when the forward pass is over: the device
    has work to do meanwhile, and the update waits for nothing else. Several processes agree by one all-reduce of two
    numbers, while the gradients travel.

    Args:
        folder: of the checkpoints; `last.ckpt` is written there.
    """

    def __init__(self, folder: Path | str) -> None:
        self._last = Path(folder) / "last.ckpt"
        self._asked = 0  # the signal that this process was sent
        self._agreed = 0  # the one that all processes know of
        self._read: Callable[[], list[float]] | None = None
        self._state: RandomState | None = None
        self._batch: tuple[Any, int] = (None, 0)
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
        self._state, self._batch, self._step = random_state(pl_module.device), (batch, batch_idx), trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        bad = (~loss.detach().isfinite()).any().float()
        self._read = _agree(torch.stack([bad, torch.full_like(bad, self._asked)]), alone=trainer.world_size == 1)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._read is not None, "there was a loss"
        bad, number = self._read()
        self._agreed = int(number)
        if not bad:
            return
        assert self._state is not None
        cause = find_cause(trainer, pl_module, *self._batch, self._state)
        found = _first_of_all(trainer, cause and f"{_described(pl_module, *self._batch)}: {cause}")
        if found is None and getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # the loss is finite, and was not when scaled: the scaler leaves this update out
        if not trainer.is_global_zero:
            raise SystemExit(2)  # one process says it
        raise ValueError(
            f"the loss must be finite, got one that is not in step {trainer.global_step} on "
            f"{found or 'a batch with which it did not come again'}; lower the learning rate or clip gradients by "
            f"--trainer.gradient_clip_val, or look at this batch; the last good checkpoint is {self._kept(pl_module)}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = (None, 0)
        number = self._asked if trainer.world_size == 1 else self._agreed
        self._updated = trainer.global_step > self._step
        if number and self._updated and not _is_done(trainer) and not _validates_now(trainer):
            self._stop(trainer, number)

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
        """Keep weights that are not finite from taking the place of good ones."""
        weights = checkpoint["state_dict"]
        counted = _counted(pl_module)
        name = first_nonfinite((key, weights[key]) for key in weights if counted(key))
        if name is not None:
            raise ValueError(
                f"the weights must be finite, got {name} that is not after step {trainer.global_step}; lower the "
                "learning rate or clip gradients by --trainer.gradient_clip_val; the last good checkpoint is "
                f"{self._kept(pl_module)}"
            )
        if self._validation_is_cut:
            _begin_validation_anew(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"])

    def _kept(self, task: LightningModule) -> str:
        # Not `last.ckpt` unseen: the run may have gone on from one that was bad already.
        return str(last_good(self._last.parent, _counted(task)) or "none yet")

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


def _agree(flags: Tensor, *, alone: bool) -> Callable[[], list[float]]:
    """Begin to bring the largest flags of all processes here; what is returned waits for them, and for no more."""
    work = None if alone else torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, async_op=True)
    if flags.device.type != "cuda":
        return lambda: [work and work.wait(), flags.tolist()][1]  # type: ignore[return-value]
    # Beside the stream of the backward pass, which need not wait for this, nor this for it.
    aside = torch.cuda.Stream(flags.device)
    aside.wait_stream(torch.cuda.current_stream(flags.device))
    with torch.cuda.stream(aside):
        if work is not None:
            work.wait()
        here = torch.empty(flags.shape, pin_memory=True)
        here.copy_(flags, non_blocking=True)
        flags.record_stream(aside)
        arrived = aside.record_event()
    return lambda: [arrived.synchronize(), here.tolist()][1]  # type: ignore[return-value]


def _first_of_all(trainer: Trainer, found: str | None) -> str | None:
    """What the first process that found something says of it."""
    if trainer.world_size == 1:
        return found
    all_found: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(all_found, found)
    return next((f"process {rank}, {said}" for rank, said in enumerate(all_found) if said is not None), None)


def _described(task: LightningModule, batch: Any, index: int) -> str:
    names = getattr(task, "names_in", lambda batch: [])(batch)
    return f"batch {index} of the epoch" + (f" ({', '.join(map(str, names))})" if names else "")


def _counted(task: LightningModule) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint must be finite: weights, and what batch normalisation has seen."""
    weights = {name for name, _ in task.named_parameters()}
    return lambda name: name in weights or ".running_" in name


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


def _begin_validation_anew(progress: dict[str, Any]) -> None:
    """Make a checkpoint of the middle of a validation one of its first batch: it does not hold the scores so far."""
    progress["is_last_batch"] = False
    for name, done in (("total", progress["total"]["completed"]), ("current", 0)):
        progress[name] |= {"ready": done + 1, "started": done + 1, "processed": done, "completed": done}
