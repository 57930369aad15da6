"""Attend over more positions than memory holds: keys and values on disk, summarised chunk by chunk, then the queries.

    python benchmarks/beyond_memory.py --positions 150_000_000 --folder <where there is room>

Keys, values and queries are one file each, (positions, heads * channels) in float16, mapped into memory; what a chunk
has read or written is given back to the kernel before the next. The largest resident memory of the process is printed
beside the size of the files and of the machine's memory. A sample of the output is checked against the queries and a
context that is computed in chunks of another length.
"""

import argparse
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from lineara.measure.calls import all_time_maximum, reset_high_water_mark
from lineara.measure.machine import environment
from lineara.ops import attend_context, merge_contexts, summarize_context

DTYPE = torch.float16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=4_000_000)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=64, help="per head")
    parser.add_argument("--chunk", type=int, default=65_536, help="positions that are in memory at a time")
    parser.add_argument("--folder", type=Path, help="for four files, which are deleted; default: the temporary folder")
    options = parser.parse_args()
    shape = (options.positions, options.heads, options.channels)
    size = options.positions * options.heads * options.channels * DTYPE.itemsize
    folder = options.folder or Path(tempfile.gettempdir())
    if min(shape) < 1 or options.chunk < 1:
        parser.error("positions, heads, channels and chunk must be at least 1")
    if not folder.is_dir():
        parser.error(f"{folder} must be a folder")
    free = shutil.disk_usage(folder).free
    if 4 * size > free:
        needed, there = (f"{number / 1e9:.3g} GB" for number in (4 * size, free))
        parser.error(f"{folder} must have room for {needed}, got {there}; name another folder")

    print(f"# More positions than memory\n\n{environment(Path(__file__).parent)}\n")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        query, key, value, output = (Path(scratch) / name for name in ("query", "key", "value", "output"))
        seconds = {"writing random files": timed(lambda: [fill(path, shape) for path in (query, key, value)])}
        reset_high_water_mark()
        before = all_time_maximum()
        context = None

        def summarize() -> None:
            nonlocal context
            context = context_of(key, value, shape, options.chunk)

        seconds["summarising keys and values"] = timed(summarize)
        seconds["attending"] = timed(lambda: attend(query, context, output, shape, options.chunk))
        peak = all_time_maximum()
        error = largest_error(query, key, value, output, shape, options.chunk)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print("| what | |\n|---|---|")
    print(f"| positions, heads, channels | {', '.join(f'{number:,}' for number in shape)} |")
    print(f"| queries, keys, values and output, on disk | {4 * size / 1e9:.3g} GB |")
    print(f"| memory of the machine | {memory / 1e9:.3g} GB |")
    print(f"| resident memory before | {before / 1e6:.0f} MB |")
    print(f"| largest resident memory | {peak / 1e6:.0f} MB |")
    for what, taken in seconds.items():
        print(f"| seconds: {what} | {taken:.3g} |")
    print(f"| largest difference to other chunks, of a sample | {error:.2g} |")


def context_of(key: Path, value: Path, shape: tuple[int, int, int], length: int):
    """The summary of all keys and values: the part that users write, over whatever yields their chunks."""
    pairs = zip(chunks(key, shape, length), chunks(value, shape, length))
    return reduce(merge_contexts, (summarize_context(k, v) for k, v in pairs))


def attend(query: Path, context: object, output: Path, shape: tuple[int, int, int], length: int) -> None:
    output.touch()
    os.truncate(output, query.stat().st_size)
    for q, o in zip(chunks(query, shape, length), chunks(output, shape, length, write=True)):
        o.copy_(attend_context(q, context))  # pyright: ignore[reportArgumentType]


def chunks(path: Path, shape: tuple[int, int, int], length: int, *, write: bool = False) -> Iterator[Tensor]:
    """The file's positions as views of (1, heads, up to `length` positions, channels), one after the other."""
    with mapped(path, write) as memory:
        numbers = torch.frombuffer(memory, dtype=DTYPE).view(shape)
        for start in range(0, shape[0], length):
            yield numbers[start : start + length].transpose(0, 1)[None]
            # Pages that have been used may go; written ones are on their way to the disk.
            memory.madvise(mmap.MADV_DONTNEED)
        del numbers


@contextmanager
def mapped(path: Path, write: bool) -> Iterator[mmap.mmap]:
    with path.open("r+b" if write else "rb") as file:
        # A private mapping of what is only read: torch asks for memory that it could write to.
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_COPY
        yield mmap.mmap(file.fileno(), 0, access=access)


def fill(path: Path, shape: tuple[int, int, int]) -> None:
    """Normal numbers, from one block of them that is written again and again at other offsets."""
    positions, heads, channels = shape
    row = heads * channels
    block = torch.randn(min(positions, 1_000_003), row).to(DTYPE)
    with path.open("wb") as file:
        for start in range(0, positions, len(block)):
            shift = start % len(block)
            file.write(block.roll(shift, 0)[: positions - start].contiguous().numpy(force=True).tobytes())


def largest_error(query: Path, key: Path, value: Path, output: Path, shape: tuple[int, int, int], length: int) -> float:
    context = context_of(key, value, shape, max(length // 3, 1))
    pair = zip(chunks(query, shape, length), chunks(output, shape, length))
    q, o = next(pair)
    return (attend_context(q, context).float() - o.float()).abs().max().item()


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
