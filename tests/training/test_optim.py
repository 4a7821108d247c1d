import itertools

import pytest
import torch

from mochi_tune.training.optim import build_adamw, learning_rate_at


def test_warm_up_then_half_a_cosine():
    rates = [learning_rate_at(step, 1.0, 4, 104) for step in range(1, 105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[54] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up_and_nothing_but_warm_up():
    assert learning_rate_at(1, 1.0, 0, 10) == 1.0
    assert [learning_rate_at(step, 1.0, 10, 5) for step in (1, 5)] == [0.1, 0.5]


def test_adamw_refuses_parameters_that_would_round_its_updates_away():
    with pytest.raises(AssertionError, match="fp32"):
        build_adamw([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))], 1e-4, 0.0, "cpu")
