"""What tests of several rooms share."""

import signal

import pytest


@pytest.fixture
def interruptible():
    """As at a terminal: what a shell starts in the background ignores interruptions."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
