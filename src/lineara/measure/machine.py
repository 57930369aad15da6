"""What a measurement ran on, in words."""

import hashlib
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch


def environment(folder: Path | str = ".") -> str:
    """Processor or GPU, threads, versions, the commit of the repository that `folder` lies in, and the date."""
    device = hardware("cuda" if torch.cuda.is_available() else "cpu")
    return (
        f"{device}, torch {torch.__version__.partition('+')[0]}, Python "
        f"{platform.python_version()}, commit {commit(folder)}, {today()}."
    )


def hardware(device: str) -> str:
    """The GPU or the processor, and the number of threads."""
    threads = torch.get_num_threads()
    name = processor() if device == "cpu" else torch.cuda.get_device_name()
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}"


def versions(*others: str) -> str:
    """Versions of Python, torch, CUDA and triton, and of those other distributions that are installed."""
    found = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    if torch.cuda.is_available():
        found += [f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    for name in ("triton", *others):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit(folder: Path | str) -> str:
    """The commit of the repository that a folder lies in, with "+" behind it where files differ from it."""
    try:
        head = _git(folder, "rev-parse", "--short", "HEAD").strip()
        return head + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def code_digest(*folders: Path) -> str:
    """Eight digits that change with any Python file in the folders; a checkout without git has them too."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def today() -> str:
    return time.strftime("%Y-%m-%d")


def _git(folder: Path | str, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True).stdout


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
