"""The processes of a run: when one of them dies, all end soon, and one sentence says why.

Lightning's own launcher ends the others without a word, and a process that waits for a dead one may wait for half an
hour.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

# The process that starts the others, by its number; in their environment.
_FIRST = "LINEARA_FIRST_PROCESS"
_GO_ON = "go on with the same command and --ckpt_path last"
_FIRST_ENDED = f"the first process of the run must live as long as this one, got its end; {_GO_ON}"
_SECONDS_TO_SPEAK = 10.0  # for a process that ends of itself, to say why
_SECONDS_FOR_THE_FIRST = 2.0  # where all found the same, the first process is to say it
_SECONDS_BETWEEN_LOOKS = 0.5
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|store", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)(?: is killed by signal: ([\w ]+))?")


class Companions(Callback):
    """Watches the other processes of this machine that belong to the run, and turns their end into one sentence."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ending = False
        self._word = Word(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ending = True
        # Before connections are closed: of those that lose them none shall say so first.
        if isinstance(exception, Exception) and not _is_lost(trainer, exception):
            self._word.take()

    @contextmanager
    def watched(self, trainer: Trainer) -> Iterator[None]:
        """Around what the processes do together.

        Raises:
            ChildProcessError: if one of them, or of the processes that load data, has died.
        """
        self._begin(trainer)
        try:
            yield
        except Exception as error:
            sentence = self._explained(trainer, error) if isinstance(error, RuntimeError) else None
            if not self._word.take():
                raise SystemExit(2) from None  # another process says why
            if sentence is None:
                raise
            raise ChildProcessError(sentence) from error

    def _begin(self, trainer: Trainer) -> None:
        first = os.environ.get(_FIRST)
        if first != str(os.getppid()) and hasattr(trainer.strategy.launcher, "procs"):
            first = os.environ[_FIRST] = str(os.getpid())  # before the others are started
        ours = first if first in (str(os.getpid()), str(os.getppid())) else None
        self._word = Word(None if ours is None else int(ours))
        if first == str(os.getppid()):
            _in_the_background(self._watch_first, os.getppid())
        elif hasattr(trainer.strategy.launcher, "procs"):
            _in_the_background(self._watch_others, trainer)

    def _watch_first(self, first: int) -> None:
        while os.getppid() == first:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        time.sleep(_SECONDS_TO_SPEAK)  # a run that is done ends in less
        self._end(_FIRST_ENDED)

    def _watch_others(self, trainer: Trainer) -> None:
        while not (started := getattr(trainer.strategy.launcher, "procs", [])):
            time.sleep(0.05)
        self._processes = started
        for rank, process in enumerate(started, start=1):
            _in_the_background(self._watch_one, rank, process)

    def _watch_one(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        if status == 0:
            return
        if status > 0 or self._ending:  # this process is told of it by the connection, and speaks for itself
            time.sleep(_SECONDS_TO_SPEAK)
        for other in self._processes:
            other.kill()
        self._end(_sentence(rank, status))

    def _end(self, sentence: str) -> None:
        """End at once: the main thread may wait for what never comes."""
        if self._word.take(wait=False):
            print(f"lineara: error: {sentence}", file=sys.stderr, flush=True)
        os._exit(2)

    def _explained(self, trainer: Trainer, error: RuntimeError) -> str | None:
        text = " ".join(str(error).split())
        worker = _WORKER.search(text)
        if worker:
            how = f"killed ({worker[2].strip()})" if worker[2] else "ended"
            return (
                f"the processes that load data must live until the run ends, got process {worker[1]} {how}; where the "
                f"system did it, memory ran out: lower --data.num_workers or the batch size, and {_GO_ON}"
            )
        if not _is_lost(trainer, error):
            return None
        # The system may tell of the connection before it tells of the end.
        for _ in range(int(10 * _SECONDS_TO_SPEAK) if self._processes or self._word.first is not None else 0):
            if self._word.is_taken():
                return None
            if not self._processes and self._word.first_is_gone():
                return _FIRST_ENDED
            for rank, process in enumerate(self._processes, start=1):
                if process.returncode is not None:
                    return _sentence(rank, process.returncode)
            time.sleep(0.1)
        return (
            f"all processes of the run must live until it ends, got one that process {trainer.global_rank} no longer "
            f"reaches; look for what it said last, and {_GO_ON}"
        )


class Word:
    """The right to say why a run of several processes of this machine ends: the first one that takes it has it.

    It is a file that only one can make, for the command that all processes are in; one of an earlier run is removed.

    Args:
        first: number of the process that started the others; None for a process that is alone, which may always speak.
    """

    _commands: ClassVar[dict[int, int]] = {}

    def __init__(self, first: int | None) -> None:
        self.first = first
        self._mine = False
        if first is None:
            return
        # A process may run several commands, and all of a run the same ones.
        number = self._commands[first] = self._commands.get(first, 0) + 1
        folder = Path(tempfile.gettempdir()) / f"lineara-{os.getuid()}"
        self._path = folder / f"{first}-{number}"
        with suppress(OSError, ValueError):
            folder.mkdir(mode=0o700, exist_ok=True)
            for old in folder.iterdir() if (os.getpid(), 1) == (first, number) else ():
                if old.name.startswith(f"{first}-") or not _lives(int(old.name.split("-")[0])):
                    old.unlink(missing_ok=True)

    def take(self, *, wait: bool = True) -> bool:
        """Whether this process is the one to speak; others leave the first one some time for it."""
        if self.first is None or self._mine:
            return True
        patience = _SECONDS_FOR_THE_FIRST if wait and os.getpid() != self.first else 0.0
        until = time.monotonic() + patience
        while time.monotonic() < until and not self.is_taken() and not self.first_is_gone():
            time.sleep(0.05)
        try:
            self._path.touch(exist_ok=False)
        except FileExistsError:
            return False
        except OSError:  # where no file can be made, twice is better than never
            return True
        self._mine = True
        return True

    def is_taken(self) -> bool:
        """Whether another process speaks."""
        return self.first is not None and not self._mine and self._path.exists()

    def first_is_gone(self) -> bool:
        return self.first is not None and self.first not in (os.getpid(), os.getppid())


def started_by_another() -> bool:
    """Whether this process belongs to a run whose first process speaks for it."""
    return os.environ.get(_FIRST) == str(os.getppid())


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of a number that is another user's now
        return False
    return True


def _is_lost(trainer: Trainer, error: Exception) -> bool:
    """Whether an error says no more than that another process cannot be reached."""
    if not isinstance(error, RuntimeError) or trainer.world_size == 1:
        return False
    return bool(_LOST.search(f"{type(error).__name__} {' '.join(str(error).split())}"))


def _sentence(rank: int, status: int) -> str:
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    why = "; where the system did it, memory ran out" if status == -signal.SIGKILL else ""
    return f"all processes of the run must live until it ends, got process {rank} {how}{why}; {_GO_ON}"


def _in_the_background(task: object, *words: object) -> None:
    threading.Thread(target=task, args=words, daemon=True).start()  # type: ignore[arg-type]
