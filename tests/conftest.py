"""What tests of several rooms share."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Where there is no GPU, Triton's kernels are tested in its interpreter; triton reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def interruptible():
    """As at a terminal: what a shell starts in the background ignores interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def started_ranks(tmp_path_factory):
    """Run a script once per rank, as `script RANK NUMBER_OF_RANKS FOLDER`, and load the RANK.pt that each leaves."""

    def start(script: str | Path, num_ranks: int) -> list:
        folder = tmp_path_factory.mktemp("ranks")
        words = [sys.executable, "-W", "error", str(script)]
        ranks = [
            subprocess.Popen([*words, str(rank), str(num_ranks), str(folder)], stderr=subprocess.PIPE, text=True)
            for rank in range(num_ranks)
        ]
        try:
            said = [rank.communicate(timeout=120)[1] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert all(rank.returncode == 0 for rank in ranks), "\n".join(said)
        return [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]

    return start


@pytest.fixture(autouse=True)
def _alone():
    """No test finds itself in a run that another one has started: Lightning leaves word in the environment."""
    _forget_runs()
    yield
    _forget_runs()


def _forget_runs():
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "LINEARA_FIRST_PROCESS"):
        os.environ.pop(name, None)
