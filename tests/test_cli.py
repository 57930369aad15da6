"""The command line: exit statuses, and mistakes answered by one line on standard error."""

import copy
import json
import signal
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lineara
from lineara.cli import main
from lineara.tasks.long_range_arena import SequenceClassification
from lineara.tasks.long_range_arena.listops import ListOpsGrammar, generate
from lineara.tasks.long_range_arena.listops_files import load_listops

# What Lightning's command line still calls of jsonargparse.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")

FEW = {"num_train": 40, "num_val": 20, "num_test": 20, "min_len": 5, "max_len": 30, "num_workers": 1}
ATTENTION = {"class_path": "lineara.nn.EfficientAttention", "init_args": {"num_heads": 2}}
NETWORK = {
    "class_path": "lineara.models.SequenceClassifier",
    "init_args": {
        "vocab_size": 16,
        "num_classes": 10,
        "max_len": 30,
        "dim": 8,
        "mlp_dim": 8,
        "head_dim": 8,
        "attention": ATTENTION,
    },
}
RECIPE = {
    "run_dir": "run",
    "model": {
        "class_path": "lineara.tasks.long_range_arena.SequenceClassification",
        "init_args": {"warmup_steps": 2, "network": NETWORK},
    },
    "data": {
        "class_path": "lineara.tasks.long_range_arena.ListOpsData",
        "init_args": {"data_root": "data", "batch_size": 10, **FEW},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 4,
        "val_check_interval": 2,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    },
}
# Where a recipe holds keys.
LEVELS = {
    "top": (),
    "model": ("model",),
    "model's arguments": ("model", "init_args"),
    "network": ("model", "init_args", "network"),
    "network's arguments": ("model", "init_args", "network", "init_args"),
    "attention": ("model", "init_args", "network", "init_args", "attention"),
    "attention's arguments": ("model", "init_args", "network", "init_args", "attention", "init_args"),
    "data": ("data",),
    "data's arguments": ("data", "init_args"),
    "trainer": ("trainer",),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Threads that wait for each other on a busy machine take a hundred times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run a command in an empty folder: its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        try:
            status = main(list(map(str, words)))
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def mistake(call):
    """Run a command that must fail by the caller's mistake: the one line that it says."""

    def run(*words):
        status, _, error = call(*words)
        assert status == 2
        assert error.endswith("\n")
        progress = "listops: "  # a bar, while data are generated
        [line] = [line for line in error.splitlines() if line and not line.startswith(progress)]
        assert line.startswith("lineara: error: ")
        return line.removeprefix("lineara: error: ")

    return run


def in_a_fresh_process(script, *words, folder):
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=folder)


def recipe_with(key, value, level="top"):
    """Write a recipe in which one key has another value, into the current folder."""
    recipe = copy.deepcopy(RECIPE)
    inner = recipe
    for name in LEVELS[level]:
        inner = inner[name]
    inner[key] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return "recipe.yaml"


def files():
    return sorted(path.name for path in Path().iterdir())


# What it says of itself.


def test_the_installed_command_is_main():
    [command] = entry_points(group="console_scripts", name="lineara")
    assert command.load() is main


def test_help_names_every_command_and_imports_neither_torch_nor_lightning(tmp_path):
    script = """
import sys
from lineara.cli import main

try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = sorted({"torch", "lightning", "numpy", "matplotlib", "jsonargparse"} & set(sys.modules))
assert not heavy, heavy
"""
    result = in_a_fresh_process(script, folder=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    for command in ("fit", "validate", "test", "predict", "data", "draw", "bench"):
        assert f"\n    {command} " in result.stdout


def test_without_a_command_it_helps(call):
    assert call() == call("--help")
    assert call()[0] == 0


def test_version(call):
    assert call("--version") == (0, f"lineara {lineara.__version__}\n", "")


@pytest.mark.parametrize("command", ["fit", "data", "draw", "bench"])
def test_every_command_helps(call, command):
    status, output, error = call(command, "--help")
    assert status == 0
    assert output.startswith("usage: lineara ")
    assert f" {command} " in output.splitlines()[0]
    assert error == ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["sing"], "argument COMMAND: invalid choice: 'sing'"),
        (["--sing"], "the following arguments are required: COMMAND"),
        (["data"], "the following arguments are required: SET"),
        (["data", "sing"], "argument SET: invalid choice: 'sing'"),
        (["draw", "maps"], "one of the arguments --checkpoint --config is required"),
        (["draw", "routing"], "the following arguments are required: --checkpoint"),
        (
            ["draw", "routing", "--checkpoint", "c", "--expression", "7", "--index", "0"],
            "argument --index: not allowed with argument --expression",
        ),
        (["bench", "cost", "--positions"], "argument --positions: expected at least one argument"),
    ],
)
def test_a_wrong_word_is_answered_by_the_usage_and_one_line(call, words, reason):
    status, output, error = call(*words)
    assert (status, output) == (2, "")
    assert error.startswith("usage: lineara")
    *_, last = error.splitlines()
    assert f": error: {reason}" in last
    assert error.count("error") == 1


