"""Checkpoints that are written whole, hold all that a run needs to go on, and run nothing when they are read."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from lineara.runs.files import atomic_write, write_text

RECIPE = "lineara_recipe"
_RANDOM_STATE = "lineara_random_state"
# What a fit that goes on reads, beside the weights.
_TO_GO_ON = (_RANDOM_STATE, "loops", "optimizer_states", "lr_schedulers", "callbacks", "epoch", "global_step")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their place, then moved: a full disk or a kill leaves the old one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with atomic_write(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class SaveRunState(Callback):
    """Keeps with the checkpoints what Lightning's own do not hold.

    That is the recipe, so that a checkpoint alone rebuilds its network, and the state of torch's random numbers in each
    process, so that a resumed run on the CPU goes on as if it had never stopped.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._random_state: torch.Tensor | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_text(Path(trainer.default_root_dir) / "config.yaml", self.recipe)
        checkpoint[RECIPE] = self.recipe
        states = [torch.get_rng_state()] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, states[0])
        checkpoint[_RANDOM_STATE] = torch.stack(states)  # (processes, bytes)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != "fit":
            return
        states = checkpoint[_RANDOM_STATE].cpu().reshape(-1, len(torch.get_rng_state()))
        self._random_state = states[trainer.global_rank % len(states)].clone()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)


def choose_checkpoint(subcommand: str, run_dir: Path, given: str | None) -> Path | None:
    folder = run_dir / "checkpoints"
    last = folder / "last.ckpt"
    if subcommand == "fit" and given is None:
        if last.exists():
            raise ValueError(
                f"run_dir must be a folder without a run, got {run_dir}, which holds {last}; go on with that run by "
                "--ckpt_path last, or name another folder by --run_dir"
            )
        return None
    if subcommand == "fit" and given == "last" and not last.exists():
        return None
    path = {None: folder / "best.ckpt", "best": folder / "best.ckpt", "last": last}.get(given) or Path(str(given))
    read_checkpoint(path)
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        last = path.with_name("last.ckpt")
        if path.name == "best.ckpt" and last.is_file():
            raise FileNotFoundError(
                f"{path} must be a checkpoint, got no such file, but {last} of a run that was interrupted; use "
                "that one by --ckpt_path last, or go on with `lineara fit` and --ckpt_path last"
            )
        raise FileNotFoundError(
            f"{path} must be a checkpoint, got no such file; train first with `lineara fit`, or name another file"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on a damaged or foreign file is of many kinds
        raise ValueError(f"{path} must be a whole checkpoint of lineara, got a file that torch cannot read") from error
    if not isinstance(content, dict) or RECIPE not in content:
        raise ValueError(f"{path} must be a checkpoint written by `lineara fit`, got one without a recipe inside")
    return content


def check_usable(path: Path, task: nn.Module, *, to_go_on: bool) -> None:
    """Raise unless a checkpoint holds the weights of a task, and all else that a fit needs `to_go_on` from it."""
    content = read_checkpoint(path)
    reason = _mismatch(content.get("state_dict"), task.state_dict())
    if reason is None and to_go_on:
        reason = _missing_state(content)
    if reason is None and "loops" in content and not _tells_of_loops(content["loops"]):
        reason = "one whose loops are not those of a run"
    if reason is not None:
        raise ValueError(
            f"{path} must be a checkpoint that this run can {'go on from' if to_go_on else 'use'}, got {reason}; "
            "name another one by --ckpt_path, or begin a new run"
        )


def _mismatch(theirs: Any, ours: dict[str, Any]) -> str | None:
    if not isinstance(theirs, dict):
        return "one without weights"
    missing, foreign = (next((name for name in a if name not in b), None) for a, b in ((ours, theirs), (theirs, ours)))
    if missing is not None:
        return f"one without the weight {missing}"
    if foreign is not None:
        return f"one with the weight {foreign}, which the network has not"
    for name, weight in ours.items():
        if isinstance(weight, Tensor) and getattr(theirs[name], "shape", None) != weight.shape:
            shape = tuple(getattr(theirs[name], "shape", ()))
            return f"one whose weight {name} has the shape {shape}, not {tuple(weight.shape)}"
    return None


def _missing_state(content: dict[str, Any]) -> str | None:
    missing = next((key for key in _TO_GO_ON if key not in content), None)
    if missing is not None:
        return f"one without {missing}"
    state = content[_RANDOM_STATE]
    size = len(torch.get_rng_state())
    if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.numel() == 0 or state.numel() % size:
        return f"one whose {_RANDOM_STATE} is none of torch"
    return None


def _tells_of_loops(loops: Any) -> bool:
    names = ("fit_loop", "validate_loop", "test_loop", "predict_loop")
    return isinstance(loops, dict) and all(isinstance(loops.get(name), dict) and loops[name] for name in names)
