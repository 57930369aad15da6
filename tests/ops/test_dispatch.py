"""Which implementation runs, and why."""

import pytest
import torch

from lineara.ops import efficient_attention, explain_implementation
from lineara.ops.dispatch import choose_implementation
from lineara.ops.efficient import operators

QUERY, KEY, VALUE = torch.randn(2, 3, 7, 5), torch.randn(2, 3, 13, 5), torch.randn(2, 3, 13, 11)


def test_the_explanation_names_what_auto_picks():
    assert explain_implementation(QUERY, KEY, VALUE).startswith("streaming: the tensors are on the CPU")
    assert choose_implementation("efficient_attention", "auto", QUERY, VALUE) == "streaming"
    on_meta = [tensor.to("meta") for tensor in (QUERY, KEY, VALUE)]
    assert explain_implementation(*on_meta).startswith("reference: the tensors are on meta")
    assert choose_implementation("efficient_attention", "auto", on_meta[0], on_meta[2]) == "reference"
    assert explain_implementation(QUERY, KEY, VALUE, operation="softmax_attention").startswith("reference: ")


@pytest.mark.parametrize(("impl", "streams"), [("auto", True), ("streaming", True), ("reference", False)])
def test_what_is_chosen_runs(impl, streams, monkeypatch):
    monkeypatch.setattr("lineara.ops.blocks._ONE_BLOCK_ELEMENTS", 0)
    ran = []
    operator = operators.efficient_attention
    monkeypatch.setattr(operators, "efficient_attention", lambda *inputs: ran.append(1) or operator(*inputs))
    efficient_attention(QUERY, KEY, VALUE, impl=impl)
    assert bool(ran) == streams


def test_wrong_questions_are_named():
    with pytest.raises(ValueError, match=r"operation must be one of 'efficient_attention', .*got 'attention'"):
        explain_implementation(QUERY, KEY, VALUE, operation="attention")
    with pytest.raises(ValueError, match="query and value must be on the same device, got cpu and meta"):
        explain_implementation(QUERY, KEY, VALUE.to("meta"))
