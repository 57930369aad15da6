"""How the learning rate of a detector's training goes over its steps."""

from collections.abc import Callable, Sequence

# The warm-up begins with this part of the learning rate, as Detectron's does.
_WARMUP_START = 1e-3


def learning_rate_factor(warmup_steps: int, milestones: Sequence[int], gamma: float) -> Callable[[int], float]:
    """What the learning rate is multiplied by in a step, counted from 0.

    Args:
        warmup_steps: steps over which the factor rises linearly from a thousandth to 1; 0 for none.
        milestones: the first steps with a lower learning rate.
        gamma: what each milestone multiplies it by.
    """

    def factor(step: int) -> float:
        part = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return (_WARMUP_START + (1 - _WARMUP_START) * part) * gamma ** sum(step >= first for first in milestones)

    return factor
