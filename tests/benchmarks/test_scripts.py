"""Scripts of benchmarks/ that compute something other than times."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from lineara.ops import efficient_attention

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plan_on_the_page_is_the_one_that_is_computed():
    assert script("scale_plan").plan() in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_positions_on_disk_are_attended_to_in_chunks(tmp_path):
    beyond = script("beyond_memory")
    shape = (5_003, 3, 16)
    query, key, value, output = (tmp_path / name for name in ("query", "key", "value", "output"))
    torch.manual_seed(0)
    for path in (query, key, value):
        beyond.fill(path, shape)
    beyond.attend(query, beyond.context_of(key, value, shape, 1_000), output, shape, 777)

    def read(path):
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float16).view(shape).transpose(0, 1)[None]

    expected = efficient_attention(*(read(path).float() for path in (query, key, value)), impl="reference")
    torch.testing.assert_close(read(output).float(), expected, rtol=2e-3, atol=1e-4)
    assert beyond.largest_error(query, key, value, output, shape, 1_000) < 1e-3


def test_more_than_the_disk_holds_is_refused_before_anything_is_written(monkeypatch, capsys, tmp_path):
    beyond = script("beyond_memory")
    monkeypatch.setattr(sys, "argv", ["beyond_memory.py", "--positions", str(10**13), "--folder", str(tmp_path)])
    with pytest.raises(SystemExit):
        beyond.main()
    assert "must have room for" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
