"""The attention suite as a user calls it, also on a machine that has torch and nothing else."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention import rounds, suite
from attention.rows import read_rows

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--device", "cpu", "--positions", "53", "31", "--heads", "2", "--head_dim", "7", "--skip_memory"]
# Libraries that are not installed, numpy among them: importing one raises, and looking for it finds nothing.
BARE = """
import sys

ABSENT = {
    "numpy", "matplotlib", "lightning", "torchmetrics", "jsonargparse", "torchvision", "tqdm", "yaml", "PIL", "scipy",
    "sklearn", "skimage", "timm", "transformers", "tensorboard", "triton", "performer_pytorch",
}

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """Run the command in an empty folder: what was drawn, the rows, and standard output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(rounds._COPIED_BYTES, "cpu", 2**20)

    def run(*words, draw=None):
        drawn = []
        draw = draw or (lambda *picture: drawn.append(picture))
        suite.measure(suite.parse(words), draw=draw, progress=lambda line: None)
        return drawn, capsys.readouterr().out

    return run


def test_rows_report_and_picture_are_written_to_a_folder(called):
    contenders = ["--contenders", "lineara", "eager", "sdpa-cudnn", "sdpa-math", "linformer"]
    [(points, picture)], said = called(*FEW, *contenders, "--case_seconds", "0.001", "--output", "new/out")
    assert said.splitlines() == ["new/out/attention.json", "new/out/attention.md"]
    rows = read_rows(Path("new/out/attention.json"))
    assert [(row.positions, row.dtype) for row in rows[::15]] == [(31, "float32"), (53, "float32")]
    assert len(rows) == 2 * 3 * 5
    assert "# Efficient attention against others" in Path("new/out/attention.md").read_text()
    assert picture == Path("new/out/attention.png")
    assert {(point["attention"], point["positions"], point["backward"]) for point in points} == {
        (name, positions, backward)
        for name in ("efficient", "plain", "softmax")
        for positions in (31, 53)
        for backward in (False, True)
    }


def test_a_second_call_measures_nothing_again_and_one_without_matplotlib_draws_nothing(called):
    words = [*FEW, "--contenders", "eager", "--case_seconds", "0.001", "--output", "out"]
    called(*words)
    before = Path("out/attention.json").read_text()

    def no_matplotlib(*picture):
        raise ImportError("no matplotlib")

    called(*words, draw=no_matplotlib)
    assert Path("out/attention.json").read_text() == before


def test_an_interrupted_run_has_its_report(called, monkeypatch):
    def interrupted(self, *arguments):
        suite_measure(self, *arguments)
        raise KeyboardInterrupt

    from attention.measurement import Suite

    suite_measure = Suite.measure
    monkeypatch.setattr(Suite, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        called(*FEW, "--contenders", "eager", "--case_seconds", "0.001", "--output", "out")
    assert "| eager |" in Path("out/attention.md").read_text()


def test_the_command_draws_too(called):
    assert suite.main([*FEW, "--contenders", "eager", "--case_seconds", "0.001", "--output", "out"]) == 0
    assert Path("out/attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_fastest_of_several_at_each_length(called, monkeypatch):
    seconds = {"sdpa-flash": {31: 2.0, 53: 9.0}, "sdpa-math": {31: 3.0, 53: 5.0}}
    rows_of = suite.RowsFile.rows.fget
    monkeypatch.setattr(
        suite.RowsFile,
        "rows",
        property(lambda self: [replace(row, seconds=seconds[row.contender][row.positions]) for row in rows_of(self)]),
    )
    [(points, _)], _ = called(*FEW, "--contenders", *seconds, "--case_seconds", "0.001", "--output", "out")
    drawn = {(point["attention"], point["positions"], point["seconds"]) for point in points if point["backward"]}
    assert drawn == {("softmax", 31, 2.0), ("softmax", 53, 5.0)}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--contenders", "linear"], "contenders must be among .* got 'linear'"),
        (["--preset", "targets"], "preset must be one of quick, full on cpu, got 'targets'"),
        (["--positions", "0"], "positions must be at least 1, got 0"),
        (["--limit_minutes", "-1"], "limit_minutes must be positive, got -1"),
        (["--case_seconds", "nan"], "case_seconds must be positive, got nan"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(called, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        called("--device", "cpu", *words)
    assert list(Path().iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_without_a_device_is_refused_before_anything_is_written(called):
    with pytest.raises(ValueError, match="device='cuda' needs a CUDA device that torch can use, got none"):
        called("--device", "cuda")
    assert list(Path().iterdir()) == []


def test_a_checkout_needs_torch_and_nothing_else(tmp_path):
    script = str(ROOT / "benchmarks" / "attention" / "suite.py")
    code = BARE + f"import runpy; sys.argv[0] = {script!r}; runpy.run_path({script!r}, run_name='__main__')"
    words = [*FEW, "--contenders", "lineara", "eager", "lineara-triton", "sdpa-flash", "performer"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--case_seconds", "0.001", "--output", "out"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["out/attention.json", "out/attention.md"]
    rows = read_rows(tmp_path / "out" / "attention.json")
    statuses = {(row.contender, row.status) for row in rows}
    assert {("lineara", "measured"), ("eager", "measured")} <= statuses
    assert ("performer", "not run: performer-pytorch is not installed") in statuses
    assert "Traceback" not in done.stderr
