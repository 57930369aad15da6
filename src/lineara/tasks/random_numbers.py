"""Random numbers of an item that depend on nothing but its seed, for every task that augments."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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


def held_out(number: int, share: float, *, train: bool) -> list[int]:
    """Which of so many items train, or validate: at least one of each, always the same ones, in order."""
    order = np.random.default_rng(0).permutation(number)
    cut = min(max(1, round(share * number)), number - 1)
    return sorted((order[cut:] if train else order[:cut]).tolist())
