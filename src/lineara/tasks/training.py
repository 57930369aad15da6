"""The training commands of every task: Lightning's command line, a run folder, and checkpoints that can be reused.

A run folder holds

    checkpoints/best.ckpt, last.ckpt    by the validation score, and of the last validation; with the recipe inside
    metrics/version_<n>/metrics.csv     every logged number, one version per start of the run
    tensorboard/version_<n>/            the same for TensorBoard
    config.yaml                         the recipe of the last start, with every default filled in
"""

import ast
import fcntl
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lineara.tasks.files import write_text, written_whole

_RECIPE = "lineara_recipe"
_RANDOM_STATE = "lineara_random_state"


class TrainingCommand(LightningCLI):
    """`lineara fit | validate | test | predict`, over a run folder.

    Args:
        args: the words of the command line, or a whole recipe as a dict when `run` is False.
        run: whether the first word is a subcommand, to be run; False only instantiates `model`, `datamodule` and
            `trainer`.
        instantiate: False only parses.
    """

    def __init__(self, args: list[str] | dict[str, Any], *, run: bool = True, instantiate: bool = True) -> None:
        self._instantiate = instantiate
        parser_options = {"exit_on_error": False, "dump_header": None}
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs=parser_options
            | {"prog": "lineara"}
            | {name: dict(parser_options) for name in self.subcommands()},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/unnamed", help="Folder of the run's files.")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.monitor": "val/accuracy",
                "checkpoint.mode": "max",
                "checkpoint.filename": "best",
                "checkpoint.enable_version_counter": False,
                "checkpoint.save_on_train_epoch_end": False,
            }
        )
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=_checkpoint_folder)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | dict[str, Any]) -> None:
        try:
            self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)
        except ArgumentError as error:
            raise ValueError(_complaint(str(error))) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"a recipe must be a text file in UTF-8, got one that is not: {error}") from error
        if subcommand := self.config.get("subcommand"):
            config = self.config[subcommand]
            checkpoint = _choose_checkpoint(subcommand, Path(config.run_dir), config.ckpt_path)
            if checkpoint is not None:
                _check_network(self._recipe(subcommand), checkpoint)
            config.ckpt_path = None if checkpoint is None else str(checkpoint)

    def instantiate_classes(self) -> None:
        if self._instantiate:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run_dir = Path(self._get(self.config, "run_dir"))
        kwargs["default_root_dir"] = str(run_dir)
        if self.subcommand is None:  # to look into the network, wherever the recipe is to be trained
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif self._get(self.config, "trainer").logger is None:
            kwargs["logger"] = [
                CSVLogger(run_dir, name="metrics"),
                TensorBoardLogger(run_dir, name="tensorboard"),
            ]
        kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), _WholeCheckpoints()]
        trainer = super().instantiate_trainer(**kwargs)
        if self.subcommand is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # A second file, because with `save_last` Lightning writes it only when it writes a new best one.
            last = ModelCheckpoint(
                _checkpoint_folder(str(run_dir)), "last", enable_version_counter=False, save_on_train_epoch_end=False
            )
            trainer.callbacks += [_KeepRun(self._recipe(self.subcommand)), last]  # type: ignore[attr-defined]
        return trainer

    def fit(self, **arguments: Any) -> None:
        """What the subcommand `fit` runs: the trainer's fit, in a folder that is this run's alone."""
        with locked_folder(Path(self._get(self.config, "run_dir"))) if self.trainer.is_global_zero else nullcontext():
            self.trainer.fit(**arguments)

    def test(self, **arguments: Any) -> None:
        """What the subcommand `test` runs: the trainer's test, without its table where the task prints one."""
        if getattr(self.model, "prints_scores", False):
            arguments["verbose"] = False
        self.trainer.test(**arguments)

    def _recipe(self, subcommand: str) -> str:
        """The configuration of the run, without what belongs to this start of it."""
        config = self.config[subcommand].clone()
        for name in ("config", *self._subcommand_method_arguments[subcommand]):
            config.pop(name, None)
        return self._parser(subcommand).dump(config, skip_none=False, skip_validation=True)


class _WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints written beside their place, then moved: a full disk or a kill leaves the old one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        with written_whole(path) as temporary:
            temporary.write_bytes(content.getbuffer())


