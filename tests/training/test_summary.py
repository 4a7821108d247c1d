import pytest

from mochi_tune.config.schema import TrainConfig
from mochi_tune.training.summary import doubtful_settings


@pytest.mark.parametrize(("steps", "shorter"), [(50, 5), (20, 2), (9, 1), (2, 1), (1, 0)])
def test_a_warm_up_that_never_ends_names_both_ways_out(steps, shorter):
    [line] = doubtful_settings(TrainConfig(steps=steps), 1)
    assert line.endswith(f"; use train.warmup_steps={shorter}, or train.steps above 50")
    # None of these settings causes a warning.
    assert not doubtful_settings(TrainConfig(steps=steps, warmup_steps=shorter), 1)
    assert not doubtful_settings(TrainConfig(steps=51), 1)


def test_a_rate_is_told_from_five_times_the_usual_one():
    [line] = doubtful_settings(TrainConfig(steps=51, learning_rate=5.1e-3), 1)
    assert "train.learning_rate=0.0051 is far above the usual range of adamw, up to 0.001" in line
    assert not doubtful_settings(TrainConfig(steps=51, learning_rate=5e-3), 1)


def test_a_setting_that_does_nothing_is_told():
    stratified = TrainConfig(sigma_stratified=True)
    [line] = doubtful_settings(stratified, 1)
    assert "train.sigma_stratified=true does nothing with one sample a step" in line
    assert not doubtful_settings(stratified, 2)
    [line] = doubtful_settings(TrainConfig(spike_policy="off", spike_factor=3), 1)
    assert "train.spike_factor=3 does nothing with train.spike_policy=off" in line
    assert not doubtful_settings(TrainConfig(spike_policy="warn", spike_factor=3), 1)
