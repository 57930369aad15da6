"""The training commands of every task: Lightning's command line, a run folder, and checkpoints that can be reused.

A run folder holds

    checkpoints/best.ckpt, last.ckpt    by the validation score, and of the last validation; with the recipe inside
    metrics/version_<n>/metrics.csv     every logged number, one version per start of the run
    tensorboard/version_<n>/            the same for TensorBoard
    config.yaml                         the recipe of the last start, with every default filled in
"""

import os
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from lineara.runs.checkpoints import (
    RECIPE,
    AtomicCheckpointIO,
    SaveRunState,
    check_usable,
    choose_checkpoint,
    read_checkpoint,
)
from lineara.runs.nonfinite import CheckFinite
from lineara.runs.parser_errors import one_sentence
from lineara.runs.run_folder import CheckDiskSpace, run_lock
from lineara.runs.sharding import ShardedStrategy
from lineara.runs.stopping import StopOnSignal, Stopped

_WHERE_TO_TRAIN = ("accelerator", "devices", "num_nodes", "strategy", "precision")


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
        parser_options = {"exit_on_error": False, "dump_header": None, "allow_abbrev": False}
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
            raise ValueError(one_sentence(str(error), self._options(args))) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"a recipe must be a text file in UTF-8, got one that is not: {error}") from error
        if subcommand := self.config.get("subcommand"):
            config = self.config[subcommand]
            checkpoint = choose_checkpoint(subcommand, Path(config.run_dir), config.ckpt_path)
            if checkpoint is not None:
                _check_network(self._recipe(subcommand), checkpoint)
            config.ckpt_path = None if checkpoint is None else str(checkpoint)

    def _options(self, args: list[str] | dict[str, Any]) -> list[str]:
        """The options of the subcommand that was asked for."""
        name = args[0] if isinstance(args, list) and args else ""
        parsers: dict[str, LightningArgumentParser] = getattr(self, "_subcommand_parsers", {})
        return list(parsers[name]._option_string_actions) if name in parsers else []

    def instantiate_classes(self) -> None:
        if self._instantiate:
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        run_dir = Path(self._get(self.config, "run_dir"))
        kwargs["default_root_dir"] = str(run_dir)
        if self.subcommand is None:  # to look into the network, wherever the recipe is to be trained
            kwargs |= {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": None}
        elif torch.distributed.is_torchelastic_launched():
            kwargs |= {"devices": int(os.environ["LOCAL_WORLD_SIZE"]), "num_nodes": int(os.environ["GROUP_WORLD_SIZE"])}
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif self._get(self.config, "trainer").logger is None:
            kwargs["logger"] = [
                CSVLogger(run_dir, name="metrics"),
                TensorBoardLogger(run_dir, name="tensorboard"),
            ]
        kwargs["plugins"] = [*(self._get(self.config_init, "trainer").plugins or []), AtomicCheckpointIO()]
        if self._get(self.config_init, "trainer").strategy == "fsdp":
            kwargs.setdefault("strategy", ShardedStrategy())  # Lightning's own wants GPUs
        if self.subcommand is not None:
            self._check_strategy()
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, RuntimeError) as error:
            given = {name: self._get(self.config, "trainer")[name] for name in _WHERE_TO_TRAIN}
            why = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            raise ValueError(
                "the trainer's options must be ones that can be had here, got "
                f"{', '.join(f'{name} {value}' for name, value in given.items())} ({why}); see `lineara fit --help`"
            ) from error
        if self._get(self.config, "trainer").sync_batchnorm and trainer.strategy.root_device.type == "cpu":
            raise ValueError("sync_batchnorm must be false on CPUs, where torch has no such layer, got true")
        if self.subcommand is None:
            return trainer
        folder, callbacks = _checkpoint_folder(str(run_dir)), trainer.callbacks  # type: ignore[attr-defined]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] - `self.trainer` is not yet there
            # A second file, because with `save_last` Lightning writes it only when it writes a new best one.
            last = ModelCheckpoint(folder, "last", enable_version_counter=False, save_on_train_epoch_end=False)
            callbacks += [SaveRunState(self._recipe(self.subcommand)), last, CheckDiskSpace()]
        callbacks += [CheckFinite(folder), StopOnSignal(folder)]
        return trainer

    def _check_strategy(self) -> None:
        strategy = self._get(self.config_init, "trainer").strategy
        known = isinstance(strategy, Strategy) or strategy in ("auto", *StrategyRegistry.available_strategies())
        if not known or (isinstance(strategy, str) and re.search("spawn|fork|notebook", strategy)):
            raise ValueError(
                "strategy must be auto, ddp, fsdp or another that starts the command again for each process, or the "
                f"class path of one that can be built here, got {strategy}; set --trainer.strategy ddp or fsdp"
            )

    def fit(self, **arguments: Any) -> None:
        """What the subcommand `fit` runs: the trainer's fit, in a folder that is this run's alone."""
        with run_lock(Path(self._get(self.config, "run_dir"))) if self.trainer.is_global_zero else nullcontext():
            try:
                self._together("fit", arguments)
            except Stopped:
                if not self.trainer.is_global_zero:
                    raise SystemExit(0) from None  # the first process has the status; others must not seem to fail
                raise

    def validate(self, **arguments: Any) -> None:
        """What the subcommand `validate` runs."""
        self._together("validate", arguments)

    def test(self, **arguments: Any) -> None:
        """What the subcommand `test` runs: the trainer's test, without its table where the task prints one."""
        if getattr(self.model, "prints_scores", False):
            arguments["verbose"] = False
        self._together("test", arguments)

    def predict(self, **arguments: Any) -> None:
        """What the subcommand `predict` runs, on one device: predictions are written in the order of the data."""
        if self.trainer.world_size > 1:
            raise ValueError(
                f"predict must run on one device, got {self.trainer.world_size}; call it with --trainer.devices 1"
            )
        self._together("predict", arguments)

    def _together(self, name: str, arguments: dict[str, Any]) -> None:
        if arguments.get("ckpt_path") is not None:
            check_usable(Path(arguments["ckpt_path"]), self.model, to_go_on=name == "fit")
        check_length = getattr(self.model, "check_length", None)
        if name == "fit" and check_length is not None and self.trainer.max_steps > 0 and not self._is_trial():
            check_length(self.trainer.max_steps)
        try:
            getattr(self.trainer, name)(**arguments)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise ChildProcessError(
                f"the processes that load data must live until the run ends, got: {' '.join(str(error).split())}; "
                "where memory ran out, lower --data.num_workers or the batch size, and go on with the same command and "
                "--ckpt_path last"
            ) from error

    def _is_trial(self) -> bool:
        return bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _recipe(self, subcommand: str) -> str:
        """The configuration of the run, without what belongs to this start of it."""
        config = self.config[subcommand].clone()
        for name in ("config", *self._subcommand_method_arguments[subcommand]):
            config.pop(name, None)
        return self._parser(subcommand).dump(config, skip_none=False, skip_validation=True)


