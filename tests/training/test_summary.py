import pytest

from mochi_tune.config.schema import TrainConfig
from mochi_tune.training.summary import doubtful_settings


@pytest.mark.parametrize(("steps", "shorter"), [(50, 5), (20, 2), (9, 1), (2, 1), (1, 0)])
def test_a_warm_up_that_never_ends_names_both_ways_out(steps, shorter):
    [line] = doubtful_settings(TrainConfig(steps=steps))
    assert line.endswith(f"; use train.warmup_steps={shorter}, or train.steps above 50")
    # Each of them is taken without a word.
    assert not doubtful_settings(TrainConfig(steps=steps, warmup_steps=shorter))
    assert not doubtful_settings(TrainConfig(steps=51))
