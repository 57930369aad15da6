"""The factor of the learning rate at each step, by hand."""

import math

import pytest

from lineara.tasks.step_schedule import StepSchedule, check_descent


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


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"milestones": [3, 2]}, r"milestones must be epochs from 1, each later than the last, got \[3, 2\]"),
        ({"milestones": (2, 2)}, r"milestones must be epochs from 1, each later than the last, got \[2, 2\]"),
        ({"milestones": [0]}, r"milestones must be epochs from 1, each later than the last, got \[0\]"),
        ({"gamma": 0.0}, "gamma must be a finite number above 0, got 0.0"),
        ({"gamma": math.nan}, "gamma must be a finite number above 0, got nan"),
        ({"gamma": math.inf}, "gamma must be a finite number above 0, got inf"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
    ],
)
def test_what_makes_no_schedule_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        StepSchedule(**{"steps_per_epoch": 3, "milestones": (), "gamma": 0.1, "warmup_steps": 0} | wrong)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"base_lr": 0.0}, "base_lr must be a finite number above 0, got 0.0"),
        ({"base_lr": math.nan}, "base_lr must be a finite number above 0, got nan"),
        ({"base_lr": math.inf}, "base_lr must be a finite number above 0, got inf"),
        ({"momentum": -0.1}, "momentum must be a finite number of at least 0, got -0.1"),
        ({"weight_decay": -1e-4}, "weight_decay must be a finite number of at least 0, got -0.0001"),
        ({"weight_decay": math.inf}, "weight_decay must be a finite number of at least 0, got inf"),
    ],
)
def test_what_trains_nothing_is_refused(wrong, sentence):
    check_descent(base_lr=1e-9, momentum=0, weight_decay=0)
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        check_descent(**{"base_lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4} | wrong)
