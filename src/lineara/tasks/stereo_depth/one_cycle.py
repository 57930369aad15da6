"""A learning rate that rises once and falls once over a run whose length is known."""

# The rate begins with this part of its peak.
_START = 1 / 25


class OneCycle:
    """What the learning rate is multiplied by in a step, counted from 0; an object, so that checkpoints keep it.

    It rises linearly from 1 / 25 to 1 over the warm-up, then falls linearly, so that it would reach 0 in the step
    behind the last.

    Args:
        total_steps: of the run, at least 1.
        warmup_share: of the steps until the peak, from 0 to below 1.

    Source: Smith and Topin, 2017, "Super-Convergence", arXiv 1708.07120; linear as Lipson et al., "RAFT-Stereo", 3DV
    2021, arXiv 2109.07547, use it.
    """

    def __init__(self, total_steps: int, warmup_share: float) -> None:
        self.total_steps = total_steps
        self.warmup_steps = min(round(warmup_share * total_steps), total_steps - 1)

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return _START + (1 - _START) * step / self.warmup_steps
        return max(0.0, (self.total_steps - step) / (self.total_steps - self.warmup_steps))
