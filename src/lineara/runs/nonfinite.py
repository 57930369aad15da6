"""Where a loss that is not finite comes from: the weights, the batch, a layer, or the loss itself.

The search runs the batch once more with a hook on every layer. It happens after the fact alone, and costs nothing
before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

RandomState = tuple[Tensor, Tensor | None]


def random_state(device: torch.device) -> RandomState:
    """What the random numbers of the next step depend on; nothing is waited for."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def find_cause(trainer: Trainer, task: LightningModule, batch: Any, batch_index: int, state: RandomState) -> str | None:
    """Run a batch again whose loss was not finite, and say what was not finite first; None if nothing is now.

    Every process must call it, if one does: layers may wait for each other.

    Args:
        trainer: of the run.
        task: whose `training_step` is run, with nothing logged.
        batch: what it was given, with the number `batch_index`.
        state: by `random_state` before the step, so that what is dropped and drawn is the same.
    """
    first: list[str] = []

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def look(layer: nn.Module, given: Any, answer: Any) -> None:
            if not first and not _finite(answer):
                first.append(f"the layer {name} ({type(layer).__name__}) was the first to answer so")

        return layer.register_forward_hook(look)

    handles = [watch(name, layer) for name, layer in task.named_modules() if name]
    try:
        with _as_before(task, state), trainer.precision_plugin.train_step_context(), torch.no_grad():
            answer = task.training_step(batch, batch_index)
    finally:
        for handle in handles:
            handle.remove()
    if weight := _first_weight(trainer, task):
        return weight  # before the layers: the first one that uses it is no cause
    if given := _first_in_batch(batch):
        return f"{given} of the batch is not finite"
    if first:
        return first[0]
    loss = answer["loss"] if isinstance(answer, Mapping) else answer
    return None if loss is None or _finite(loss) else "the answers of all layers are finite, the loss itself is not"


def first_nonfinite(named: Iterator[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor that holds something not finite; of a sharded one, this process's part counts."""
    return next((name for name, tensor in named if not _finite(tensor)), None)


def last_good(folder: Path, counted: Callable[[str], bool]) -> Path | None:
    """The newest checkpoint of a folder that holds nothing which is not finite, or None.

    Args:
        folder: of the checkpoints.
        counted: whether a tensor of that name must be finite; the optimisers' memory must be in any case.
    """
    for path in sorted(folder.glob("[!.]*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            weights = [weight for name, weight in content["state_dict"].items() if counted(name)]
            if _finite(weights) and _finite([one["state"] for one in content["optimizer_states"]]):
                return path
        except Exception:  # whatever is wrong with it: it is no good one
            continue
    return None


def _first_weight(trainer: Trainer, task: LightningModule) -> str | None:
    name = first_nonfinite(task.named_parameters())
    if name is None:
        return None
    weight = task.get_parameter(name)
    moments = [
        moment
        for optimizer in trainer.optimizers
        for moment in optimizer.state.get(weight, {}).values()
        if isinstance(moment, Tensor) and moment.shape == weight.shape
    ]
    why = "" if all(map(_finite, moments)) else ", for its gradient was not"
    return f"the weight {name} has not been finite since the step before{why}"


def _first_in_batch(batch: Any, name: str = "") -> str | None:
    """The first images or tokens that are not finite; truths may hold such values where they do not count."""
    if not isinstance(batch, Mapping):
        return None
    inputs = [(key, batch[key]) for key in ("tokens", "image", "images", "left", "right") if key in batch]
    return next((key for key, value in inputs if not _finite(value)), None)


def _finite(value: Any) -> bool:
    """Whether every floating-point number in tensors, and in lists and dicts of them, is finite."""
    if isinstance(value, Tensor):
        local = getattr(value, "to_local", None)
        tensor = (value if local is None else local()).detach()
        return not tensor.is_floating_point() or bool(tensor.isfinite().all())
    if isinstance(value, Mapping):
        return all(map(_finite, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return all(map(_finite, value))
    return True


@contextmanager
def _as_before(task: LightningModule, state: RandomState) -> Iterator[None]:
    """As the step began: its random numbers; and nothing of what happens inside stays: buffers, what is logged."""
    after = random_state(task.device)
    buffers = {name: buffer.clone() for name, buffer in task.named_buffers()}
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    _draw_from(state, task.device)
    try:
        yield
    finally:
        del task.log
        _draw_from(after, task.device)
        for name, buffer in task.named_buffers():
            buffer.copy_(buffers[name])


def _draw_from(state: RandomState, device: torch.device) -> None:
    ours, devices = state
    torch.set_rng_state(ours)
    if devices is not None:
        torch.cuda.set_rng_state(devices, device)
