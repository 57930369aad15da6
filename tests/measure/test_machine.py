"""The words that tell what a measurement ran on."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lineara.measure.machine import environment, processor


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_machine_versions_and_commit_are_named(tmp_path):
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *identity, *words], check=True)
    commit = subprocess.run(
        ["git", "-C", tmp_path, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    words = environment(tmp_path)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    assert words.startswith(f"{device}, {torch.get_num_threads()} thread")
    assert f"torch {torch.__version__.partition('+')[0]}, " in words
    assert re.search(rf", commit {commit}, \d{{4}}-\d\d-\d\d\.$", words)


def test_without_a_repository_or_a_list_of_processors_it_says_what_it_can(tmp_path, monkeypatch):
    assert ", commit unknown, " in environment(tmp_path / "nowhere")
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "flags: none\n")
    assert processor()
