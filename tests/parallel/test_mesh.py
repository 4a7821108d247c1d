"""The possible layouts of processes, and the choice of the one with the lowest estimated time."""

import pytest

from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.forecast import CARDS
from mochi_tune.parallel.forecast_context import TRAINING, choose_split
from mochi_tune.parallel.mesh import (
    Layout,
    Videos,
    choose_layout,
    estimate_seconds,
    possible_layouts,
    training_layout,
)

FULL = DiTConfig()
TOKENS = 44520
H100 = CARDS["h100"]


def choose(num_ranks: int, num_videos: int = 1, is_guided: bool = False, card=H100, **asked: int) -> Layout:
    return choose_layout(num_ranks, FULL, Videos(num_videos, TOKENS, is_guided), asked, card)


def test_any_number_of_processes_can_share_a_video():
    for num_ranks in (1, 2, 5, 7, 16, 48):
        made = choose(num_ranks)
        assert made == Layout(context=num_ranks, heads=choose_split(num_ranks, FULL, TOKENS, H100)[0])
        trained = training_layout(2 * num_ranks, num_ranks, FULL, TOKENS, H100)
        heads, _ = choose_split(num_ranks, FULL, TOKENS, H100, TRAINING)
        assert trained == Layout(data=2, context=num_ranks, heads=heads) and trained.split == (
            heads,
            num_ranks // heads,
        )
    assert possible_layouts(5, is_guided=True) == [Layout(data=5), Layout(context=5)]
    assert choose(10, is_guided=True) == Layout(guidance=2, context=5)
    assert choose(5, num_videos=5) == Layout(data=5)
    assert choose(10, num_videos=5, context=10).context == 10
    assert choose(8).in_words.endswith("parallel.context=8, 8 heads x 1 ring")


def test_the_split_depends_on_the_gpu():
    assert choose(8).split == (8, 1) and choose(8, card=CARDS["4090"]).split[1] > 1


def test_impossible_layouts_are_refused_and_possible_ones_named():
    with pytest.raises(ParallelError, match=r"context=3 is not possible with 4 processes and no guidance: use"):
        choose(4, context=3)
    with pytest.raises(ParallelError, match=r"context=3 does not divide 4 processes: use parallel.num_processes=3\."):
        training_layout(4, 3, FULL, TOKENS, H100)


def test_time_depends_on_the_rank_with_most_videos_and_on_passes():
    for count, turns in ((1, 1), (2, 1), (3, 2)):
        videos, alone = Videos(count, TOKENS, False), Videos(1, TOKENS, False)
        one = estimate_seconds(Layout(), FULL, alone, H100)
        assert estimate_seconds(Layout(data=2), FULL, videos, H100) == turns * one
        guided = estimate_seconds(Layout(data=2), FULL, Videos(count, TOKENS, True), H100)
        assert guided == 2 * turns * one
        assert estimate_seconds(Layout(data=2, guidance=2), FULL, Videos(count, TOKENS, True), H100) == turns * one
    assert estimate_seconds(Layout(context=5), FULL, alone, H100) > one / 5