# Recipes.


def test_a_command_without_a_recipe_names_what_it_needs(mistake):
    assert "required" in mistake("fit")
    assert "--sing" in mistake("fit", "--sing")
    assert files() == []


def test_a_recipe_that_does_not_exist_is_named(mistake):
    assert "nowhere.yaml" in mistake("fit", "--config", "nowhere.yaml")
    assert files() == []


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_misspelt_key_is_named_at_every_level(mistake, command, level):
    sentence = mistake(command, "--config", recipe_with("no_such_key", 1, level))
    assert "no_such_key" in sentence
    assert len(sentence) < 300
    assert files() == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("level", "key", "value"),
    [
        ("top", "run_dir", 5),
        ("top", "seed_everything", "soon"),
        ("model's arguments", "peak_lr", "fast"),
        ("network's arguments", "dim", "wide"),
        ("attention's arguments", "num_heads", "two"),
        ("data's arguments", "batch_size", "many"),
        ("trainer", "max_steps", "all"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(mistake, level, key, value):
    sentence = mistake("fit", "--config", recipe_with(key, value, level))
    assert key in sentence
    assert str(value) in sentence
    assert len(sentence) < 300
    assert files() == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("level", "class_path"),
    [
        ("model", "lineara.tasks.long_range_arena.Nothing"),
        ("model", "nowhere.Nothing"),
        ("network", "lineara.models.Nothing"),
        ("attention", "lineara.nn.Nothing"),
        ("data", "lineara.tasks.long_range_arena.Nothing"),
    ],
)
def test_a_class_that_does_not_exist_is_named(mistake, level, class_path):
    sentence = mistake("fit", "--config", recipe_with("class_path", class_path, level))
    assert class_path.split(".")[-1] in sentence
    assert files() == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("level", "key", "value", "sentence"),
    [
        (
            "attention's arguments",
            "num_heads",
            3,
            "key_dim and value_dim, by default dim, must be divisible by num_heads, got dim=8 and num_heads=3",
        ),
        ("data's arguments", "batch_size", 0, "batch_size must be at least 1, got 0"),
        ("data's arguments", "max_depth", 0, "max_depth must be at least 1, got 0"),
        ("model's arguments", "warmup_steps", 4, "warmup_steps must .* the run's 4 steps, got 4; set --model"),
        ("network's arguments", "max_len", 7, r"tokens must have the shape .* max_len=7 positions, got \(10, \d+\)"),
        (
            "attention's arguments",
            "normalization",
            "cosine",
            "model.network.attention.normalization: lineara.models.SequenceClassifier: "
            "must be one of 'softmax', 'scaling', got cosine$",
        ),
    ],
)
def test_what_a_layer_or_a_task_refuses_is_said_in_its_words(mistake, level, key, value, sentence):
    assert_match(sentence, mistake("fit", "--config", recipe_with(key, value, level)))


def assert_match(pattern, text):
    with pytest.raises(ValueError, match=f"^{pattern}"):
        raise ValueError(text)


