"""Comparisons of tiny ListOps recipes: what is refused, what a killed or failing run leaves, what is run again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from lineara.runs.comparison import _RUN, _reason, compare, find_recipe
from lineara.runs.run_folder import folder_lock

# What Lightning's command line still calls of jsonargparse.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*(By default only one Jsonargparse|.* was deprecated in v4)")

STEPS, VALIDATE_EVERY = 26, 5
# A task that kills its process in the middle of a run, once, where the run's folder says so; without it, ListOps's own.
KILLED = """
import os, signal
from pathlib import Path
from lineara.tasks.long_range_arena import SequenceClassification

class Killed(SequenceClassification):
    def training_step(self, batch, batch_index):
        folder = Path(self.trainer.default_root_dir)
        if folder.parent.name == "killed" and self.global_step == 13 and not (folder / "was_killed").exists():
            (folder / "was_killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_index)
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Several threads round differently from process to process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "killed_task.py").write_text(KILLED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def recipe(folder):
    """Write a recipe of this name and return its path; changes are by the path of the setting."""

    def write(name, **changes):
        network = {"vocab_size": 16, "num_classes": 10, "max_len": 30, "dim": 8, "mlp_dim": 8, "head_dim": 8}
        attention = {"class_path": "lineara.nn.EfficientAttention", "init_args": {"num_heads": 2}}
        settings = {
            "model": {
                "class_path": "killed_task.Killed",
                "init_args": {
                    "peak_lr": 1e-1,
                    "warmup_steps": 3,
                    "network": {
                        "class_path": "lineara.models.SequenceClassifier",
                        "init_args": network | {"attention": attention},
                    },
                },
            },
            "data": {
                "class_path": "lineara.tasks.long_range_arena.ListOpsData",
                "init_args": {
                    "data_root": str(folder),
                    "num_train": 200,
                    "num_val": 40,
                    "num_test": 40,
                    "min_len": 5,
                    "max_len": 30,
                    "batch_size": 20,
                    "num_workers": 1,
                },
            },
            "trainer": {
                "accelerator": "cpu",
                "max_steps": STEPS,
                "val_check_interval": VALIDATE_EVERY,
                "check_val_every_n_epoch": None,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 2,
                "enable_model_summary": False,
            },
        }
        for key, value in changes.items():
            place = settings
            *path, last = key.split("__")
            for part in path:
                place = place[part]
            place[last] = value
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.fixture(scope="module")
def two_calls(recipe, folder):
    """A comparison in which one run is killed, and the same comparison a second time."""
    recipes = [recipe("whole"), recipe("killed")]
    output = folder / "output"
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        for _ in range(2):
            said = []
            rows = compare(recipes, seeds=[7], output=output, progress=said.append)
            files = {path: path.read_text() for path in output.glob("comparison.*")}
            result = output / "whole/seed7/result.json"
            calls.append(SimpleNamespace(rows=rows, said=said, files=files, written=result.stat().st_mtime_ns))
    return SimpleNamespace(output=output, first=calls[0], second=calls[1])


def test_a_killed_run_leaves_the_other_alone(two_calls):
    whole, killed = two_calls.first.rows
    assert list(whole.results) == [7]
    assert not whole.failures
    assert not killed.results
    assert killed.failures == {7: "its process was ended by signal 9"}
    assert "killed, seed 7: failed: its process was ended by signal 9" in two_calls.first.said
    table = two_calls.first.files[two_calls.output / "comparison.md"]
    assert "1 of 1 |" in table
    assert "0 of 1, 1 failed |" in table


def test_a_killed_run_goes_on_to_the_numbers_of_one_that_was_not(two_calls):
    whole, killed = two_calls.second.rows
    assert not killed.failures
    assert killed.results[7]["metrics"] == whole.results[7]["metrics"]
    assert killed.results[7]["best_validation_score"] == whole.results[7]["best_validation_score"]
    assert [start["first_step"] for start in killed.results[7]["starts"]] == [0, 10]
    assert [start["first_step"] for start in whole.results[7]["starts"]] == [0]
    # The first ten steps of each start are not timed; of the killed one the last validation wrote what it had.
    assert whole.results[7]["timed_steps"] == STEPS - 10
    assert killed.results[7]["timed_steps"] == STEPS - 10 - 10


def test_a_finished_run_is_not_run_again(two_calls):
    assert two_calls.first.written == two_calls.second.written
    assert "whole, seed 7: done before" in two_calls.second.said


def test_a_result_says_what_was_measured(two_calls):
    row = two_calls.second.rows[0]
    result = row.results[7]
    assert set(result["metrics"]) >= {"test/accuracy", "test/loss", "test/accuracy_of_majority_class"}
    assert row.score == result["metrics"]["test/accuracy"]
    assert set(row.trivial_scores) == {"majority_class", "root_operator"}
    assert 0 < result["seconds_per_step"] < 60
    assert 0 <= result["peak_bytes"] < 1e9
    assert result["memory"].startswith("growth of the process's resident memory during fit")
    assert result["num_parameters"] > 1000
    assert set(result["versions"]) == {"lineara", "torch", "lightning", "python"}
    assert result["settings"]["trainer.max_steps"] == STEPS
    written = json.loads(two_calls.second.files[two_calls.output / "comparison.json"])
    assert [entry["score"] for entry in written["recipes"]] == [row.score for row in two_calls.second.rows]
    assert (two_calls.output / "trade_off.png").stat().st_size > 0


@pytest.mark.parametrize("name", ["whole", "killed"])
def test_another_budget_or_recipe_is_refused_where_runs_are(two_calls, recipe, name):
    paths = [recipe("whole"), recipe("killed")]
    sentence = r"seed7 must be a run of the recipe as it is now, got trainer\.max_steps 30 but it was begun with 26; "
    before = sorted(two_calls.output.rglob("*"))
    with pytest.raises(ValueError, match=sentence):
        compare(paths, seeds=[7], output=two_calls.output, overrides=["trainer.max_steps=30"])
    dim = "model.init_args.network.init_args.dim"
    with pytest.raises(ValueError, match=rf"got {dim} 16 but it was begun with 8"):
        compare([p for p in paths if p.stem == name], seeds=[7], output=two_calls.output, overrides=[f"{dim}=16"])
    assert sorted(two_calls.output.rglob("*")) == before


def test_a_run_ends_with_the_process_that_started_it():
    process = subprocess.Popen([sys.executable, "-c", _RUN, "--no_such_word"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.close()  # as the system does for a process that was killed
    assert process.wait() == 1  # and not 2, of the unknown word


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_the_run_too_and_leaves_a_folder_to_go_on_with(recipe, tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    interrupt = f"""
import os, pathlib, signal, stat, time
pathlib.Path({str(pipe)!r}).write_text(f"{{os.getpid()}} {{stat.S_ISFIFO(os.fstat(0).st_mode)}}")
os.kill(os.getppid(), signal.SIGINT)
time.sleep(600)
"""
    monkeypatch.setattr("lineara.runs.comparison._RUN", interrupt)
    with pytest.raises(KeyboardInterrupt):
        compare([recipe("one")], seeds=[0], output=tmp_path / "output")
    process, has_a_pipe = pipe.read_text().split()
    assert has_a_pipe == "True"
    with pytest.raises(ProcessLookupError):
        os.kill(int(process), 0)
    assert "not yet run" in (tmp_path / "output/comparison.md").read_text()
    assert not (tmp_path / "output/one/seed0/result.json").exists()
    with folder_lock(tmp_path / "output"):
        pass


STAND_IN = """
import json, pathlib, sys
[folder] = [pathlib.Path(word.partition("=")[2], "measured") for word in sys.argv if word.startswith("--run_dir=")]
[seed] = [int(word.partition("=")[2]) for word in sys.argv if word.startswith("--seed_everything=")]
folder.mkdir(parents=True)
last = {"memory": "m", "best_validation_score": 0.5, "num_parameters": 9, "device": "d", "versions": {}}
start = {"first_step": 0, "seconds": [0.25] * 13, "peak_bytes": 1000, **last}
(folder / "start_000000000.json").write_text(json.dumps(start))
(folder / "test.json").write_text(json.dumps({"test/accuracy": seed / 10}))
"""


def test_every_recipe_has_its_first_seed_before_any_has_its_second(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lineara.runs.comparison._RUN", STAND_IN)
    said = []
    rows = compare([recipe("one"), recipe("two")], seeds=[3, 5], output=tmp_path, progress=said.append)
    assert [line.partition(":")[0] for line in said[::2]] == [
        "one, seed 3",
        "two, seed 3",
        "one, seed 5",
        "two, seed 5",
    ]
    assert [row.scores for row in rows] == [[0.3, 0.5]] * 2
    assert [row.seconds_per_step for row in rows] == [0.25, 0.25]
    assert "0.4000 +- 0.1414 (n = 2)" in (tmp_path / "comparison.md").read_text()


def test_a_failing_run_is_quoted_and_the_others_happen(recipe, tmp_path, monkeypatch):
    failing = "import sys\nif '--seed_everything=3' in sys.argv:\n    sys.exit('lineara: error: the disk is full')\n"
    monkeypatch.setattr("lineara.runs.comparison._RUN", failing + STAND_IN)
    said = []
    rows = compare([recipe("one"), recipe("two")], seeds=[3, 5], output=tmp_path, progress=said.append)
    assert [row.failures for row in rows] == [{3: "the disk is full"}] * 2
    assert [list(row.results) for row in rows] == [[5], [5]]
    assert "two, seed 3: failed: the disk is full" in said
    assert "- Failed: two, seed 3: the disk is full" in (tmp_path / "comparison.md").read_text()


def test_a_run_that_failed_before_its_first_checkpoint_may_be_mended(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lineara.runs.comparison._RUN", "import sys; sys.exit('lineara: error: too few steps')")
    [row] = compare([recipe("one")], seeds=[0], output=tmp_path)
    assert row.failures == {0: "too few steps"}
    monkeypatch.setattr("lineara.runs.comparison._RUN", STAND_IN)
    [row] = compare([recipe("one")], seeds=[0], output=tmp_path, overrides=["trainer.max_steps=30"])
    assert row.results[0]["settings"]["trainer.max_steps"] == 30
    with pytest.raises(ValueError, match=r"got trainer\.max_steps 26 but it was begun with 30"):
        compare([recipe("one")], seeds=[0], output=tmp_path)


def test_a_task_whose_test_does_not_log_the_score_fails(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lineara.runs.comparison._RUN", STAND_IN)
    [row] = compare([recipe("one", checkpoint={"monitor": "val/loss", "mode": "min"})], seeds=[0], output=tmp_path)
    assert row.failures == {
        0: "its test must log test/loss, got test/accuracy; log it, or set checkpoint.monitor to a score that it logs"
    }
    assert not (tmp_path / "one/seed0/result.json").exists()


# Refusals, all before anything is run.


@pytest.fixture
def refused(tmp_path):
    def call(sentence, recipes, error=ValueError, seeds=(0,), **options):
        with pytest.raises(error, match=sentence) as caught:
            compare(recipes, seeds=seeds, output=tmp_path / "output", **options)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "output").exists()

    return call


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trainer__max_steps": 27}, r"got trainer\.max_steps 26 in one and 27 in two; set it for all, such as by "),
        ({"data__init_args__batch_size": 10}, r"got data\.init_args\.batch_size 20 in one and 10 in two"),
        ({"model__init_args__warmup_steps": 4}, r"got model\.init_args\.warmup_steps 3 in one and 4 in two"),
        ({"trainer__precision": "bf16-mixed"}, r"got trainer\.precision None in one and bf16-mixed in two"),
        ({"checkpoint": {"monitor": "val/loss"}}, r"got checkpoint\.monitor val/accuracy in one and val/loss in two"),
    ],
    ids=str,
)
def test_recipes_of_different_budgets_are_refused(recipe, refused, change, sentence):
    refused(rf"^recipes must have the same budget, {sentence}", [recipe("one"), recipe("two", **change)])


def test_recipes_made_equal_by_an_override_are_not(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("lineara.runs.comparison._run", lambda *arguments: "not run")
    recipes = [recipe("one"), recipe("two", trainer__max_steps=27, run_dir="elsewhere", seed_everything=3)]
    rows = compare(recipes, seeds=[0, 1], output=tmp_path, overrides=["trainer.max_steps=28"])
    assert [row.settings["trainer.max_steps"] for row in rows] == [28, 28]
    assert [row.failures for row in rows] == [{0: "not run", 1: "not run"}] * 2


def test_nothing_to_compare_and_what_is_named_twice_is_refused(recipe, refused):
    one = recipe("one")
    refused("^recipes must name at least one, got none", [])
    refused("^recipes must differ from each other, got one twice", [one, one])
    refused("^seeds must name at least one, got none", [one], seeds=[])
    refused("^seeds must differ from each other, got 3 twice", [one], seeds=[3, 1, 3])


def test_files_that_are_no_recipes_are_refused(recipe, refused, tmp_path):
    refused(r"none\.yaml must be a recipe that can be read", [tmp_path / "none.yaml"], error=FileNotFoundError)
    refused(r"one\.yaml: .*speed", [recipe("one", speed=1)])
    empty, broken = tmp_path / "empty.yaml", tmp_path / "broken.yaml"
    empty.touch()
    broken.write_text("model: [1,\n")
    refused(r"empty\.yaml: a recipe must hold settings, got an empty file$", [empty])
    refused(r"broken\.yaml: Problems parsing config: ", [broken])
    refused(r" must be a recipe that can be read, got Is a directory", [tmp_path], error=IsADirectoryError)
    refused("checkpoint.monitor must name a score of the validation", [recipe("one", checkpoint={"monitor": "loss"})])


def test_overrides_that_are_none_are_refused(recipe, refused):
    one = recipe("one")
    for wrong in ("trainer.max_steps", "=3", "--trainer.max_steps=3"):
        refused(f"^an override must be KEY=VALUE, .* got '{wrong}'", [one], overrides=[wrong])
    refused("^an override must be of a recipe's settings, got run_dir", [one], overrides=["run_dir=here"])
    refused(r"one\.yaml: .*speed", [one], overrides=["trainer.speed=3"])


def test_an_output_that_cannot_be_written_or_is_in_use_is_refused(recipe, tmp_path):
    one = recipe("one")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^output must be a folder that can be written to, got .*file"):
        compare([one], seeds=[0], output=tmp_path / "file")
    with (
        folder_lock(tmp_path),
        pytest.raises(ValueError, match="that no other `lineara compare` is writing to, got "),
    ):
        compare([one], seeds=[0], output=tmp_path)


def test_a_damaged_file_of_an_earlier_call_is_named(recipe, tmp_path):
    run_dir = tmp_path / "one/seed0"
    (run_dir / "checkpoints").mkdir(parents=True)
    (run_dir / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json must be a file of `lineara compare`, got .*; remove"):
        compare([recipe("one")], seeds=[0], output=tmp_path)


def test_a_recipe_is_a_path_or_a_name_in_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"got 'listops_softmax'; there are: none \(the current folder holds"):
        find_recipe("listops_softmax")
    path = Path("recipes/arena/listops_softmax.yaml")
    path.parent.mkdir(parents=True)
    path.touch()
    path.with_stem("listops_linear").touch()
    assert find_recipe("listops_softmax") == find_recipe(str(path)) == path
    with pytest.raises(FileNotFoundError, match=r"got 'listops_sofmax'; did you mean listops_softmax\?$"):
        find_recipe("listops_sofmax")


def test_a_reason_is_one_sentence(tmp_path):
    log = tmp_path / "output.txt"
    log.write_text("Restored\n\nlineara: error: dim must be even, got 3\n\n")
    assert _reason(log, 2) == "dim must be even, got 3"
    log.write_text("Traceback\n  File\nRuntimeError: out of memory\n")
    assert _reason(log, 1) == "RuntimeError: out of memory"
    log.write_text("")
    assert _reason(log, 1) == "it wrote nothing"
    assert _reason(log, -15) == "its process was ended by signal 15"
