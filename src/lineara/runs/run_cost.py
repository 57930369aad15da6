"""What a training run costs and reaches, measured by a callback from within and written into its run folder."""

import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lineara.measure.calls import all_time_maximum, reset_high_water_mark
from lineara.measure.machine import processor
from lineara.runs.files import write_text

_FOLDER = "measured"
# The first steps of every start build kernels, fill caches and grow the heap.
WARM_UP_STEPS = 10
# CUDA's marks are read, and waited for, once in so many steps.
_READ_EVERY = 100
_CUDA_MEMORY = "torch.cuda.max_memory_allocated during fit, the network counted"
_CPU_MEMORY = "growth of the process's resident memory during fit, network and data not counted"


class RunCost(Callback):
    """Writes `<run>/measured/start_<step>.json` at every validation and at the end of fit, `test.json` after a test.

    A step's time is that between the arrival of its batch and the end of its update, without the loading of data and
    without validation: by the clock, on a CUDA device by events of the device. The peak memory is
    torch.cuda.max_memory_allocated, and on the CPU the growth of resident memory from the start of fit, when the
    network and the data are in place.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._seconds: list[float] = []
        self._marks: list[tuple[Any, Any]] = []
        self._begun: Any = None
        self._memory_before = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _on_cuda(trainer):
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        else:
            reset_high_water_mark()  # where it cannot be, growth beyond the largest so far is what is measured
            self._memory_before = all_time_maximum()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self._begun = _mark(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        self._marks.append((self._begun, _mark(trainer)))
        if len(self._marks) >= _READ_EVERY:
            self._read_marks(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._step is not None:  # not in the trial validation before the training
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_text(Path(trainer.default_root_dir) / _FOLDER / "test.json", json.dumps(metrics, indent=1) + "\n")

    def _read_marks(self, trainer: Trainer) -> None:
        if _on_cuda(trainer):
            torch.cuda.synchronize(trainer.strategy.root_device)
            seconds = [begin.elapsed_time(end) / 1e3 for begin, end in self._marks]
        else:
            seconds = [end - begin for begin, end in self._marks]
        # A step of several batches is said to take as many times as long as one batch.
        self._seconds += [round(value * trainer.accumulate_grad_batches, 7) for value in seconds]
        self._marks.clear()

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self._read_marks(trainer)
        on_cuda, device = _on_cuda(trainer), trainer.strategy.root_device
        peak = torch.cuda.max_memory_allocated(device) if on_cuda else max(all_time_maximum() - self._memory_before, 0)
        step = trainer.global_step if self._step is None else self._step
        content = {
            "first_step": step,
            "seconds": self._seconds,
            "peak_bytes": peak,
            "memory": _CUDA_MEMORY if on_cuda else _CPU_MEMORY,
            "best_validation_score": _best_score(trainer),
            "num_parameters": sum(parameter.numel() for parameter in pl_module.parameters()),
            "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
            "versions": {name: version(name) for name in ("lineara", "torch", "lightning")}
            | {"python": platform.python_version()},
        }
        write_text(Path(trainer.default_root_dir) / _FOLDER / f"start_{step:09d}.json", json.dumps(content) + "\n")


def collect(run_dir: Path) -> dict[str, Any]:
    """One result out of what the starts of a run and its test have written.

    Returns:
        `metrics` (the numbers of the test), `seconds_per_step` (the median over the steps of all starts, without the
        first `WARM_UP_STEPS` of each; None where no step is left), `timed_steps`, `peak_bytes` (the largest of all
        starts), and from the last start `memory` (what `peak_bytes` is), `best_validation_score`, `num_parameters`,
        `device` and `versions`.
    """
    folder = run_dir / _FOLDER
    starts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("start_*.json"))]
    seconds = [value for start in starts for value in start["seconds"][WARM_UP_STEPS:]]
    return {
        "metrics": json.loads((folder / "test.json").read_text(encoding="utf-8")),
        "seconds_per_step": statistics.median(seconds) if seconds else None,
        "timed_steps": len(seconds),
        "starts": [{"first_step": start["first_step"], "steps": len(start["seconds"])} for start in starts],
        "peak_bytes": max(start["peak_bytes"] for start in starts),
        **{
            name: starts[-1][name]
            for name in ("memory", "best_validation_score", "num_parameters", "device", "versions")
        },
    }


def _on_cuda(trainer: Trainer) -> bool:
    return trainer.strategy.root_device.type == "cuda"


def _mark(trainer: Trainer) -> Any:
    if not _on_cuda(trainer):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _best_score(trainer: Trainer) -> float | None:
    scores = [
        callback.best_model_score
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None
    ]
    return float(scores[0]) if scores and scores[0] is not None else None


def _cpu_name() -> str:
    return f"CPU ({processor()}, {torch.get_num_threads()} threads)"
