"""The command line. It turns words into calls; what they do lives in `lineara.tasks`, `viz` and `measure`.

Nothing heavy is imported before a command needs it: `lineara --help` answers at once.
"""

import argparse
import logging
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path

_TRAINING = {
    "fit": "train a network",
    "validate": "measure a trained network on the validation split",
    "test": "measure a trained network on the test split",
    "predict": "write what a trained network answers",
}
# The task and the class that it is read by, and what the command does.
_SETS = {
    "listops": ("long_range_arena", "ListOpsData", "nested list operations: generate"),
    "text": ("long_range_arena", "TextData", "IMDb reviews as bytes: check"),
    "texts": ("long_range_arena", "TextFileData", "texts of your own, CSV, TSV or JSONL: check"),
    "retrieval": ("long_range_arena", "RetrievalData", "pairs of papers as bytes: check"),
    "image": ("long_range_arena", "ImageData", "CIFAR-10 in grey, pixel by pixel: check"),
    "pathfinder": ("long_range_arena", "PathfinderData", "drawings of paths, pixel by pixel: generate"),
    "digits": ("long_range_arena", "DigitsData", "scikit-learn's digits, a stand-in for the image task: check"),
    "coco": ("instance_segmentation", "CocoData", "photographs with outlined objects, MS-COCO's or yours: check"),
    "coins": ("instance_segmentation", "CoinsData", "scikit-image's photograph of coins, outlined: generate"),
    "imagenet": ("image_classification", "ImageFolderData", "photographs in a folder per class: check"),
    "scene_flow": ("stereo_depth", "SceneFlowData", "rendered pairs with their disparities: check"),
    "kitti": ("stereo_depth", "KittiData", "pairs from a car, KITTI 2012 or 2015: check"),
    "middlebury": ("stereo_depth", "MiddleburyData", "pairs of indoor scenes, Middlebury 2014: check"),
    "eth3d": ("stereo_depth", "ETH3DData", "grey pairs of buildings and rooms: check"),
    "motorcycle": ("stereo_depth", "MotorcycleData", "scikit-image's pair of a motorcycle: write"),
}
_HELP = """\
usage: lineara {command} --config RECIPE [options]

{purpose}

  --config RECIPE        a YAML file, or the name of one in recipes/*/; several are read in order
  --run_dir FOLDER       where the run's files are: checkpoints, metrics, its recipe with all defaults
  --ckpt_path PATH       a checkpoint, or last or best of the run; fit goes on from it
  --KEY.KEY VALUE        override any setting of the recipe, such as --trainer.max_steps 1000, --data.batch_size 16,
                         --model.init_args.peak_lr 1e-3
  --trainer.devices N    processes or GPUs of this machine; --trainer.strategy ddp or fsdp
  --print_config         print the recipe with all overrides and defaults, and do nothing
  --help-all             every option of the trainer

examples:
  lineara fit --config listops_demo                        train by recipes/*/listops_demo.yaml
  lineara fit --config listops_demo --ckpt_path last       go on after an interruption
  lineara test --config listops_demo                       measure its best checkpoint
  torchrun --nproc-per-node 2 $(which lineara) fit --config listops_demo      two processes, which torchrun watches
"""
_EXAMPLES = """\
examples:
  lineara data listops                                    generate Long Range Arena's ListOps
  lineara fit --config recipes/long_range_arena/listops_efficient.yaml     train
  lineara recipe detection --images photos --annotations result.json > my.yaml     a recipe for images of your own
  lineara fit --config recipes/long_range_arena/listops_efficient.yaml --ckpt_path last     go on after an interruption
  lineara test --config recipes/long_range_arena/listops_efficient.yaml    test the best checkpoint
  lineara compare listops_softmax listops_efficient --seeds 0 1 2     train, test and tabulate both
  lineara draw maps --checkpoint runs/listops_efficient/checkpoints/best.ckpt
  lineara bench cost                                      time and memory against length

`lineara COMMAND --help` tells more.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 a mistake in the call, 130 interrupted."""
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("lineara: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        mistake = _users_mistake(error)
        if mistake is None:
            raise
        print(f"lineara: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        return 2
    return 0


def parse_recipe(path: Path | str) -> None:
    """Raise unless every key of a recipe is one that the classes it names have."""
    from lineara.runs.training import TrainingCommand

    TrainingCommand(["--config", str(path)], run=False, instantiate=False)


def _run(arguments: list[str]) -> None:
    if arguments and arguments[0] in _TRAINING:
        _train(arguments)
    elif len(arguments) > 1 and arguments[0] == "data" and arguments[1] in _SETS:
        _data(arguments[1], arguments[2:])
    elif arguments and arguments[0] == "bench":
        _bench(arguments[1:])
    else:
        parsed = _parser().parse_args(arguments or ["--help"])
        parsed.run(parsed)


def _parser() -> ArgumentParser:
    from lineara import __version__

    parser = ArgumentParser(
        prog="lineara",
        description="Attention whose cost grows linearly with the number of positions: train, test, draw, measure.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lineara {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, purpose in _TRAINING.items():
        commands.add_parser(name, help=purpose)
    _add_compare(
        commands.add_parser(
            "compare", help="train and test several recipes that differ in the network", allow_abbrev=False
        )
    )
    _add_recipe(commands.add_parser("recipe", help="write a recipe for images of your own", allow_abbrev=False))
    _add_data(commands.add_parser("data", help="generate or check a data set"))
    _add_draw(commands.add_parser("draw", help="draw learning curves, attention maps, routing, costs or images"))
    commands.add_parser("bench", help="measure time and memory of attention")
    return parser


def _add_compare(parser: ArgumentParser) -> None:
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="a file, or a name in recipes/*/")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each recipe is run with each (default 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/comparison"), help="folder of runs and report")
    parser.add_argument("--max_steps", type=int, help="short for --override trainer.max_steps=N")
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of all")
    parser.set_defaults(run=_compare)


def _add_recipe(parser: ArgumentParser) -> None:
    parser.add_argument("kind", choices=("detection", "classification"), help="what is to be learnt")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, or of a folder per class")
    parser.add_argument("--annotations", type=Path, help="a COCO export, for detection")
    parser.set_defaults(run=_recipe)


def _add_data(parser: ArgumentParser) -> None:
    sets = parser.add_subparsers(title="data sets", metavar="SET", required=True)
    for name, (*_, purpose) in _SETS.items():
        sets.add_parser(name, help=purpose)


def _add_draw(parser: ArgumentParser) -> None:
    pictures = parser.add_subparsers(title="pictures", metavar="PICTURE", required=True)
    run = (_draw_run, "--run_dir", "folder of the run", Path)
    trained = (_draw_trained, "--checkpoint", "of a trained network, written by `lineara fit`", Path)
    for name, (draw, source, meaning, kind), purpose in (
        ("curves", run, "loss and accuracy of a run over its steps"),
        ("load", run, "how a run with multiresolution attention used its heads over its steps"),
        ("maps", trained, "the global attention maps of a network over a photograph or an expression"),
        ("routing", trained, "the resolution that each token or pixel of one example chooses"),
        ("cost", (_draw_cost, "--costs", "written by `lineara bench cost`", Path), "time and memory against length"),
        ("examples", (_draw_examples, "--set", "pathfinder, digits or image", str), "images of a set and their labels"),
    ):
        picture = pictures.add_parser(name, help=purpose, allow_abbrev=False)
        sources = picture.add_mutually_exclusive_group(required=True) if name == "maps" else picture
        sources.add_argument(source, type=kind, required=name != "maps", help=meaning)
        if name == "maps":
            sources.add_argument("--config", type=Path, help="a recipe: its network as a fit would begin with it")
        picture.add_argument("--output", type=Path, help="PNG, PDF or SVG to write; default: a PNG beside the source")
        picture.set_defaults(run=draw, picture=name)
    maps, routing, examples = (pictures.choices[name] for name in ("maps", "routing", "examples"))
    for picture in (maps, example := routing.add_mutually_exclusive_group()):
        picture.add_argument("--expression", help='such as "[SM 4 [MAX 7 2 ] ]"; default: the shortest test expression')
    maps.add_argument("--image", type=Path, help="photograph, for networks of images")
    maps.add_argument("--layer", default="0", help="attention layer: its number from 0, or its name (default 0)")
    maps.add_argument("--head", type=int, default=0, help="head, from 0 (default 0)")
    example.add_argument("--index", type=int, help="test image, from 0 (default 0)")
    examples.add_argument("--data_root", default="data", help="folder of cifar-10-batches-py, for image (default data)")
    examples.add_argument("--num", type=int, default=40, help="images at most (default 40)")


def _train(arguments: list[str]) -> None:
    command = arguments[0]
    if not {"-h", "--help"}.isdisjoint(arguments):
        print(_HELP.format(command=command, purpose=_TRAINING[command]))
        return
    from lineara.runs.comparison import find_recipe
    from lineara.runs.training import TrainingCommand

    _leave_out_advice()
    words = ["--help" if word == "--help-all" else word for word in arguments]
    for i, word in enumerate(words):
        if word.startswith("--config="):
            words[i] = f"--config={find_recipe(word.removeprefix('--config='))}"
        elif i and words[i - 1] in ("-c", "--config"):
            words[i] = str(find_recipe(word))
    try:
        done = TrainingCommand(words)
        if command == "fit" and done.trainer.is_global_zero:
            print(f"run: {done.trainer.default_root_dir}")
    except SystemExit as ended:  # Lightning's answer to an interruption
        if isinstance(ended.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from ended
        raise


def _compare(options: Namespace) -> None:
    from lineara.runs.comparison import compare, find_recipe
    from lineara.runs.comparison_report import comparison_table

    _leave_out_advice()
    steps = [] if options.max_steps is None else [f"trainer.max_steps={options.max_steps}"]
    recipes = [find_recipe(name) for name in options.recipes]
    overrides = [*options.override, *steps]
    rows = compare(recipes, seeds=options.seeds, output=options.output, overrides=overrides, progress=_progress)
    print(f"{comparison_table(rows)}\n{options.output / 'comparison.md'}")
    failed = [f"{row.recipe}, seed {seed}: {why}" for row in rows for seed, why in row.failures.items()]
    if failed:
        raise ValueError(f"no run may fail, got {len(failed)} that did ({failed[0]}); mend it and call again")


def _recipe(options: Namespace) -> None:
    from lineara.tasks.own_recipes import recipe_for

    print(recipe_for(options.kind, options.images, options.annotations), end="")


def _leave_out_advice() -> None:
    """Keep from the user what Lightning tells its own users, and what does not hold here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.formatwarning = lambda message, *_, **__: f"lineara: warning: {message}\n"
    for message in (
        *(".*does not have many workers.*", ".*dataloader is not resumable.*", ".*LeafSpec.*", ".*lr_scheduler.step.*"),
        *(".*exists and is not empty.*", ".*in eval mode at the start of training.*", "The dirpath has changed.*"),
    ):
        warnings.filterwarnings("ignore", message)


def _data(name: str, words: list[str]) -> None:
    _leave_out_advice()
    package, kind, _ = _SETS[name]
    kind = getattr(import_module(f"lineara.tasks.{package}"), kind)
    import jsonargparse  # after lineara.tasks, which says which extra is missing

    from lineara.runs.parser_errors import one_sentence

    parser = jsonargparse.ArgumentParser(prog=f"lineara data {name}", exit_on_error=False, allow_abbrev=False)
    parser.add_class_arguments(kind, skip=set(kind.only_in_training))
    try:
        options = parser.parse_args(words)
    except jsonargparse.ArgumentError as error:
        reason = one_sentence(str(error), parser._option_string_actions)
        raise ValueError(f"{reason}; see `lineara data {name} --help`") from error
    for line in kind(**options.as_dict()).summary():
        print(line, flush=True)


def _draw_run(options: Namespace) -> None:
    from lineara.viz import learning_curves, read_metrics, router_load

    draw = {"curves": learning_curves, "load": router_load}[options.picture]
    figure = draw(read_metrics(options.run_dir), title=options.run_dir.name)
    _save(figure, options.output or options.run_dir / f"{options.picture}.png")


def _draw_trained(options: Namespace) -> None:
    from lineara.runs.training import begin_run, load_run
    from lineara.tasks.long_range_arena.pictures import expression_maps, routing

    _leave_out_advice()
    recipe: Path | None = getattr(options, "config", None)
    run = load_run(options.checkpoint) if recipe is None else begin_run(recipe)
    if options.picture == "routing":
        figure = routing(*run, expression=options.expression, index=options.index)
    elif options.image is not None:
        from lineara.tasks.photograph_maps import photograph_maps

        figure = photograph_maps(*run, options.image, layer=options.layer, head=options.head)
    else:
        figure = expression_maps(*run, options.expression, layer=options.layer, head=options.head)
    run_dir = options.checkpoint.parent.parent if recipe is None else Path()
    _save(figure, options.output or run_dir / f"{options.picture}.png")


def _draw_cost(options: Namespace) -> None:
    from lineara.viz import cost_curves, read_costs

    _save(cost_curves(read_costs(options.costs)), options.output or options.costs.with_suffix(".png"))


def _draw_examples(options: Namespace) -> None:
    from lineara.tasks.long_range_arena.pictures import set_examples

    figure = set_examples(options.set, data_root=options.data_root, num_examples=options.num)
    _save(figure, options.output or Path(f"{options.set}.png"))


def _bench(words: list[str]) -> None:
    from lineara.measure.commands import bench

    bench(words, progress=_progress)


def _progress(message: str) -> None:
    print(message, file=sys.stderr)


def _save(figure: object, path: Path) -> None:
    from lineara.runs.files import save_figure

    save_figure(figure, path)
    print(path)


def _users_mistake(error: BaseException | None) -> BaseException | None:
    """What the caller can mend, in an error or behind it: said by a check of ours, or by the file system."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        ours = bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)
        named = type(error).__name__ == "MisconfigurationException"  # Lightning's, of the trainer's options
        if named or isinstance(error, OSError | ImportError) or (ours and isinstance(error, ValueError | TypeError)):
            return error
        error = error.__cause__
    return None


if __name__ == "__main__":
    sys.exit(main())
