"""What tests of several rooms share."""

import os
import signal

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


@pytest.fixture(autouse=True)
def _alone():
    """No test finds itself in a run that another one has started: Lightning leaves word in the environment."""
    _forget_runs()
    yield
    _forget_runs()


def _forget_runs():
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE", "LINEARA_FIRST_PROCESS"):
        os.environ.pop(name, None)