class _KeepRun(Callback):
    """Keeps with the checkpoints what Lightning's own do not hold.

    That is the recipe, so that a checkpoint alone rebuilds its network, and the state of torch's random numbers, so
    that a resumed run on the CPU goes on as if it had never stopped.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self._random_state: torch.Tensor | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            write_text(Path(trainer.default_root_dir) / "config.yaml", self.recipe)
        checkpoint[_RECIPE] = self.recipe
        checkpoint[_RANDOM_STATE] = torch.get_rng_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._random_state = checkpoint[_RANDOM_STATE].cpu()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)


def load_run(checkpoint: Path | str) -> tuple[LightningModule, LightningDataModule]:
    """The trained task in evaluation mode, and the data of the recipe that the checkpoint carries."""
    content = _read_checkpoint(Path(checkpoint))
    command = TrainingCommand(yaml.safe_load(content[_RECIPE]), run=False)
    command.model.load_state_dict(content["state_dict"])
    return command.model.eval(), command.datamodule


def begin_run(recipe: Path | str) -> tuple[LightningModule, LightningDataModule]:
    """The task as a fit by the recipe begins it, initial weights included, in evaluation mode; and its data."""
    command = TrainingCommand(["--config", str(recipe)], run=False)
    load_initial_weights = getattr(command.model, "load_initial_weights", None)
    if load_initial_weights is not None:
        load_initial_weights()
    return command.model.eval(), command.datamodule


# What the parser says around a complaint.
_AROUND = (
    "Does not validate",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value",
    "Subclass types",
)
_AROUND += ("a class path (str)", "a dict with", "Problem with given class_path", "Parser key")


def _complaint(message: str) -> str:
    """One sentence of what the parser says over many lines: where, and its innermost complaint."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines() if line.strip()]
    if len(lines) < 2:
        return " ".join(lines)
    keys = ".".join(re.findall(r'^ *Parser key "([^"]+)":', message, re.MULTILINE))
    complaint = "; ".join(line for line in lines if not line.startswith(_AROUND))
    if complaint.startswith("Not a valid subclass"):
        complaint = f"must have class_path and init_args and no other key, got {_given_keys(message)}"
    complaint = complaint.split("expects a function or a callable class: ")[-1].split(". Got value: Namespace")[0]
    given = re.search(r"Given value: ([^{\n]+)$", message)
    if given and "Got value" not in complaint:
        complaint += f"; got {given[1]}"
    classes = re.findall(r"^ *(?:- )?Problem with given class_path '([^']+)'", message, re.MULTILINE)
    return ": ".join([keys, *classes[-1:], complaint[:200]])


def _given_keys(message: str) -> str:
    given = re.search(r"Got value: ({.*})", message) or re.search(r"Given value: ({.*})", message)
    try:
        return ", ".join(ast.literal_eval(given[1])) if given else "something else"
    except (ValueError, SyntaxError):
        return "something else"


def _check_network(recipe: str, checkpoint: Path) -> None:
    """Raise unless the recipe's network is the checkpoint's: attention layers of different kinds share weight names."""
    ours, theirs = (
        flat_settings(yaml.safe_load(text)["model"]["init_args"].get("network"))
        for text in (recipe, _read_checkpoint(checkpoint)[_RECIPE])
    )
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"the recipe must describe the network of {checkpoint}, got network{key} {ours.get(key)!r} but the "
            f"checkpoint has {theirs.get(key)!r} ({len(different)} differences); use the config.yaml of its run"
        )


def flat_settings(settings: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flat_settings(part, f"{key}.{name}").items()}


@contextmanager
def locked_folder(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder for this process; the system lets go of it however the process ends."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"run_dir must be a folder that no other `lineara fit` is writing to, got {run_dir}; wait for it, "
                "or name another folder by --run_dir"
            ) from error
        for leftover in (run_dir / "checkpoints").glob(".*.ckpt"):  # of a run that was killed while it wrote
            leftover.unlink()
        yield


def _choose_checkpoint(subcommand: str, run_dir: Path, given: str | None) -> Path | None:
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
    _read_checkpoint(path)
    return path


def _read_checkpoint(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} must be a checkpoint, got no such file; train first with `lineara fit`, or name another file"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on a damaged or foreign file is of many kinds
        raise ValueError(f"{path} must be a whole checkpoint of lineara, got a file that torch cannot read") from error
    if not isinstance(content, dict) or _RECIPE not in content:
        raise ValueError(f"{path} must be a checkpoint written by `lineara fit`, got one without a recipe inside")
    return content


def _checkpoint_folder(run_dir: str) -> str:
    return str(Path(run_dir) / "checkpoints")
