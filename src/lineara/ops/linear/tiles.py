"""How the GPU kernels cut their work: the tiles of a pass over positions, and the programs that share it.

The sizes were chosen by what the compiler says when asked for an H200 (sm_90), not by time: everything fits into the
shared memory of one multiprocessor, and registers are spilled by bfloat16 not at all up to 128 channels and by at most
96 bytes a thread at 256; float16, whose backward passes scale rows, spills more from 128 channels on, float32, whose
products are three on tensor cores, a little below and much beyond.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch

# Of one program, eight warps and a multiprocessor: two programs where a pass maps positions one by one, one where every
# program keeps sums of its own, which must be merged afterwards. Twice as many of four warps.
_PROGRAMS = {"maps": 2, "sums": 1}
# In Triton's interpreter, where every program costs milliseconds.
_MULTIPROCESSORS_INTERPRETED = 6
MOST_SPLITS = 256

Pass = Literal["summarize", "merge", "attend", "back", "context back"]


class Tiles(NamedTuple):
    """Positions, key channels and value channels of a tile, warps, and stages of the pipeline that loads positions."""

    key_dim: int
    value_dim: int
    n: int
    k: int
    v: int
    warps: int
    stages: int

    @property
    def num_k(self) -> int:
        return -(-self.key_dim // self.k)

    @property
    def num_v(self) -> int:
        return -(-self.value_dim // self.v)

    def splits(self, device: torch.device, programs: int, length: int, kind: Literal["maps", "sums"]) -> int:
        """Parts of every row's positions, so that all programs together fill the chip."""
        wanted = _PROGRAMS[kind] * _multiprocessors(device) * 8 // self.warps
        return max(1, min(-(-wanted // max(programs, 1)), -(-length // self.n), MOST_SPLITS))


@cache
def tiles_of(what: Pass, key_dim: int, value_dim: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a pass.

    `"back"` is over queries and output gradients, and, with the gradients of keys and values, over those: every
    program sees all channels, of the keys at once. `"context back"` is over queries once more, for the gradient of the
    context, where one pass cannot hold both (see `in_one_pass`).
    """
    k, v = _power_of_2(key_dim), _power_of_2(value_dim)
    if what == "merge":  # n splits of one key channel
        return Tiles(key_dim, value_dim, 16, 1, v, 4, 1)
    n, most_k, most_v, stages = (_tiles_of_float32 if dtype == torch.float32 else _tiles_of_16_bits)(what, k, v)
    k, v = min(k, most_k), min(v, most_v)
    warps = 4 if dtype != torch.float32 and max(k, v) <= 64 else 8
    return Tiles(key_dim, value_dim, n, k, v, warps, stages)


def in_one_pass(tiles: Tiles, dtype: torch.dtype) -> bool:
    """Whether the gradients of queries and of their context fit into one pass."""
    return tiles.num_v == 1 and max(tiles.k, tiles.v) <= (64 if dtype == torch.float32 else 128)


def _tiles_of_16_bits(what: Pass, k: int, v: int) -> tuple[int, int, int, int]:
    if what == "summarize":
        return 64, 128, 128, 3
    if what == "attend":
        return 64, 512, 128 if k <= 256 else 64, 3 if k <= 128 else 2 if k == 256 else 1
    if what == "context back":
        return 64 if k <= 256 else 32, 512, 128 if k <= 256 else 64, 1
    if max(k, v) <= 256:
        return 64, 256, 256, 3 if max(k, v) <= 128 else 1
    return 64 if k <= 256 else 32, 512, 64, 1


def _tiles_of_float32(what: Pass, k: int, v: int) -> tuple[int, int, int, int]:
    if what == "summarize":
        return 32 if max(k, v) > 64 else 64, 128, 128, 2
    if k <= 64:
        return 64, 64, 64, 2
    return (64, 256, 32, 1) if k <= 256 else (32, 512, 16, 1)


def _power_of_2(channels: int) -> int:
    return max(16, 1 << (channels - 1).bit_length())


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS_INTERPRETED
    return torch.cuda.get_device_properties(device).multi_processor_count  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
