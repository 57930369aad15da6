"""How the GPU kernels cut their work: the tiles of a pass over positions, and the programs that share it.

The sizes were chosen by what the compiler makes of them (`benchmarks/kernel_counts.py`), not by time. Everything that
"auto" admits fits into the shared memory of the device; up to 64 channels nothing of 16 bits spills registers.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

MOST_SPLITS = 256
# A split of fewer blocks spends its time on beginning and ending.
_LEAST_BLOCKS = 8

Pass = Literal["summarize", "attend", "back", "context back", "summarize back"]


class Device(NamedTuple):
    """A GPU: its multiprocessors, the bytes of shared memory that one of them has and one program can have, its age."""

    multiprocessors: int
    shared: int
    most_shared: int
    major: int  # of its compute capability


class Tiles(NamedTuple):
    """Positions, key channels and value channels of a tile, warps, and stages of the pipeline that loads positions."""

    key_dim: int
    value_dim: int
    n: int
    k: int
    v: int
    warps: int
    stages: int
    shared: int  # bytes, at most

    @property
    def num_k(self) -> int:
        return -(-self.key_dim // self.k)

    @property
    def num_v(self) -> int:
        return -(-self.value_dim // self.v)

    def splits(self, device: torch.device, programs: int, length: int, most: int = MOST_SPLITS) -> int:
        """Parts of every row's positions, so that all programs together keep the whole device busy for as long."""
        on = describe(device)
        # Registers hold 8 warps of any kernel here.
        resident = max(1, min(8 // self.warps, on.shared // (self.shared + 1024)))
        return _splits(programs, -(-length // self.n), on.multiprocessors * resident, most)


@cache
def _splits(programs: int, blocks: int, places: int, most: int) -> int:
    """The number of splits at which the busiest place is done first, if to begin a split takes as long as a block."""
    if programs == 0:
        return 1
    most = max(1, min(most, blocks // _LEAST_BLOCKS, -(-8 * places // programs)))
    return min(range(1, most + 1), key=lambda splits: -(-programs * splits // places) * (1 - -blocks // splits))


@cache
def tiles_of(what: Pass, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """The tiles of a pass: the first of its candidates that fit into the device's shared memory.

    `"back"` is over queries and output gradients: every program sees all key channels at once. `"context back"` is over
    them once more, for the gradient of the context, where one pass cannot hold both (see `in_one_pass`).
    """
    k, v = (max(16, 1 << (width - 1).bit_length()) for width in (key_dim, value_dim))
    candidates = _of_float32(what, k, v) if dtype == torch.float32 else _of_16_bits(what, k, v)
    smallest = None
    for n, most_k, most_v, warps, stages in candidates:
        tile_k, tile_v = min(k, most_k), min(v, most_v)
        # (Of float32 the factors of products are kept in two parts.)
        shared = _shared(what, n, tile_k, tile_v, stages) * (8 if dtype == torch.float32 else 2) + 1024
        if what in ("back", "summarize back") and value_dim > tile_v:
            shared += 4 * tile_k * tile_v  # a further tile of the context, in float32, before it is narrowed
        if what == "summarize back" and describe(device).major not in (9, 10):
            shared += dtype.itemsize * tile_k * tile_v  # the context once more, transposed
        smallest = Tiles(key_dim, value_dim, n, tile_k, tile_v, warps, stages, shared)
        if shared <= describe(device).most_shared:
            return smallest
    assert smallest is not None, "every pass has candidates"
    return smallest


def in_one_pass(tiles: Tiles, dtype: torch.dtype) -> bool:
    """Whether the gradients of queries and of their context fit into one pass."""
    return tiles.num_v == 1 and max(tiles.k, tiles.v) <= (64 if dtype == torch.float32 else 128)


def _shared(what: Pass, n: int, k: int, v: int, stages: int) -> int:
    """Numbers that a program keeps in shared memory: positions of all stages, factors of products, and the context."""
    if what == "summarize":
        return max(stages, 1) * n * (k + v)
    if what == "attend":
        return stages * n * k + k * v
    if what == "context back":
        return stages * n * (k + v) + n * k
    return stages * n * (k + v) + k * v + (n * k if what == "summarize back" else 0)


def _of_16_bits(what: Pass, k: int, v: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Positions, most key and value channels of a tile, warps and stages; what is best first."""
    widest = max(k, v)
    if what == "summarize":
        warps = 4 if widest <= 64 else 8
        for n, stages in ((128, 3), (128, 2), (64, 3), (64, 2), (64, 1)):
            yield n, 128, 128, warps, stages
    elif what == "attend":
        for most_v in (128, 64, 32):
            for n, stages in ((64, 3), (64, 2), (64, 1), (32, 1), (16, 1)):
                yield n, 512, most_v, 4 if widest <= 128 else 8, stages
    else:
        if widest <= 64:
            for stages in (3, 2, 1):
                yield 64, 64, 64, 4, stages
        elif widest <= 128:
            if what == "back":
                yield 128, 128, 128, 8, 3
                yield 128, 128, 128, 8, 2
            for n, stages in ((64, 3), (64, 2), (64, 1), (32, 1)):
                yield n, 128, 128, 8, stages
        # (Of keys and values in tiles of 32, the compiler keeps larger blocks in local memory on 8.6.)
        small = ((16, 32), (16, 16)) if what == "summarize back" else ((32, 32), (16, 32), (16, 16))
        for n, most_v in ((64, 256), (64, 128), (64, 64), (32, 64), *small):
            if what != "context back" or most_v <= 128:
                yield n, 512, most_v, 8, 1


def _of_float32(what: Pass, k: int, v: int) -> Iterator[tuple[int, int, int, int, int]]:
    widest = max(k, v)
    if what == "summarize":
        for n, stages in ((64 if widest <= 64 else 32, 2), (32, 2), (32, 1), (16, 1)):
            yield n, 128, 128, 8, stages
    else:
        if k <= 64:
            yield 64, 64, 64, 8, 2
            yield 64, 64, 64, 8, 1
        for n, most_v in ((64, 32), (32, 32), (32, 16), (16, 16)):
            yield n, 512, most_v, 8, 1


@cache
def describe(device: torch.device) -> Device:
    """What there is to share; in Triton's interpreter, where every program costs milliseconds, little."""
    if device.type != "cuda":
        return Device(6, 233472, 232448, 9)
    properties: Any = torch.cuda
    found = properties.get_device_properties(device)
    return Device(
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.shared_memory_per_block_optin,
        found.major,
    )
