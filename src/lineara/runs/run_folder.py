"""The folder of a run: one process's alone, and with room for what the run will write."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

# Tensors of a weight's size that an optimiser keeps of it; others are taken to keep two.
_KEPT = {"SGD": lambda options: int(options["momentum"] != 0), "Adam": lambda options: 2 + bool(options["amsgrad"])}
_KEPT["AdamW"] = _KEPT["Adam"]


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """As `folder_lock`, with one sentence for a folder that cannot be written."""
    with ExitStack() as stack:
        try:
            stack.enter_context(folder_lock(run_dir))
        except OSError as error:
            raise type(error)(
                f"run_dir must be a folder that can be written, got {run_dir} ({error.strerror or error}); free some "
                "space, or name another folder by --run_dir"
            ) from error
        yield


@contextmanager
def folder_lock(run_dir: Path) -> Iterator[None]:
    """Lock the run's folder for this process; the lock ends with the process, however that ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"run_dir must be a folder that no other `lineara fit` is writing to, got {run_dir}; wait for it, "
            "or name another folder by --run_dir"
        ) from error
    try:
        for leftover in (run_dir / "checkpoints").glob(".*.ckpt"):  # of a run that was killed while it wrote
            leftover.unlink()
        with tempfile.TemporaryFile(dir=run_dir) as file:
            file.write(b" " * 4096)  # a full disk still makes empty files
        yield
    finally:
        lock.release()


class CheckDiskSpace(Callback):
    """Refuses a fit whose checkpoints the disk has clearly no room for, before it begins."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        callbacks = [one for one in trainer.callbacks if isinstance(one, ModelCheckpoint)]  # type: ignore[attr-defined]
        if not callbacks:
            return
        each = checkpoint_bytes(pl_module, trainer.optimizers)
        # One more, because a new one is whole before the old one goes.
        number = 1 + sum(max(1, one.save_top_k) + bool(one.save_last) for one in callbacks)
        folder = Path(trainer.default_root_dir)
        there = sum(path.stat().st_size for path in (folder / "checkpoints").glob("*.ckpt"))
        free = shutil.disk_usage(folder).free
        if free + there < number * each:
            raise OSError(
                f"run_dir must have room for {number} checkpoints of {_size(each)}, got {_size(free)} free in {folder}"
                "; free some space, or name another folder by --run_dir"
            )


def checkpoint_bytes(task: nn.Module, optimizers: list[Any]) -> int:
    """What weights, buffers and the optimisers' memory of them will take in a checkpoint, at least."""
    total = sum(_bytes(tensor) for tensor in task.state_dict().values())
    for optimizer in optimizers:
        kept = _KEPT.get(type(optimizer).__name__, lambda options: 2)
        total += sum(kept(group) * _bytes(weight) for group in optimizer.param_groups for weight in group["params"])
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # of a sharded one, the whole


def _size(number: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
