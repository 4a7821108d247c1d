"""The learning rate as a function of the step, without any state."""

import math


def learning_rate_at(
    step: int, peak: float, warmup_steps: int, num_steps: int, schedule: str = "cosine", decay_share: float = 0.2
) -> float:
    """Returns the learning rate of a step: a linear warm-up to the peak, then the schedule.

    "cosine" and "linear" fall after the warm-up, to 0 for the step after the last one. "constant" stays at the peak.
    "wsd" (warm-up, stable, decay) stays at the peak until the last steps and falls linearly over these. A run can then
    be extended without loss from a checkpoint before the decay.
    Source: "wsd": https://arxiv.org/abs/2404.06395; a fall over the last 20 %: https://arxiv.org/abs/2405.18392.

    Args:
        step: the step, from 1 to num_steps.
        peak: the learning rate at the end of the warm-up.
        warmup_steps: number of steps of the warm-up.
        num_steps: number of steps of the run, including the warm-up.
        schedule: a value of `train.schedule`.
        decay_share: for "wsd", the share of num_steps in which the rate falls, above 0 and at most 1.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    num_left = max(1, num_steps - warmup_steps)
    progress = (step - 1 - warmup_steps) / num_left
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "wsd":
        # The decay begins after the warm-up at the earliest.
        num_falling = min(decay_share * num_steps, num_left)
        return peak * min(1.0, (num_steps + 1 - step) / num_falling)
    assert schedule == "cosine", schedule
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something is due at a step: after each `every` steps (0: never) and at the last step."""
    return step == num_steps or (every > 0 and step % every == 0)
