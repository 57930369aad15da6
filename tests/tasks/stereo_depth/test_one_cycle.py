"""The cycle of the learning rate, by hand."""

import pytest

from lineara.tasks.stereo_depth.one_cycle import OneCycle


def test_the_rate_rises_from_a_25th_and_falls_towards_0():
    factor = OneCycle(20, 0.25)
    rise = [0.04, 0.232, 0.424, 0.616, 0.808]
    fall = [1 - part / 15 for part in range(15)]
    assert [factor(step) for step in range(20)] == pytest.approx([*rise, *fall])
    assert factor(19) > 0
    assert (factor(20), factor(21)) == (0.0, 0.0)  # behind the end


@pytest.mark.parametrize("total_steps", [1, 2, 3, 50, 100, 101])
@pytest.mark.parametrize("warmup_share", [0.0, 0.01, 0.5, 0.999])
def test_a_run_of_any_length_reaches_the_peak_once(total_steps, warmup_share):
    factor = OneCycle(total_steps, warmup_share)
    rates = [factor(step) for step in range(total_steps)]
    assert [rate for rate in rates if rate == 1.0] == [1.0]
    peak = rates.index(1.0)
    assert abs(peak - warmup_share * total_steps) <= 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert min(rates) > 0
