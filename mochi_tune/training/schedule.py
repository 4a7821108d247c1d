"""The learning rate of every step, as a function of the step alone: it needs no state and cannot drift from it."""

import math

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def learning_rate_at(
    step: int, peak: float, warmup_steps: int, num_steps: int, schedule: str = "cosine", decay_share: float = 0.2
) -> float:
    """Returns the learning rate of a step, counted from 1: a linear warm-up to the peak, then what the schedule says.

    "cosine" and "linear" fall from the peak to 0 over all steps after the warm-up, "constant" stays at the peak, and
    "wsd" (warm-up, stable, decay) stays there until the last steps, over which it falls linearly: a run that is to be
    longer than was thought goes on from a checkpoint before that fall, at no loss.
    Source: "wsd": https://arxiv.org/abs/2404.06395; a fall over the last 20 %: https://arxiv.org/abs/2405.18392.

    Args:
        step: 1 to num_steps.
        peak: the rate at the end of the warm-up.
        warmup_steps: steps from 0 to the peak.
        num_steps: of the whole run, warm-up included.
        schedule: one of SCHEDULES.
        decay_share: for "wsd", the share of num_steps in which the rate falls, above 0 and at most 1.
    """
    assert schedule in SCHEDULES, schedule
    if step <= warmup_steps:
        return peak * step / warmup_steps
    num_left = max(1, num_steps - warmup_steps)
    progress = (step - 1 - warmup_steps) / num_left
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "wsd":
        # A fall that would begin in the warm-up begins after it.
        num_falling = min(decay_share * num_steps, num_left)
        return peak * min(1.0, (num_steps + 1 - step) / num_falling)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether something that is done every so many steps, and at the last one, is done at this one; 0 is never."""
    return step == num_steps or (every > 0 and step % every == 0)
