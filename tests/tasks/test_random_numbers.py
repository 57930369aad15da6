"""Random numbers by a seed, and those around them left alone."""

import pytest
import torch

from lineara.tasks.random_numbers import random_numbers_from


def drawn_from(seed):
    with random_numbers_from(seed):
        return torch.rand(5)


def test_they_depend_on_the_seed_alone():
    first = drawn_from(7)
    torch.rand(3)
    assert torch.equal(drawn_from(7), first)
    assert not torch.equal(drawn_from(8), first)


def test_others_go_on_as_if_nothing_had_been_drawn_even_after_an_error():
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    drawn_from(7)
    with pytest.raises(ValueError, match="broken"), random_numbers_from(7):
        raise ValueError("broken")
    assert torch.equal(torch.rand(4), expected)
