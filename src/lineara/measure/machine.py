"""What a measurement ran on, in words."""

import platform
import subprocess
import time
from pathlib import Path

import torch


def environment(folder: Path | str = ".") -> str:
    """Processor or GPU, threads, versions, the commit of the repository that `folder` lies in, and the date."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    threads = torch.get_num_threads()
    return (
        f"{device}, {threads} thread{'' if threads == 1 else 's'}, torch {torch.__version__.partition('+')[0]}, Python "
        f"{platform.python_version()}, commit {_commit(folder)}, {time.strftime('%Y-%m-%d')}."
    )


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit(folder: Path | str) -> str:
    try:
        words = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
