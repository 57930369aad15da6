"""What the compiler makes of the GPU kernels: instructions, occupancy and traffic, without a GPU.

    python benchmarks/kernel_counts.py --capability 9.0 > benchmarks/results/kernel-counts-sm90-<yyyy-mm>.md

Every pass is compiled as a call on that GPU would compile it, and the machine code of its loop over positions is
counted. "Issue slots" is the share of all instructions a multiprocessor can issue that the loop takes while memory
runs at the bandwidth of a copy: above 100 % the kernel is bound by instructions, not by memory. "Resident" is how many
programs one multiprocessor holds, by registers, shared memory and warps. "Balance" is the work of the average
multiprocessor by that of the busiest one, at shapes (rows, positions, channels). These are counts, not times.
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lineara.measure.machine import environment
from lineara.ops.linear import tiles, triton_kernels

REPOSITORY = Path(__file__).parents[1]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("summarize", "attend", "attend backward", "summarize backward")
SHAPES = ((32, 32768, 64), (32, 16384, 128), (1024, 1024, 64), (1, 65536, 256))


@dataclass(frozen=True)
class Device:
    """A GPU: its multiprocessors, their shared memory and that of one program in bytes, and what else bounds them.

    The bandwidth is in bytes per multiprocessor and cycle: of an H200, 4.3 TB/s over 132 at 1.98 GHz.
    """

    multiprocessors: int
    shared: int
    most_shared: int
    major: int
    most_warps: int
    bytes_per_cycle: float


# Numbers of NVIDIA's CUDA programming guide, and data sheets of an A100, A10, L4, H200, B200 and RTX 5090.
DEVICES = {
    "8.0": Device(108, 167936, 166912, 8, 64, 10.2),
    "8.6": Device(72, 102400, 101376, 8, 48, 4.9),
    "8.9": Device(58, 102400, 101376, 8, 48, 2.5),
    "9.0": Device(132, 233472, 232448, 9, 64, 16.45),
    "10.0": Device(148, 233472, 232448, 10, 64, 25.0),
    "12.0": Device(170, 102400, 101376, 12, 48, 4.3),
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel as a caller makes it."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Counts:
    """What the machine code of one launch says."""

    instructions: int  # of one warp in one iteration over positions
    warps: int
    registers: int
    spilled: int  # bytes of one thread
    shared: int  # bytes of one program

    def resident(self, device: Device) -> int:
        """Programs that one multiprocessor holds."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = 65536 // (per_warp * self.warps)
        by_shared = device.shared // (self.shared + 1024)
        return min(by_registers, by_shared, device.most_warps // self.warps)


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call on a GPU launches, in order; nothing runs."""
    found: list[Launch] = []

    def record(kernel: Any, programs: int, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.append(Launch(kernel, programs, arguments, options))

    run, triton_kernels._run = triton_kernels._run, record
    try:
        call()
    finally:
        triton_kernels._run = run
    return found


def calls(
    rows: int, positions: int, channels: int, dtype: torch.dtype, feature_map: str, *, everything: bool = False
) -> dict[str, Callable[[], Any]]:
    """The four passes on tensors without memory; with `everything` also a mask, a gate and packed sequences."""

    def empty(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    x = empty(1, rows, positions, channels, kind=dtype)
    mask = gate = starts = None
    if everything:
        mask, gate = empty(1, positions, kind=torch.bool), empty(1, rows, positions, kind=dtype)
        starts = empty(2, kind=torch.int64)
    total, weighted_sum = empty(1, rows, channels), empty(1, rows, channels, channels)
    sums, keys, options = (total, weighted_sum), (x, x, mask, starts), (feature_map, 1.0)
    return {
        "summarize": lambda: triton_kernels.summarize(*keys, *options),
        "attend": lambda: triton_kernels.attend(x, *sums, gate, starts, *options),
        "attend backward": lambda: triton_kernels.attend_backward(x, x, *sums, gate, starts, *options),
        "summarize backward": lambda: triton_kernels.summarize_backward(*sums, *keys, total, *options),
    }


def compiled(launch: Launch, capability: str) -> Any:
    """The kernel as Triton compiles it for these arguments."""
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = dict(zip(kernel.arg_names, launch.arguments)) | launch.options
    for i, name in enumerate(kernel.arg_names):
        value, is_special = values[name], not kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or (is_special and type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + _NAMES[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (is_special and type(value) is int and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
    options = {name: value for name, value in launch.options.items() if name not in kernel.arg_names}
    options["enable_fp_fusion"] = True  # as `_run` has it
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=target, options=options)


_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int64: "i64",
}


def counted(launch: Launch, capability: str) -> Counts:
    """Compile a launch and count."""
    kernel = compiled(launch, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    return Counts(
        instructions_of_loop(code, launch.options.get("TILES_V", 1)),
        launch.options.get("num_warps", 4),
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1]),
        kernel.metadata.shared,
    )


def _tool(name: str, *words: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *words], capture_output=True, text=True, check=True).stdout


def instructions_of_loop(code: str, inner_trips: int = 1) -> int:
    """Instructions of the longest loop, those of a loop inside it as often as it runs.

    Where a loop loads ahead (LDGSTS), the others are for what is left at the end of a sequence.
    """
    places: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    lines: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            places[label[1]] = len(lines)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            if jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line):
                jumps.append((len(lines), jump[1]))
            lines.append(line)
    loops = [(places[label], end) for end, label in jumps if label in places and places[label] < end - 8]
    ahead = [loop for loop in loops if any("LDGSTS" in line for line in lines[slice(*loop)])]
    if not loops:
        return 0
    start, end = max(ahead or loops, key=lambda loop: loop[1] - loop[0])
    inside = [b - a + 1 for a, b in loops if start < a and b < end]
    return end - start + 1 + sum(inside) * max(inner_trips - 2, 0)


def traffic(name: str, channels: int, dtype: torch.dtype) -> int:
    """Bytes that must move for a position."""
    units = {"summarize": 2, "attend": 2, "attend backward": 3, "summarize backward": 4}[name]
    return units * channels * dtype.itemsize


def balance(programs: int, blocks_of_row: int, splits: int, multiprocessors: int) -> float:
    """The blocks of the average multiprocessor by those of the busiest one."""
    busiest = -(-programs // multiprocessors) * -(-blocks_of_row // splits)
    return programs // splits * blocks_of_row / (busiest * multiprocessors)


def pretend(device: Device) -> None:
    """Let the launchers cut their work for this device."""
    tiles.describe = lambda _: device
    tiles.tiles_of.cache_clear()


def rows_of_table(capability: str, dtype_name: str, widths: list[int], feature_map: str) -> Iterator[str]:
    device, dtype = DEVICES[capability], DTYPES[dtype_name]
    for width in widths:
        for name in PASSES:
            found = launches(calls(32, 32768, width, dtype, feature_map)[name])
            main = [launch for launch in found if "BLOCK_N" in launch.options]
            for launch in main:
                counts = counted(launch, capability)
                block = launch.options["BLOCK_N"]
                of_query, of_context = (launch.options.get(part, True) for part in ("OF_QUERY", "OF_CONTEXT"))
                # All programs that share a block of positions.
                shared_by = launch.options.get("TILES_K", 1) * launch.options["TILES_V"]
                if name == "summarize backward" or (name == "attend backward" and of_query):
                    shared_by = 1
                moved = block * traffic(name, width, dtype) * (1 if of_query else 2 / 3)
                issued = counts.instructions * counts.warps * shared_by
                share = issued / (4 * moved / device.bytes_per_cycle)
                which = f"{name}{_part(of_query, of_context)}"
                yield (
                    f"| {width} | {dtype_name} | {which} | {block} | {counts.instructions} | {issued / moved:.2f} | "
                    f"{share:.0%} | {counts.registers} | {counts.spilled} | {counts.shared:,} | "
                    f"{counts.resident(device)} |"
                )


def _part(of_query: bool, of_context: bool) -> str:
    return "" if of_query and of_context else ", queries" if of_query else ", contexts"


def rows_of_balance(capability: str, dtype_name: str, feature_map: str) -> Iterator[str]:
    device, dtype = DEVICES[capability], DTYPES[dtype_name]
    for rows, positions, channels in SHAPES:
        cells: list[str] = []
        for name in PASSES:
            found = launches(calls(rows, positions, channels, dtype, feature_map)[name])
            launch = next(launch for launch in found if "BLOCK_N" in launch.options)
            values = dict(zip(launch.kernel.arg_names, launch.arguments))
            blocks, splits = -(-positions // launch.options["BLOCK_N"]), values["num_splits"]
            share = balance(launch.programs, blocks, splits, device.multiprocessors)
            cells.append(f"{share:.0%} ({launch.programs:,} programs, {len(found)} launch{'es' * (len(found) > 1)})")
        yield f"| ({rows}, {positions}, {channels}) | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", choices=DEVICES, default="9.0")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--widths", nargs="+", type=int, default=[32, 64, 128, 256])
    parser.add_argument("--feature_map", choices=("softmax", "identity", "relu", "elu"), default="softmax")
    options = parser.parse_args()
    device = DEVICES[options.capability]
    pretend(device)
    print(f"# The GPU kernels by the compiler's count, compute capability {options.capability}\n")
    print(f"{options.feature_map}; compiled by Triton {triton.__version__}, not run. {environment(REPOSITORY)}\n")
    print("| channels | dtype | pass | positions of a block | instructions of a warp per block | per byte | ", end="")
    print("issue slots | registers | spilled bytes | shared memory | resident |")
    print("|---" * 11 + "|")
    for dtype in options.dtypes:
        for line in rows_of_table(options.capability, dtype, options.widths, options.feature_map):
            print(line, flush=True)
    print("\n## Balance\n")
    print(f"| (rows, positions, channels), {options.dtypes[0]} | {' | '.join(PASSES)} |")
    print("|---" * 5 + "|")
    for line in rows_of_balance(options.capability, options.dtypes[0], options.feature_map):
        print(line, flush=True)


if __name__ == "__main__":
    main()
