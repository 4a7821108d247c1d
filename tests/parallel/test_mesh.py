"""How processes share the work: which layouts there are, and which one is estimated to be the fastest."""

import pytest

from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.mesh import (
    ATTENTION_FLOPS,
    LINK_BYTES,
    Layout,
    choose_layout,
    estimate_seconds,
    possible_layouts,
    training_layout,
)

FULL = DiTConfig()
TOKENS = 44520


def choose(num_ranks: int, num_videos: int = 1, is_guided: bool = False, **asked: int) -> Layout:
    return choose_layout(num_ranks, FULL, num_videos, TOKENS, is_guided, asked)


def test_any_number_of_processes_can_share_a_video():
    for num_ranks in (1, 2, 5, 7, 16, 48):
        assert choose(num_ranks) == Layout(context=num_ranks)
        assert training_layout(2 * num_ranks, num_ranks) == Layout(data=2, context=num_ranks)
    assert possible_layouts(5, is_guided=True) == [Layout(data=5), Layout(context=5)]
    assert choose(10, is_guided=True) == Layout(guidance=2, context=5)
    assert choose(5, num_videos=5) == Layout(data=5)
    assert choose(10, num_videos=5, context=10) == Layout(context=10)


def test_what_cannot_be_is_refused_with_what_can():
    with pytest.raises(ParallelError, match=r"context=3 is not possible with 4 processes and no guidance: use"):
        choose(4, context=3)
    with pytest.raises(ParallelError, match=r"context=3 does not divide 4 processes: use parallel.num_processes=3\."):
        training_layout(4, 3)


def test_a_ring_costs_what_attention_does_not_hide():
    for num_tokens, is_hidden in ((TOKENS, True), (200, False)):
        ring = estimate_seconds(Layout(context=5), FULL, 1, num_tokens, False)
        alone = estimate_seconds(Layout(), FULL, 1, num_tokens, False)
        # 4 FLOPs a query, key and channel; the keys and values of four fifths of the tokens, 2 bytes each.
        attention = FULL.depth * 4 * num_tokens**2 / 5 * FULL.hidden_size_x / ATTENTION_FLOPS
        travelled = FULL.depth * 4 * num_tokens * 4 / 5 * FULL.hidden_size_x / LINK_BYTES
        expected = alone / 5 + max(0, travelled - attention)
        assert ring == pytest.approx(expected) and (travelled < attention) == is_hidden
