"""What a run of the attention suite may take, and what a case is expected to take."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from attention.rows import Row

# A quadratic contender without a shorter length to predict from runs up to this one.
UNPREDICTED_POSITIONS = 4096


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Args:
        minutes: no shape and no contender begins after so many minutes; None for no limit.
        call_seconds: a quadratic contender is left out where a call is predicted to take longer.
        case_seconds: time for the repeats of one contender in one pass.
        weigh: whether memory is measured; on the CPU each weighing takes a fresh process.
    """

    minutes: float | None = None
    call_seconds: float = 1.0
    case_seconds: float = 0.2
    weigh: bool = True


def check_device(device: str) -> None:
    """Raise ValueError for CUDA where torch finds none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' needs a CUDA device that torch can use, got none; use device='cpu'")


def predicted_seconds(row: Row, rows: Iterable[Row]) -> float | None:
    """From the longest length up to this one at which the same contender was measured; None if there is none.

    With the square of the length, and in proportion to heads and channels.
    """
    alike = [
        one
        for one in rows
        if one.seconds is not None
        and one.positions < row.positions
        and (one.contender, one.pass_name, one.dtype, one.device, one.machine)
        == (row.contender, row.pass_name, row.dtype, row.device, row.machine)
    ]
    if not alike:
        return None
    longest = max(alike, key=lambda one: (one.positions, one.shape.all_heads * one.key_dim))
    times = (row.positions / longest.positions) ** 2
    width = row.shape.all_heads * row.key_dim / (longest.shape.all_heads * longest.key_dim)
    return (longest.seconds or 0.0) * times * width


def free_bytes(device: str) -> float:
    """Memory of the device that nothing holds yet, what torch has set aside included."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")
