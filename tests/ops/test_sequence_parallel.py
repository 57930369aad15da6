"""Positions sharded over real processes give what one process gives, and exchange what the formula says."""

import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lineara import ops
from lineara.ops import sequence_parallel
from lineara.ops.linear import shards

sys.path.insert(0, str(Path(__file__).parent))
import sharded_calls as calls
from sharded_calls import BATCH, CALLS, COUNTED, HEADS, KEY_DIM, LENGTHS, VALUE_DIM

sys.path.pop(0)

RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def given(started_ranks):
    """By the number of ranks, what each of them found."""
    return cache(partial(started_ranks, calls.__file__))


@cache
def expected(title: str) -> list[torch.Tensor]:
    call = CALLS[title]
    return calls.results(call)


def assert_equal(title: str, shards: list[list[torch.Tensor]]) -> None:
    call = CALLS[title]
    whole = calls.joined(call, shards)
    largest = max(float(tensor.abs().max()) for tensor in expected(title))
    # Both round once to the dtype of the inputs, whatever they do before.
    tolerance = 1e-12 if call.dtype == torch.float64 else 4 * torch.finfo(call.dtype).eps
    for index, (one, other) in enumerate(zip(whole, expected(title), strict=True)):
        assert one.shape == other.shape, index
        assert float((one - other).abs().max()) <= tolerance * largest, (index, largest)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("title", CALLS)
def test_shards_give_what_one_process_gives(num_ranks, title, given):
    assert_equal(title, [rank[title] for rank in given(num_ranks)])


@pytest.mark.parametrize("title", [title for title, call in CALLS.items() if call.grid])
def test_a_group_of_some_ranks_is_a_world_of_its_own(title, given):
    assert_equal(title, [given(4)[rank]["odd"][title] for rank in (1, 3)])


def test_a_mesh_is_a_group(given):
    title = given(2)[0]["mesh"][0]
    assert_equal(title, [rank["mesh"][1] for rank in given(2)])


SUMS = 4 * BATCH * HEADS * (KEY_DIM + KEY_DIM * VALUE_DIM)
CONTEXT = 4 * BATCH * HEADS * KEY_DIM * VALUE_DIM
MAXIMA = 4 * BATCH * HEADS * KEY_DIM


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("impl", ["streaming", "reference"])
@pytest.mark.parametrize("title", COUNTED)
def test_bytes_are_those_of_the_formula_whatever_the_number_of_positions(title, impl, length, given):
    forward = SUMS if title in ("kernel_attention", "efficient_attention scaling") or "elu" in title else MAXIMA + SUMS
    backward = SUMS if "kernel" in title or "elu" in title else CONTEXT
    lengths = 8 if "multiresolution" in title else 0
    for rank in given(2):
        forward_bytes, backward_bytes = rank["traffic"][title, impl, length]
        assert forward_bytes == {"all_reduce": forward, "all_gather_into_tensor": lengths, "batch_isend_irecv": 0}
        # The operator keeps nothing but its inputs, so it asks for the lengths again.
        again = lengths if impl == "streaming" else 0
        assert backward_bytes == {"all_reduce": backward, "all_gather_into_tensor": again, "batch_isend_irecv": 0}


@pytest.mark.parametrize("impl", ["streaming", "reference"])
def test_fewer_positions_travel_than_a_window_has(impl, given):
    # The second shard begins with one position of a window that began on the first.
    row = 4 * BATCH * HEADS * (KEY_DIM + VALUE_DIM)
    first, second = (rank["halo"][impl] for rank in given(2))
    forward, backward = second
    assert forward["batch_isend_irecv"] == 14 * row
    assert first[0]["batch_isend_irecv"] == 0
    assert first[1]["batch_isend_irecv"] == 14 * row
    assert backward["batch_isend_irecv"] == (14 * row if impl == "streaming" else 0)


@pytest.mark.parametrize("title", [*calls.COMPILED, "reference", "mesh"])
def test_compiled_calls_give_what_eager_ones_give(title, given):
    for rank in given(2):
        assert rank["compiled"][title] <= 1e-12


def test_of_packed_sequences_every_rank_has_its_parts(given):
    shards = [rank["packed"] for rank in given(2)]
    for *parts, whole in zip(*shards, calls.packed(), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole, rtol=1e-12, atol=1e-12)


def test_wrong_groups_get_one_sentence(given):
    zero, one = (rank["reasons"] for rank in given(2))
    for found in (zero, one):
        assert found["square"] == (
            "ValueError: group must be a mesh of one dimension, got 2 of them; pass mesh[name of the dimension]"
        )
        assert found["name"] == "TypeError: group must be a ProcessGroup, a DeviceMesh or None, got str"
    missing = "call this on the group's ranks only"
    assert one["member"] == f"ValueError: group must contain this rank, got a group without it; {missing}"
    missing = "call this on the mesh's ranks only"
    assert one["mesh member"] == f"ValueError: group must contain this rank, got a mesh without it; {missing}"
    assert zero["member"] == zero["mesh member"] == "none"
    assert zero["dimension"] == one["dimension"] == "none"