@pytest.mark.parametrize(
    "content",
    [b"model: [4, 5\ntrainer: {a: 1", b"only words", b"", b"- a\n- list\n", b"\xff\xfe\x00\x01"],
    ids=["unclosed", "words", "empty", "list", "binary"],
)
def test_a_file_that_is_no_recipe_is_refused(mistake, content):
    Path("recipe.yaml").write_bytes(content)
    assert mistake("fit", "--config", "recipe.yaml")
    assert files() == ["recipe.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused(mistake):
    sentence = mistake("fit", "--config", recipe_with("accelerator", "cuda", "trainer"))
    assert "cuda" in sentence.lower() or "gpu" in sentence.lower()


# Missing libraries.


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("lightning", ["fit", "--config", "recipe.yaml"]),
        ("jsonargparse", ["test", "--config", "recipe.yaml"]),
        ("tqdm", ["data", "listops"]),
        ("matplotlib", ["draw", "curves", "--run_dir", "run"]),
    ],
)
def test_a_missing_library_is_answered_by_the_extra_to_install(tmp_path, library, words):
    script = f"import sys; sys.modules[{library!r}] = None; from lineara.cli import main; sys.exit(main())"
    result = in_a_fresh_process(script, *words, folder=tmp_path)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("lineara: error: ")
    assert library in line
    assert "pip install 'lineara[train]'" in line
    assert list(tmp_path.iterdir()) == []


# Interruption.


def test_an_interrupted_command_says_so(call, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lineara.tasks.long_range_arena.listops_files.generate", interrupt)
    assert call("data", "listops") == (130, "", "lineara: interrupted\n")
    assert list(Path("data/listops").iterdir()) == []


def test_an_interrupted_training_says_so(call, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SequenceClassification, "training_step", interrupt)
    before = signal.getsignal(signal.SIGINT)
    try:
        status, _, error = call("fit", "--config", recipe_with("run_dir", "run"))
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning turns it off for its own shutdown
    assert status == 130
    assert error.splitlines()[-1] == "lineara: interrupted"


@pytest.mark.parametrize("bug", [RuntimeError, ValueError, KeyError])
def test_our_own_mistakes_are_not_hidden(call, monkeypatch, bug):
    def fail(*_):
        raise bug("nobody's mistake but ours")

    monkeypatch.setattr(SequenceClassification, "training_step", fail)
    with pytest.raises(bug, match="nobody's mistake but ours"):
        call("fit", "--config", recipe_with("run_dir", "run"))


# Data.


def test_data_are_generated_once(call):
    words = ["data", "listops", "--data_root", "somewhere", "--generator_seed", 3]
    words += [word for name, number in FEW.items() for word in (f"--{name}", number)]
    status, output, _ = call(*words)
    assert status == 0
    first, *shares = output.splitlines()
    path = Path(first)
    assert path.is_relative_to("somewhere")
    assert [line.split("; ")[0] for line in shares] == ["train: 40 examples", "val: 20 examples", "test: 20 examples"]
    before = path.stat()
    splits = load_listops(path)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 40, "val": 20, "test": 20}
    expected = generate(80, grammar=ListOpsGrammar(min_len=5, max_len=30), seed=3, progress=False)
    assert np.array_equal(np.concatenate([examples.tokens for examples in splits.values()]), expected.tokens)
    assert call(*words) == (0, output, "")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("listops", "max_depth"),
        ("text", "num_val"),
        ("retrieval", "max_len"),
        ("image", "num_val"),
        ("pathfinder", "contour_len"),
        ("digits", "upscale"),
    ],
)
def test_every_set_helps_with_the_options_of_its_data_module(call, name, option):
    assert f"\n    {name}" in call("data", "--help")[1]
    status, output, error = call("data", name, "--help")
    assert (status, error) == (0, "")
    assert output.startswith(f"usage: lineara data {name} ")
    assert f"--{option} " in output
    assert "default: " in output
    assert "batch_size" not in output


