"""The processes of a run: when one of them dies, all end soon, and one sentence says why.

Lightning's own launcher ends the others without a word, and a process that waits for a dead one may wait for half an
hour.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

# The process that starts the others, by its number; in their environment.
_FIRST = "LINEARA_FIRST_PROCESS"
_GO_ON = "go on with the same command and --ckpt_path last"
_SECONDS_TO_SPEAK = 10.0  # for a process that ends of itself, to say why
_SECONDS_BETWEEN_LOOKS = 0.5
_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|store", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\)(?: is killed by signal: ([\w ]+))?")


class Companions(Callback):
    """Watches the other processes of this machine that belong to the run, and turns their end into one sentence."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ending = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._ending = True

    @contextmanager
    def watched(self, trainer: Trainer) -> Iterator[None]:
        """Around what the processes do together.

        Raises:
            ChildProcessError: if one of them, or of the processes that load data, has died.
        """
        self._begin(trainer)
        try:
            yield
        except RuntimeError as error:
            sentence = self._explained(trainer, error)
            if sentence is None:
                raise
            raise ChildProcessError(sentence) from error

    def _begin(self, trainer: Trainer) -> None:
        first = os.environ.get(_FIRST)
        if first is not None and int(first) == os.getppid():
            _in_the_background(self._watch_first, int(first))
        elif hasattr(trainer.strategy.launcher, "procs"):
            os.environ[_FIRST] = str(os.getpid())  # before they are started
            _in_the_background(self._watch_others, trainer)

    def _watch_first(self, first: int) -> None:
        while os.getppid() == first:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        time.sleep(_SECONDS_TO_SPEAK)  # a run that is done ends in less
        _end(f"the first process of the run must live as long as this one, got its end; {_GO_ON}")

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
        _end(_sentence(rank, status))

    def _explained(self, trainer: Trainer, error: RuntimeError) -> str | None:
        text = " ".join(str(error).split())
        worker = _WORKER.search(text)
        if worker:
            how = f"killed ({worker[2].strip()})" if worker[2] else "ended"
            return (
                f"the processes that load data must live until the run ends, got process {worker[1]} {how}; where the "
                f"system did it, memory ran out: lower --data.num_workers or the batch size, and {_GO_ON}"
            )
        if trainer.world_size == 1 or not _LOST.search(f"{type(error).__name__} {text}"):
            return None
        # The system may tell of the connection before it tells of the end.
        for _ in range(int(10 * _SECONDS_TO_SPEAK) if self._processes else 0):
            for rank, process in enumerate(self._processes, start=1):
                if process.returncode is not None:
                    return _sentence(rank, process.returncode)
            time.sleep(0.1)
        return (
            f"all processes of the run must live until it ends, got one that process {trainer.global_rank} no longer "
            f"reaches ({text[:100]}); look for what it said last, and {_GO_ON}"
        )


def started_by_another() -> bool:
    """Whether this process belongs to a run whose first process speaks for it."""
    return os.environ.get(_FIRST) == str(os.getppid())


def _sentence(rank: int, status: int) -> str:
    how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    why = "; where the system did it, memory ran out" if status == -signal.SIGKILL else ""
    return f"all processes of the run must live until it ends, got process {rank} {how}{why}; {_GO_ON}"


def _end(sentence: str) -> None:
    """End at once: the main thread may wait for what never comes."""
    print(f"lineara: error: {sentence}", file=sys.stderr, flush=True)
    os._exit(2)


def _in_the_background(task: object, *words: object) -> None:
    threading.Thread(target=task, args=words, daemon=True).start()  # type: ignore[arg-type]
