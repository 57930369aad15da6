"""The kernels compile for GPUs that are not here, fit into their shared memory, and spill no registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Compute capability, dtype, channels, feature map, and whether with mask, gate and packed sequences.
CASES = [
    ("9.0", "bf16", 64, "softmax", False),
    ("9.0", "bf16", 128, "softmax", False),
    ("9.0", "fp32", 60, "softmax", True),
    ("8.0", "fp16", 64, "elu", True),
    ("8.6", "bf16", 128, "relu", True),
    ("8.6", "bf16", 256, "softmax", False),
    ("8.6", "fp32", 256, "softmax", False),
    ("12.0", "bf16", 512, "identity", False),
]
COUNT = """
import json, sys
from dataclasses import asdict
import kernel_counts as counts
for capability, dtype, channels, feature_map, everything in json.loads(sys.argv[1]):
    counts.pretend(counts.DEVICES[capability])
    passes = counts.calls(32, 4096, channels, counts.DTYPES[dtype], feature_map, everything=everything)
    for name, call in passes.items():
        for launch in counts.launches(call):
            found = counts.counted(launch, capability)
            print(json.dumps({"kernel": launch.kernel.__name__, "pass": name, **asdict(found)}), end=" ")
    print()
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What was counted of every case, by a process that does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    words = [sys.executable, "-c", COUNT, json.dumps(CASES)]
    answer = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr[-2000:]
    found = [json.loads(f"[{line.strip().replace('} {', '}, {')}]") for line in answer.stdout.splitlines()]
    return dict(zip(CASES, found, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler that triton brings on Linux")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_fits(compiled, case):
    sys.path.insert(0, str(BENCHMARKS))
    import kernel_counts

    limit = kernel_counts.DEVICES[case[0]].most_shared
    assert {"_summarize_kernel", "_attend_kernel", "_attend_backward_kernel", "_summarize_backward_kernel"} <= {
        launch["kernel"] for launch in compiled[case]
    }
    for launch in compiled[case]:
        assert launch["shared"] <= limit, launch


@pytest.mark.skipif(sys.platform != "linux", reason="needs the compiler that triton brings on Linux")
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_nothing_spills_registers_in_bfloat16_up_to_128_channels(compiled, case):
    for launch in compiled[case]:
        # One pass holds three tiles of 128 x 128 numbers, and reads a few addresses again.
        allowed = 384 if (launch["pass"], case[2]) == ("attend backward", 128) else 0
        assert launch["spilled"] <= allowed, launch
