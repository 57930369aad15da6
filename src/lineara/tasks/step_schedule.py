"""A learning rate that rises over the first steps and falls at some epochs, as detectors and ResNets are trained."""

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

# The warm-up begins with this part of the learning rate, as Detectron's does.
_WARMUP_START = 1e-3


class StepSchedule:
    """What the learning rate is multiplied by in a step, counted from 0; an object, so that checkpoints keep it.

        (0.001 rising linearly to 1 over the warm-up) x gamma^(milestones passed)

    Args:
        steps_per_epoch: optimiser steps in an epoch.
        milestones: epochs, counted from 0 and in order, at whose beginning the rate falls.
        gamma: what each of them multiplies it by.
        warmup_steps: steps until the full rate; 0 for none.

    Raises:
        ValueError: for milestones that are not in order, or other numbers that make no sense.
    """

    def __init__(self, steps_per_epoch: int, milestones: Sequence[int], gamma: float, warmup_steps: int) -> None:
        if list(milestones) != sorted(set(milestones)) or min(milestones, default=1) < 1:
            raise ValueError(f"milestones must be epochs from 1, each later than the last, got {list(milestones)}")
        if not 0 < gamma < inf:
            raise ValueError(f"gamma must be a finite number above 0, got {gamma}")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.steps_per_epoch = steps_per_epoch
        self.milestones = list(milestones)
        self.gamma = gamma
        self.warmup_steps = warmup_steps

    def __call__(self, step: int) -> float:
        part = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        passed = bisect_right(self.milestones, step // self.steps_per_epoch)
        return (_WARMUP_START + (1 - _WARMUP_START) * part) * self.gamma**passed


def check_descent(*, base_lr: float, momentum: float, weight_decay: float) -> None:
    """Raise unless these are settings of stochastic gradient descent that can train: no NaN, nothing below 0."""
    if not 0 < base_lr < inf:
        raise ValueError(f"base_lr must be a finite number above 0, got {base_lr}")
    for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
        if not 0 <= value < inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
