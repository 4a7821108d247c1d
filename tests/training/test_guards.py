"""A loss is compared with the median of the last losses."""

from mochi_tune.training.guards import WINDOW, SpikeGuard


def test_a_spike_is_measured_by_the_median_of_the_last_losses():
    guard = SpikeGuard("warn", 2.0)
    for loss in [1e9] * 100 + [1.0] * (WINDOW - 1) + [0.01]:
        guard.made(loss)
    assert len(guard.losses) == WINDOW
    assert guard.verdict(1.9) == "" and guard.verdict(2.1) == "warn"
