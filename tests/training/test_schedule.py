import itertools
import math

import pytest

from mochi_tune.config.settings import known_keys
from mochi_tune.training.schedule import learning_rate_at

SCHEDULES = known_keys()["train.schedule"].choices


def rates(schedule, warmup_steps, num_steps, **settings):
    steps = range(1, num_steps + 1)
    return [learning_rate_at(step, 1.0, warmup_steps, num_steps, schedule, **settings) for step in steps]


def test_warm_up_then_half_a_cosine():
    found = [learning_rate_at(step, 1.0, 4, 104) for step in range(1, 105)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0 and found[54] == pytest.approx(0.5) and 0 < found[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(found[4:]))


def test_the_cosine_is_the_one_that_runs_were_trained_by():
    """Bit for bit, because a resumed run must use the same rates."""
    for step in range(51, 1001):
        old = 2e-4 * 0.5 * (1 + math.cos(math.pi * ((step - 1 - 50) / max(1, 1000 - 50))))
        assert learning_rate_at(step, 2e-4, 50, 1000) == old


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_warm_up_and_nothing_but_warm_up(schedule):
    assert learning_rate_at(1, 1.0, 0, 10, schedule) == 1.0
    assert [learning_rate_at(step, 1.0, 10, 5, schedule) for step in (1, 5)] == [0.1, 0.5]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_warms_up_never_rises_after_and_is_never_0(schedule):
    found = rates(schedule, 10, 100)
    assert found[:10] == [step / 10 for step in range(1, 11)]
    assert all(a >= b > 0 for a, b in itertools.pairwise(found[9:]))


def test_linear_falls_by_the_same_amount_each_step():
    assert rates("linear", 2, 6) == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_constant_stays():
    assert rates("constant", 2, 6) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_wsd_stays_and_then_falls_over_its_share_of_the_steps():
    assert rates("wsd", 2, 20, decay_share=0.2) == [0.5, *[1.0] * 15, 1.0, 0.75, 0.5, 0.25]


def test_a_fall_longer_than_what_the_warm_up_leaves_begins_after_it():
    assert rates("wsd", 4, 8, decay_share=1.0) == rates("linear", 4, 8)


def test_wsd_is_the_same_up_to_the_fall_however_long_the_run():
    assert rates("wsd", 2, 20)[:16] == rates("wsd", 2, 200)[:16]