def test_a_set_that_is_there_is_described(call):
    status, output, error = call("data", "digits", "--num_val", 1, "--num_test", 7)
    assert (status, error) == (0, "")
    place, train, val, test = output.splitlines()
    assert place == "scikit-learn's digits"
    assert train.startswith("train: 1,789 examples; classes 0: 9.9%, 1: 10.2%, ")
    assert val.startswith("val: 1 examples; classes ")
    assert test.startswith("test: 7 examples; classes ")


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("text", "data/aclImdb/train/neg"),
        ("retrieval", "data/tsv_data/new_aan_pairs.train.tsv"),
        ("image", "data/cifar-10-batches-py"),
    ],
)
def test_a_set_that_is_not_there_is_named_with_its_place(mistake, name, place):
    assert mistake("data", name).startswith(f"{place} must ")
    assert mistake("data", name, "--data_root", "here").startswith(f"here{place.removeprefix('data')} must ")
    assert files() == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_train", "many"], ".*num_train.*int.*many; see `lineara data listops --help`"),
        (["--num_train"], ".*--num_train: expected one argument; see"),
        (["--sing", 1], ".*--sing 1; see"),
        (["--batch_size", 1], ".*--batch_size 1; see"),
    ],
)
def test_wrong_options_of_a_set_are_named(mistake, words, sentence):
    assert_match(sentence, mistake("data", "listops", *words))
    assert files() == []


def test_impossible_data_are_refused(mistake):
    assert mistake("data", "listops", "--num_train", -1) == "num_train must be at least 0, got -1"
    assert "min_len must be at least 0" in mistake("data", "listops", "--min_len", 9, "--max_len", 5)
    Path("file").write_text("no folder")
    assert "must be readable and writable, got Not a directory" in mistake("data", "listops", "--data_root", "file")


# A run, and its pictures.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run of `lineara fit`."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = recipe_with("data_root", str(folder / "data"), "data's arguments")
        assert main(["fit", "--config", recipe, "--run_dir", str(folder / "run")]) == 0
    return folder / "run"


def is_png(path):
    return Path(path).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_is_tested_and_not_trained_again(call, mistake, trained):
    recipe = trained.parent / "recipe.yaml"
    status, output, _ = call("test", "--config", recipe, "--run_dir", trained)
    assert status == 0
    assert "test/accuracy_of_root_operator" in output
    assert "which holds" in mistake("fit", "--config", recipe, "--run_dir", trained)
    assert files() == []


def test_curves_are_drawn(call, trained):
    assert call("draw", "curves", "--run_dir", trained) == (0, f"{trained / 'curves.png'}\n", "")
    assert is_png(trained / "curves.png")
    assert call("draw", "curves", "--run_dir", trained, "--output", "new/mine.png")[:2] == (0, "new/mine.png\n")
    assert is_png("new/mine.png")


def test_curves_without_a_run_are_refused(mistake):
    assert mistake("draw", "curves", "--run_dir", "nowhere").startswith("nowhere")
    assert files() == []


def test_maps_are_drawn(call, trained):
    checkpoint = trained / "checkpoints/best.ckpt"
    status, output, _ = call("draw", "maps", "--checkpoint", checkpoint, "--layer", 1, "--head", 1)
    assert status == 0
    assert output.splitlines()[-1] == str(trained / "maps.png")
    assert is_png(trained / "maps.png")
    status, output, _ = call(
        "draw", "maps", "--checkpoint", checkpoint, "--expression", "[MAX 4 [MIN 7 2 ] 0 ]", "--output", "mine.png"
    )
    assert status == 0
    assert is_png("mine.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--layer", 2], "layer must be at least 0 and below 2, got 2"),
        (["--layer", -1], "layer must be at least 0 and below 2, got -1"),
        (["--head", 2], "head must be at least 0 and below 2, got 2"),
        (["--expression", "[MAX 4"], r"expression must be one digit or one closed operator, got '\[MAX 4'"),
        (["--expression", "[AVG 4 5 ]"], r"words must be among .* got '\[AVG'"),
        (
            ["--expression", "[SM " + 40 * "1 " + "]"],
            r"tokens must have the shape .* max_len=30 positions, got \(1, 42\)",
        ),
    ],
)
def test_maps_that_cannot_be_drawn_are_refused(mistake, trained, words, sentence):
    assert_match(sentence, mistake("draw", "maps", "--checkpoint", trained / "checkpoints/best.ckpt", *words))
    assert files() == []


