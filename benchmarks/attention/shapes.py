"""The sizes that the attention suite measures, in the order of their weight, and what they cost at least."""

from dataclasses import dataclass

PASSES = ("forward", "backward", "forward + backward")
PRESETS = ("quick", "full", "targets")
# The lengths at 32 heads of 64 channels in all, which the targets name, shorter ones first.
_TARGET_LENGTHS = (512, 1024, 4096, 16384, 32768)


@dataclass(frozen=True)
class Shape:
    """Queries and keys (batch, heads, positions, key_dim), values (batch, heads, positions, value_dim).

    Raises:
        ValueError: for sizes below 1.
    """

    batch: int
    heads: int
    positions: int
    key_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("batch", "heads", "positions", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __str__(self) -> str:
        width = self.key_dim if self.key_dim == self.value_dim else f"{self.key_dim}/{self.value_dim}"
        return f"{self.batch} x {self.heads} x {self.positions:,} x {width}"

    @property
    def all_heads(self) -> int:
        """Heads of all items, B H."""
        return self.batch * self.heads

    @property
    def elements(self) -> int:
        """Numbers in the output."""
        return self.all_heads * self.positions * self.value_dim

    def least_traffic(self, name: str, itemsize: int) -> int:
        """Bytes that a pass must at least read and write: 4 tensors forward, 7 backward, 11 together if K = V.

        Forward reads query, key, value and writes the output; backward reads those three and the gradient of the
        output, and writes three gradients.
        """
        forward = 2 * self.key_dim + 2 * self.value_dim
        backward = 4 * self.key_dim + 3 * self.value_dim
        channels = {"forward": forward, "backward": backward, "forward + backward": forward + backward}[name]
        return self.all_heads * self.positions * channels * itemsize

    def inputs_bytes(self, name: str, itemsize: int) -> int:
        """Bytes of query, key and value, and of the gradient of the output where the pass takes one."""
        channels = 2 * self.key_dim + self.value_dim * (1 if name == "forward" else 2)
        return self.all_heads * self.positions * channels * itemsize

    def least_memory(self, name: str, itemsize: int) -> int:
        """Bytes of inputs, output, gradients and contexts (float32 matrix, maximum and sum; with gradients twice)."""
        returned = self.value_dim + (0 if name == "forward" else 2 * self.key_dim + self.value_dim)
        contexts = self.key_dim * (self.value_dim + 2) * 4 * (1 if name == "forward" else 2)
        outputs = self.all_heads * self.positions * returned * itemsize
        return self.inputs_bytes(name, itemsize) + outputs + self.all_heads * contexts


@dataclass(frozen=True)
class PaperCount:
    """One attention module as arXiv 1812.01243 counts it: d channels, d value and d/2 key channels, one head.

    Source: Shen et al., WACV 2021, arXiv 1812.01243: 4dn + d^2/2 numbers (efficient), 4dn + n^2 (non-local).
    """

    place: str
    channels: int
    positions: int

    @property
    def efficient_bytes(self) -> int:
        return 4 * (4 * self.channels * self.positions + self.channels**2 // 2)

    @property
    def map_bytes(self) -> int:
        """The n x n attention matrix alone."""
        return 4 * self.positions**2

    @property
    def non_local_bytes(self) -> int:
        return 4 * 4 * self.channels * self.positions + self.map_bytes

    @property
    def shape(self) -> Shape:
        return Shape(1, 1, self.positions, self.channels // 2, self.channels)


PAPER_COUNTS = (
    PaperCount("64 channels on a 128 x 128 map", 64, 128 * 128),
    PaperCount("32 channels on a 48 x 135 x 240 volume", 32, 48 * 135 * 240),
)


def shape_of(all_heads: int, positions: int, head_dim: int) -> Shape:
    """So many heads in all, 8 to an item where there are as many."""
    heads = 8 if all_heads % 8 == 0 else all_heads
    return Shape(all_heads // heads, heads, positions, head_dim, head_dim)


def preset_shapes(preset: str, device: str) -> list[Shape]:
    """The shapes of a preset, those that matter most first.

    Raises:
        ValueError: for an unknown preset, or one that the device does not have.
    """
    presets = _on_cpu() if device == "cpu" else _on_cuda()
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)} on {device}, got {preset!r}")
    return presets[preset]


def _on_cpu() -> dict[str, list[Shape]]:
    quick = [shape_of(8, positions, 64) for positions in (256, 1024, 4096)]
    lengths = (256, 512, 1024, 2048, 4096, 16384, 65536)
    return {
        "quick": quick,
        "full": [*(shape_of(8, positions, 64) for positions in lengths), PAPER_COUNTS[0].shape],
    }


def _on_cuda() -> dict[str, list[Shape]]:
    wide_head = shape_of(1, 65536, 256)
    targets = [*(shape_of(32, positions, 64) for positions in _TARGET_LENGTHS), wide_head]
    # 64 Mi elements each, in other proportions.
    many = ((256, 4096, 64), (32, 16384, 128), (8, 65536, 128), (32, 8192, 256), (32, 65536, 32), (1, 262144, 256))
    targets += [shape_of(*sizes) for sizes in many]
    targets += [count.shape for count in PAPER_COUNTS]
    targets += [shape_of(32, positions, 64) for positions in (256, 2048, 8192, 65536)]
    # fmt: off
    others = (
        (1, 1024, 64), (1, 16384, 64), (1, 1024, 256), (1, 16384, 256), (8, 1024, 64), (8, 16384, 64),
        (256, 256, 64), (256, 1024, 64), (32, 1024, 32), (32, 16384, 32), (32, 1024, 128), (32, 1024, 256),
        (32, 16384, 256), (256, 16384, 64), (8, 262144, 64), (1, 1048576, 64), (1, 1048576, 128),
    )
    # fmt: on
    quick = [shape_of(32, positions, 64) for positions in (512, 4096, 16384, 32768)]
    return {
        "quick": [*quick, wide_head],
        "full": [*targets, *(shape_of(*sizes) for sizes in others)],
        "targets": targets,
    }
