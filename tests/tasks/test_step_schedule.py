"""The factor of the learning rate at each step, by hand."""

import pytest

from lineara.tasks.step_schedule import StepSchedule


def test_the_factor_rises_linearly_and_falls_at_each_milestone():
    factor = StepSchedule(3, [2, 3], 0.1, 4)
    rise = [0.001, 0.25075, 0.5005, 0.75025]
    expected = [*rise, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert [factor(step) for step in range(11)] == pytest.approx(expected)


def test_a_milestone_within_the_warm_up_counts_too():
    factor = StepSchedule(2, (1,), 0.5, 4)
    assert [factor(step) for step in range(5)] == pytest.approx([0.001, 0.25075, 0.25025, 0.375125, 0.5])


def test_without_a_warm_up_the_first_step_has_the_whole_rate():
    assert [StepSchedule(1, [1], 0.2, 0)(step) for step in range(3)] == [1.0, 0.2, 0.2]
