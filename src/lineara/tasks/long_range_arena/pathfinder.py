"""Pathfinder examples, and a generator that draws many of them at once."""

import os
from collections import deque
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from lineara.tasks.long_range_arena.pathfinder_board import SIZE, PathfinderDrawing
from lineara.tasks.long_range_arena.pathfinder_drawing import draw_image

_Bytes = npt.NDArray[np.uint8]

_BENCHMARK = PathfinderDrawing()
_EXAMPLES_PER_CHUNK = 64


@dataclass(eq=False)
class PathfinderExamples:
    """Drawings and whether their discs are joined; ValueError if the arrays do not fit together.

    Args:
        images: (examples, 32, 32) uint8, 0 is black.
        labels: (examples,) uint8, 1 where both discs lie on one contour, else 0.
    """

    images: _Bytes
    labels: _Bytes

    def __post_init__(self) -> None:
        for name, array, shape in (("images", self.images, (len(self), SIZE, SIZE)), ("labels", self.labels, None)):
            if array.dtype != np.uint8 or array.shape != (shape or (len(self),)):
                raise ValueError(
                    f"{name} must be uint8 of the shape {shape or (len(self),)}, got {array.dtype} of {array.shape}"
                )
        if self.labels.max(initial=0) > 1:
            raise ValueError(f"labels must be 0 or 1, got {self.labels.max()}")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[_Bytes, int]:
        """Image (a view) and label of one example."""
        return self.images[index], int(self.labels[index])

    def part(self, start: int, stop: int) -> "PathfinderExamples":
        """Examples `start` up to but not including `stop`; views."""
        return PathfinderExamples(self.images[start:stop], self.labels[start:stop])


def generate(
    num_examples: int,
    *,
    drawing: PathfinderDrawing = _BENCHMARK,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> PathfinderExamples:
    """Draw examples, labels alternating from 0 on.

    Args:
        num_examples: how many, at least 0.
        drawing: how they look.
        seed: at least 0; the result depends on it and the drawing, never on `num_workers`.
        num_workers: processes to use; None is one per processor; 0 and 1 use none but this one.
        progress: show a bar over the examples on standard error.

    Raises:
        ValueError: an argument is out of range, or the contours of the drawing do not fit the image.
        RuntimeError: a process was ended from outside.

    Cost: about 1.7 ms of one processor per benchmark example, 24 of 25 attempts at two contours being given up.
    """
    for name, given in (("num_examples", num_examples), ("seed", seed), ("num_workers", num_workers or 0)):
        if given < 0:
            raise ValueError(f"{name} must be at least 0, got {given}")
    num_workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    images = np.empty((num_examples, SIZE, SIZE), np.uint8)
    with (
        closing(_chunks(num_examples, drawing, seed, num_workers)) as chunks,
        tqdm(total=num_examples, desc="pathfinder", unit=" examples", disable=not progress) as bar,
    ):
        for start, chunk in zip(range(0, num_examples, _EXAMPLES_PER_CHUNK), chunks):
            images[start : start + len(chunk)] = chunk
            bar.update(len(chunk))
    return PathfinderExamples(images, (np.arange(num_examples) % 2).astype(np.uint8))


def _chunks(num_examples: int, drawing: PathfinderDrawing, seed: int, num_workers: int) -> Generator[_Bytes]:
    """The images in order, some at a time."""
    tasks = [
        (drawing, seed, start, min(start + _EXAMPLES_PER_CHUNK, num_examples))
        for start in range(0, num_examples, _EXAMPLES_PER_CHUNK)
    ]
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        yield from (_draw_chunk(*task) for task in tasks)
        return
    with _processes(num_workers) as pool:
        ahead = deque(pool.submit(_draw_chunk, *task) for task in tasks)
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def _processes(num_workers: int) -> Generator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise RuntimeError(
            "every process must live until the drawings are done, got one that ended; call this below "
            "`if __name__ == '__main__':` if in a script, free some space in memory, or set num_workers to 1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave an interrupt from the keyboard to the parent, and end when the parent is killed."""
    signal(SIGINT, SIG_IGN)
    Thread(target=_exit_after_parent, daemon=True).start()


def _exit_after_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _draw_chunk(drawing: PathfinderDrawing, seed: int, start: int, stop: int) -> _Bytes:
    """Each example has random numbers of its own."""
    return np.stack(
        [
            draw_image(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,))), i % 2, drawing)
            for i in range(start, stop)
        ]
    )