def test_maps_of_no_checkpoint_are_refused(mistake):
    assert mistake("draw", "maps", "--checkpoint", "none.ckpt").startswith(
        "none.ckpt must be a checkpoint, got no such"
    )
    # One line, whatever is in it.
    assert mistake("draw", "maps", "--checkpoint", "two\nlines").startswith("two lines must be a checkpoint")


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """The folder of a finished run with routers."""
    folder = tmp_path_factory.mktemp("routed")
    attention = {**ATTENTION, "class_path": "lineara.nn.MultiresolutionAttention"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipe = recipe_with("attention", attention, "network's arguments")
        words = ["--run_dir", str(folder / "run"), "--data.data_root", str(folder / "data")]
        assert main(["fit", "--config", recipe, *words]) == 0
    return folder / "run"


def test_routing_and_load_are_drawn(call, routed):
    checkpoint = routed / "checkpoints/best.ckpt"
    status, output, _ = call("draw", "routing", "--checkpoint", checkpoint)
    assert (status, output.splitlines()[-1]) == (0, str(routed / "routing.png"))
    assert is_png(routed / "routing.png")
    words = ["--expression", "[MAX 4 [MIN 7 2 ] 0 ]", "--output", "mine.png"]
    assert call("draw", "routing", "--checkpoint", checkpoint, *words)[0] == 0
    assert is_png("mine.png")
    assert call("draw", "load", "--run_dir", routed) == (0, f"{routed / 'load.png'}\n", "")
    assert is_png(routed / "load.png")


def test_routing_that_cannot_be_drawn_is_refused(mistake, trained, routed):
    words = ["draw", "routing", "--checkpoint", trained / "checkpoints/best.ckpt"]
    assert_match("the network must have a router", mistake(*words))
    assert_match("metrics must hold train/load_layer", mistake("draw", "load", "--run_dir", trained))
    assert_match("the run must be of images", mistake(*words[:3], routed / "checkpoints/best.ckpt", "--index", 0))
    assert files() == []


def test_examples_of_a_set_are_drawn(call, mistake):
    assert call("draw", "examples", "--set", "pathfinder", "--num", 3) == (0, "pathfinder.png\n", "")
    assert is_png("pathfinder.png")
    assert mistake("draw", "examples", "--set", "image", "--data_root", "here").startswith("here/cifar-10-batches-py")
    assert mistake("draw", "examples", "--set", "text").startswith("the set must be one of images: ")
    assert files() == ["pathfinder.png"]


# Costs.


def test_costs_are_measured_and_drawn(call):
    words = [
        "--attention",
        "efficient",
        "--positions",
        128,
        64,
        "--heads",
        2,
        "--head_dim",
        8,
        "--output",
        "new/cost.json",
    ]
    status, output, error = call("bench", "cost", *words)
    assert status == 0, error
    *table, path = output.splitlines()
    assert path == "new/cost.json"
    rows = json.loads(Path(path).read_text())
    cases = sorted((row["attention"], row["positions"], row["backward"], row["heads"], row["head_dim"]) for row in rows)
    assert cases == [("efficient", positions, backward, 2, 8) for positions in (64, 128) for backward in (False, True)]
    assert all(row["seconds"] > 0 for row in rows)
    assert {"64", "128"} <= {cell.strip() for line in table for cell in line.split("|")}
    assert error.splitlines()  # one line of progress per case
    assert call("draw", "cost", "--costs", path)[:2] == (0, "new/cost.png\n")
    assert is_png("new/cost.png")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--positions", 0], "positions must be at least 1, got 0"),
        (["--attention", "linear"], "attention must be one of .* got 'linear'"),
        (["--heads", 0], "heads must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(mistake, words, sentence):
    assert_match(sentence, mistake("bench", "cost", *words, "--output", "cost.json"))
    assert files() == []


def test_costs_that_were_not_measured_are_refused(mistake):
    assert "got no such file; measure with `lineara bench cost`" in mistake("draw", "cost", "--costs", "none.json")
    for content in ("no json", "{}", "[]", "[1]"):
        Path("cost.json").write_text(content)
        assert mistake("draw", "cost", "--costs", "cost.json")
    assert files() == ["cost.json"]


# Comparing.


def test_a_comparison_prints_its_table_and_ends_with_status_2_when_a_run_fails(call, monkeypatch):
    monkeypatch.setattr("lineara.runs.comparison._RUN", "import sys; sys.exit('lineara: error: the disk is full')")
    recipe = recipe_with("run_dir", "run")
    status, output, error = call("compare", recipe, "--seeds", 3, "--output", "out", "--max_steps", 5)
    assert status == 2
    assert error.splitlines()[-1] == (
        "lineara: error: no run may fail, got 1 that did (recipe, seed 3: the disk is full); mend it and call again"
    )
    assert "recipe, seed 3: failed: the disk is full" in error
    assert output == Path("out/comparison.md").read_text() + "out/comparison.md\n"
    assert json.loads(Path("out/recipe/seed3/settings.json").read_text())["trainer.max_steps"] == 5


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_comparison_ends_with_status_130(call, monkeypatch):
    interrupt = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(600)"
    monkeypatch.setattr("lineara.runs.comparison._RUN", interrupt)
    status, _, error = call("compare", recipe_with("run_dir", "run"))
    assert (status, error.splitlines()[-1]) == (130, "lineara: interrupted")


def test_what_cannot_be_compared_is_refused(mistake):
    recipe = recipe_with("run_dir", "run")
    assert_match("recipes must name at least one, got none", mistake("compare"))
    assert_match("a recipe must be a file, or the name of one in recipes/, got 'none'", mistake("compare", "none"))
    assert_match("recipes must differ from each other, got recipe twice", mistake("compare", recipe, recipe))
    assert_match("seeds must differ from each other, got 1 twice", mistake("compare", recipe, "--seeds", 1, 1))
    assert_match("an override must be KEY=VALUE", mistake("compare", recipe, "--override", "trainer.max_steps"))
    assert files() == ["recipe.yaml"]


# Names.


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["--trainer.max_step", "5"], "--trainer.max_steps"),  # which is no abbreviation
        (["--trainer.max_epoch=5"], "--trainer.max_epochs"),
        (["--model.warmup_step", "5"], "warmup_steps"),
        (["--data.batch_siz", "5"], "batch_size"),
    ],
    ids=str,
)
def test_an_unknown_option_is_refused_with_what_was_perhaps_meant(mistake, words, near):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert f"did you mean {near}" in mistake("fit", "--config", "recipe.yaml", *words)
    assert not Path("data").exists()


