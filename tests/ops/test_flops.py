"""What torch counts of the operators."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lineara.ops import (
    attend_context,
    efficient_attention,
    kernel_attention,
    multiresolution_attention,
    summarize_context,
)

QUERY, KEY, VALUE = (torch.randn(2, 3, *shape, requires_grad=True) for shape in ((7, 5), (13, 5), (13, 11)))
PRODUCTS = 2 * 2 * 3 * 5 * 11  # at one position of every item and head


def counted(call):
    with FlopCounterMode(display=False) as counter:
        output = call()
        forward = counter.get_total_flops()
        output.sum().backward()
    return forward, counter.get_total_flops() - forward


@pytest.mark.parametrize("impl", ["streaming", "triton"])
def test_two_operations_are_counted_for_every_product_of_the_formula(impl):
    forward = PRODUCTS * (7 + 13)
    for call in (efficient_attention, kernel_attention):
        assert counted(lambda call=call: call(QUERY, KEY, VALUE, impl=impl)) == (forward, 2 * forward)
    context = summarize_context(KEY, VALUE, impl=impl)
    assert counted(lambda: summarize_context(KEY, VALUE, impl=impl).weighted_sum)[0] == PRODUCTS * 13
    assert counted(lambda: attend_context(QUERY, context, impl=impl))[0] == PRODUCTS * 7
    windows = PRODUCTS * (3 * 7 + 13 + 4 + 4) // 3
    options = {"resolutions": [1, 4, 4], "impl": impl}
    assert counted(lambda: multiresolution_attention(QUERY, KEY, VALUE, **options)) == (windows, 2 * windows)


def test_efficient_attention_counts_what_its_plain_composition_counts():
    def plain():
        return QUERY.softmax(dim=3) @ (KEY.softmax(dim=2).mT @ VALUE)

    assert counted(plain) == counted(lambda: efficient_attention(QUERY, KEY, VALUE))


def test_nothing_is_imported_for_it_and_a_later_import_counts():
    program = (
        "import sys, torch; from lineara.ops import attend_context, summarize_context\n"
        "assert not {'triton', 'torch.utils.flop_counter'} & set(sys.modules)\n"
        "import importlib.util; importlib.util.find_spec('torch.utils.flop_counter')\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "key = torch.randn(1, 1, 13, 5)\n"
        "with FlopCounterMode(display=False) as counter: summarize_context(key, key)\n"
        "print(counter.get_total_flops())"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(answer.stdout) == 2 * 13 * 5 * 5
