"""Checkpoints that are written whole, hold all that a run needs to go on, and run nothing when they are read."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lineara.tasks.files import write_text, written_whole

RECIPE = "lineara_recipe"
_RANDOM_STATE = "lineara_random_state"


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their place, then moved: a full disk or a kill leaves the old one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with written_whole(path) as temporary:
            temporary.write_bytes(content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        return super().load_checkpoint(path, map_location, weights_only=True)


class KeepRun(Callback):
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