@pytest.mark.parametrize("operation", ["efficient_attention", "kernel_attention", "multiresolution_attention"])
def test_a_group_needs_torch_distributed(operation):
    tensor = torch.zeros(1, 1, 2, 3)
    options = {"resolutions": (1,)} if operation.startswith("multi") else {}
    with pytest.raises(
        ValueError, match=r"group must be None until torch\.distributed is initialized, got object; call"
    ):
        getattr(ops, operation)(tensor, tensor, tensor, **options, group=object())
    with pytest.raises(ValueError, match=r"group must be None until torch\.distributed is initialized"):
        ops.merge_contexts(ops.summarize_context(tensor, tensor), group=object())


def test_operations_work_where_torch_has_no_distributed_part(tmp_path):
    program = (
        "import torch, torch._dynamo\n"  # which looks for what is taken away here
        "torch.distributed.is_available = lambda: False\n"
        "for name in ('ProcessGroup', 'P2POp', 'ReduceOp', 'all_reduce', 'is_initialized', 'GroupMember'):\n"
        "    delattr(torch.distributed, name)\n"
        "from lineara import ops\n"
        "tensor = torch.ones(1, 1, 2, 3)\n"
        "print(ops.efficient_attention(tensor, tensor, tensor).sum())\n"
        "try:\n    ops.efficient_attention(tensor, tensor, tensor, group=object())\n"
        "except ValueError as error:\n    print(error)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert process.stdout.startswith("tensor(6.)\ngroup must be None until"), process.stderr


# torch's own forward mode calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_transforms_are_refused_with_a_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        key = torch.randn(1, 1, 5, 3)
        for name, options in (
            ("efficient_attention", {}),
            ("kernel_attention", {}),
            ("multiresolution_attention", {"resolutions": [2]}),
        ):
            call = partial(getattr(ops, name), key, group=dist.group.WORLD, **options)
            with pytest.raises(ValueError, match=r"^group must be None under a torch.func transform, got ProcessGroup"):
                torch.func.jvp(lambda key, call=call: call(key, key), (key,), (key,))
        summary = ops.summarize_context(key, key)
        with torch.autograd.forward_ad.dual_level():
            total = torch.autograd.forward_ad.make_dual(summary.total, summary.total)
            with pytest.raises(
                ValueError, match=r"^group must be None under forward-mode differentiation, got Process"
            ):
                ops.merge_contexts(summary._replace(total=total), group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


# torch's own checker looks at .grad where there is none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_keep_the_contract_of_torch_library():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        name = dist.group.WORLD.group_name
        total = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
        sums = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
        torch.library.opcheck(sequence_parallel.sum_over_group, (total, name))
        torch.library.opcheck(sequence_parallel.maximum_over_group, (total.detach(), name))
        torch.library.opcheck(sequence_parallel._context_over_group, (total, sums, name))
        _, key, value = (torch.randn(2, 3, n, d, dtype=torch.float64, requires_grad=True) for n, d in SIZES)
        options = ("softmax", 0.7, [3, 2, 1], [11], "mean", "streaming", name)
        torch.library.opcheck(shards.SUMMARIZE_SHARD, (key, value, None, None, None, None, *options))
        assert torch.autograd.gradgradcheck(
            lambda *sums: sequence_parallel._context_over_group(*sums, name)[0], (total + 1.0, sums)
        )
    finally:
        dist.destroy_process_group()


SIZES = ((7, 5), (11, 5), (11, 13))


@pytest.mark.parametrize(
    ("lengths", "multiple", "moves"),
    [
        ([6, 6], 3, []),
        ([5, 7], 3, [(1, 0, 1)]),
        ([4, 1, 1, 7], 6, [(1, 0, 1), (2, 0, 1)]),  # a window over three ranks
        ([2, 1, 1, 9], 6, [(1, 0, 1), (2, 0, 1), (3, 0, 2)]),
        ([0, 4, 0, 5], 6, [(3, 1, 2)]),  # what lies between is empty
        ([4, 3, 2], 100, [(1, 0, 3), (2, 0, 2)]),
        ([7, 1, 9], 4, [(1, 0, 1)]),
        ([0, 0], 4, []),
    ],
)
def test_windows_are_completed_where_they_begin(lengths, multiple, moves):
    assert shards._moves(lengths, multiple) == moves


def test_two_processes_hold_half_of_what_one_holds():
    script = Path(__file__).parents[2] / "benchmarks" / "sequence_parallel_cpu.py"
    words = [sys.executable, str(script), "--positions", "16384", "--rounds", "1"]
    process = subprocess.run(words, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    one, two = ([cell.strip() for cell in row.split("|")[1:-1]] for row in process.stdout.splitlines()[-2:])
    assert (one[:2], two[:2]) == (["16384", "1"], ["16384", "2"])
    # Eight tensors, and little else.
    assert 8 * 4 * 16384 * 512 <= 1e6 * float(one[2]) < 9 * 4 * 16384 * 512
    assert float(two[3]) < 0.6
    assert (one[-2:], two[-2:]) == (["0", "0"], [str(4 * 8 * (2 * 64 + 64 * 64)), str(4 * 8 * 64 * 64)])
