"""Random numbers of an item that depend on nothing but its seed, for every task that augments."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def random_numbers_from(seed: int) -> Iterator[None]:
    """What transforms draw inside depends on the seed alone; what is drawn after it is as if nothing had been drawn."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators too
    try:
        yield
    finally:
        torch.set_rng_state(before)
