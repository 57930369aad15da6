"""The kernels compile for a GPU of Hopper's kind, and fit into its shared memory, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lineara.ops.linear.tiles import MOST_SPLITS, in_one_pass, tiles_of

_SHARED_MEMORY = 227 * 1024  # of a multiprocessor that one program may have

_KERNELS = ("_summarize_kernel", "_attend_kernel", "_summarize_backward_kernel", "_attend_backward_kernel")
# Dtypes and widths whose blocks differ.
CASES = [
    *((kernel, *case) for kernel in _KERNELS for case in (("bf16", 256, "softmax"), ("fp16", 64, "elu"))),
    *((kernel, "fp32", 60, "softmax") for kernel in _KERNELS),
    ("_merge_kernel", "bf16", 64, "softmax"),
    ("_merge_back_kernel", "bf16", 512, "softmax"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Shared memory of every case, from a process that does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    answer = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    return dict(line.rsplit(" ", 1) for line in answer.stdout.splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler that triton brings on Linux")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fits_into_shared_memory(compiled, case):
    assert 0 < int(compiled[str(case)]) <= _SHARED_MEMORY


def main() -> None:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lineara.ops.linear import triton_kernels as kernels

    numbers = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for case in CASES:
        name, dtype, channels, features = case
        kernel = getattr(kernels, name)
        largest = 0
        for tiles, others in _tiles_of(name, channels, numbers[dtype]):
            constants = {
                "K": channels,
                "V": channels,
                "BLOCK_N": tiles.n,
                "BLOCK_K": tiles.k,
                "BLOCK_V": tiles.v,
                "TILES_K": tiles.num_k,
                "TILES_V": tiles.num_v,
                "STAGES": tiles.stages,
                "BLOCK_P": tiles.n,
                "MOST_SPLITS": MOST_SPLITS,
                "PRECISION": "tf32x3",
                "DIVIDE": True,
                "FEATURES": features,
                "HAS_MASK": True,
                "HAS_GATE": True,
                "PACKED": True,
                "WINDOWED": False,
                **others,
            }
            signature, given = {}, {}
            for i, argument in enumerate(kernel.arg_names):
                if argument in constants or argument.endswith("_channel"):
                    signature[argument], given[(i,)] = "constexpr", constants.get(argument, 1)
                else:
                    signature[argument] = _type_of(argument, dtype)
            source = ASTSource(fn=kernel, signature=signature, constexprs=given)
            options = {"num_warps": tiles.warps}
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            largest = max(largest, binary.metadata.shared)
        print(case, largest)


def _tiles_of(name, channels, dtype):
    """The tiles of every launch of a kernel, and what else is compiled in."""
    if name == "_attend_backward_kernel":
        tiles = tiles_of("back", channels, channels, dtype)
        if in_one_pass(tiles, dtype):
            return [(tiles, {"OF_QUERY": True, "OF_CONTEXT": True})]
        wide = tiles_of("context back", channels, channels, dtype)
        return [(tiles, {"OF_QUERY": True, "OF_CONTEXT": False}), (wide, {"OF_QUERY": False, "OF_CONTEXT": True})]
    what = {
        "_summarize_kernel": "summarize",
        "_attend_kernel": "attend",
        "_summarize_backward_kernel": "back",
        "_merge_kernel": "merge",
        "_merge_back_kernel": "merge",
    }
    return [(tiles_of(what[name], channels, channels, dtype), {})]


def _type_of(argument: str, dtype: str) -> str:
    """Of what a launcher passes."""
    sums = ("maximum", "total", "weighted_sum", "context", "maxima", "totals", "weighted_sums", "contexts")
    if argument.removeprefix("grad_") in sums:
        return "*fp32"
    if argument.removeprefix("grad_") in ("query", "key", "value", "gate", "output"):
        return f"*{dtype}"
    return {"mask": "*u8", "cu_seqlens": "*i32", "scale": "fp32"}.get(argument, "i32")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    main()
