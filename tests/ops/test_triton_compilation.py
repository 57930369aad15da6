"""The kernels compile for a GPU of Hopper's kind, and fit into its shared memory, on a machine without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SHARED_MEMORY = 227 * 1024  # of a multiprocessor that one program may have

_KERNELS = ("_summarize_kernel", "_attend_kernel", "_summarize_backward_kernel", "_attend_backward_kernel")
# Dtypes and widths whose blocks differ.
CASES = [
    *((kernel, *case) for kernel in _KERNELS for case in (("bf16", 256, "softmax"), ("fp16", 64, "elu"))),
    *((kernel, "fp32", 60, "softmax") for kernel in _KERNELS),
    ("_merge_kernel", "bf16", 64, "softmax"),
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

    from lineara.ops import triton_kernels as kernels

    numbers = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for case in CASES:
        name, dtype, channels, features = case
        kernel = getattr(kernels, name)
        tensor = torch.empty(1, 1, 1, channels, dtype=numbers[dtype])
        largest = 0
        for blocks, passes in _blocks_of(kernels, name, tensor):
            constants = {
                "K": channels,
                "V": channels,
                "BLOCK_K": blocks.k,
                "BLOCK_V": blocks.v,
                "TILES_K": blocks.tiles_k,
                "TILES_V": blocks.tiles_v,
                "FEATURES": features,
                "HAS_MASK": True,
                "HAS_GATE": True,
                "PACKED": True,
                "WINDOWED": False,
                **blocks.over_positions,
                **passes,
            }
            signature, given = {}, {}
            for i, argument in enumerate(kernel.arg_names):
                if argument in constants or argument.endswith("_channel"):
                    signature[argument], given[(i,)] = "constexpr", constants.get(argument, 1)
                else:
                    signature[argument] = _type_of(argument, dtype)
            source = ASTSource(fn=kernel, signature=signature, constexprs=given)
            options = {"num_warps": blocks.warps}
            binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            largest = max(largest, binary.metadata.shared)
        print(case, largest)


def _blocks_of(kernels, name, tensor):
    blocks = kernels._Blocks
    if name != "_attend_backward_kernel":
        make = {
            "_summarize_kernel": blocks.to_summarize,
            "_merge_kernel": blocks.to_merge,
            "_attend_kernel": blocks.to_map,
            "_summarize_backward_kernel": blocks.to_map_back,
        }[name]
        return [(make(tensor, tensor), {})]
    if (both := blocks.to_do_both_back(tensor, tensor)) is not None:
        return [(both, {"OF_QUERY": True, "OF_CONTEXT": True})]
    return [
        (blocks.to_map_back(tensor, tensor), {"OF_QUERY": True, "OF_CONTEXT": False}),
        (blocks.to_sum_back(tensor, tensor), {"OF_QUERY": False, "OF_CONTEXT": True}),
    ]


def _type_of(argument: str, dtype: str) -> str:
    """Of what a launcher passes."""
    sums = ("maximum", "total", "weighted_sum", "context", "maxima", "totals", "weighted_sums")
    if argument.removeprefix("grad_") in sums:
        return "*fp32"
    if argument.removeprefix("grad_") in ("query", "key", "value", "gate", "output"):
        return f"*{dtype}"
    return {"mask": "*u8", "cu_seqlens": "*i32", "scale": "fp32"}.get(argument, "i32")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    main()
