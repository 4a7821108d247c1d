"""The results of the processes of a step."""

import pytest

from mochi_tune.training.step_result import merge_parts


def test_parts_are_in_the_order_of_the_samples_and_each_counts_once():
    first, second = (1.0, ["a.mp4"], [0.1]), (3.0, ["b.mp4"], [0.7])
    assert merge_parts([{1: second}, {0: first}, {1: second}]) == (2.0, ["a.mp4", "b.mp4"], [0.1, 0.7])


def test_processes_that_share_tokens_have_the_same_clips():
    with pytest.raises(AssertionError, match="the same clips"):
        merge_parts([{0: (1.0, ["a.mp4"], [0.1])}, {0: (1.0, ["b.mp4"], [0.1])}])