@pytest.mark.parametrize(
    "words", [["data", "listops", "--num_trai", "3"], ["data", "listops", "--num_trai=3"]], ids=str
)
def test_so_it_is_of_data(mistake, words):
    assert "did you mean --num_train" in mistake(*words)
    assert not Path("data").exists()


@pytest.mark.parametrize("words", [["--help"], ["--config", "recipe.yaml", "-h"]], ids=str)
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_is_one_page_and_names_the_longer_one(call, command, words):
    status, page, _ = call(command, *words)
    assert status == 0
    assert f"usage: lineara {command} --config RECIPE" in page
    assert len(page.splitlines()) < 30
    assert "--help-all" in page


def test_all_options_are_there_too(call):
    assert "--trainer.gradient_clip_val" in call("fit", "--help-all")[1]


def test_a_recipe_is_found_by_its_name(call):
    Path("recipes/tiny").mkdir(parents=True)
    Path("recipes/tiny/by_name.yaml").write_text(yaml.safe_dump(RECIPE))
    status, printed, _ = call("fit", "--config", "by_name", "--print_config")
    assert status == 0
    assert yaml.safe_load(printed)["data"]["init_args"]["batch_size"] == 10


def test_an_interrupted_run_is_named_where_its_best_checkpoint_is_missing(mistake):
    Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("run/checkpoints").mkdir(parents=True)
    assert "train first with `lineara fit`" in mistake("predict", "--config", "recipe.yaml")
    Path("run/checkpoints/last.ckpt").touch()
    assert "run/checkpoints/last.ckpt of a run that was interrupted" in mistake("predict", "--config", "recipe.yaml")