def load_run(checkpoint: Path | str) -> tuple[LightningModule, LightningDataModule]:
    """The trained task in evaluation mode, and the data of the recipe that the checkpoint carries."""
    content = read_checkpoint(Path(checkpoint))
    command = TrainingCommand(_recipe_inside(Path(checkpoint), content), run=False)
    check_usable(Path(checkpoint), command.model, to_go_on=False)
    command.model.load_state_dict(content["state_dict"])
    return command.model.eval(), command.datamodule


def begin_run(recipe: Path | str) -> tuple[LightningModule, LightningDataModule]:
    """The task as a fit by the recipe begins it, initial weights included, in evaluation mode; and its data."""
    command = TrainingCommand(["--config", str(recipe)], run=False)
    load_initial_weights = getattr(command.model, "load_initial_weights", None)
    if load_initial_weights is not None:
        load_initial_weights()
    return command.model.eval(), command.datamodule


def _check_network(recipe: str, checkpoint: Path) -> None:
    """Raise unless the recipe's network is the checkpoint's: attention layers of different kinds share weight names."""
    ours, theirs = (
        flat_settings(settings["model"]["init_args"].get("network"))
        for settings in (yaml.safe_load(recipe), _recipe_inside(checkpoint, read_checkpoint(checkpoint)))
    )
    different = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"the recipe must describe the network of {checkpoint}, got network{key} {ours.get(key)!r} but the "
            f"checkpoint has {theirs.get(key)!r} ({len(different)} differences); use the config.yaml of its run"
        )


def _recipe_inside(checkpoint: Path, content: dict[str, Any]) -> dict[str, Any]:
    text = content[RECIPE]
    try:
        recipe: Any = yaml.safe_load(text) if isinstance(text, str) else None
    except yaml.YAMLError:
        recipe = None
    model = recipe.get("model") if isinstance(recipe, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("init_args"), dict):
        raise ValueError(
            f"{checkpoint} must be a checkpoint with the recipe of its run inside, got one whose recipe cannot be "
            "read; name another one, or begin a new run"
        )
    return recipe


def flat_settings(settings: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {key: settings}
    return {k: v for name, part in settings.items() for k, v in flat_settings(part, f"{key}.{name}").items()}


def _checkpoint_folder(run_dir: str) -> str:
    return str(Path(run_dir) / "checkpoints")
