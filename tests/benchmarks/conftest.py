"""Rows of the attention suite that nobody measured."""

from dataclasses import asdict

import pytest
from attention.contenders import SDPA
from attention.rows import Row
from attention.shapes import shape_of


@pytest.fixture
def row():
    """From what a test is about to a row that holds it; a row without seconds was not measured."""
    return made_up_row


def made_up_row(contender="lineara", shape=None, pass_name="forward", seconds=1e-3, **changes):
    measured = seconds is not None
    fields = {
        "contender": contender,
        "formula": "another formula" if contender in SDPA else "same formula",
        **asdict(shape or shape_of(32, 4096, 64)),
        "pass_name": pass_name,
        "dtype": "bfloat16",
        "device": "cuda",
        "status": "measured" if measured else "not run: it is missing",
        "machine": "A GPU, 2 threads",
        "versions": "Python 3, torch 2",
        "commit": "0123abc",
        "code": "c0de",
        "date": "2026-01-31",
        "seconds": seconds,
        "seconds_low": seconds and seconds * 0.9,
        "seconds_high": seconds and seconds * 1.1,
        "repeats": 7 if measured else None,
        "device_seconds": seconds and seconds * 0.5,
        "copy_bytes_per_second": 4e12 if measured else None,
        "fraction_of_copy": 0.5 if measured else None,
        "error": 1e-3 if measured else None,
        "peak_bytes": 10**8 if measured else None,
        "picked": "triton" if contender == "lineara" else None,
    }
    return Row(**fields | changes)
