import pytest

from lineara.tasks.instance_segmentation.schedule import learning_rate_factor


def test_the_factor_rises_linearly_and_falls_at_each_milestone():
    factor = learning_rate_factor(4, [6, 9], 0.1)
    rise = [0.001, 0.25075, 0.5005, 0.75025]
    expected = [*rise, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01, 0.01]
    assert [factor(step) for step in range(11)] == pytest.approx(expected)


def test_a_milestone_within_the_warm_up_counts_too():
    factor = learning_rate_factor(4, [2], 0.5)
    assert [factor(step) for step in range(5)] == pytest.approx([0.001, 0.25075, 0.25025, 0.375125, 0.5])


def test_without_a_warm_up_the_first_step_has_the_whole_rate():
    assert [learning_rate_factor(0, [1], 0.2)(step) for step in range(3)] == [1.0, 0.2, 0.2]
