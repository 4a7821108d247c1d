"""The estimated cost of splits of ranks into heads x ring, and the choice of the fastest; no link was measured."""

from dataclasses import replace

import pytest

from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.forecast import ATTENTION_SHARE, CARDS, Card
from mochi_tune.parallel.forecast_context import (
    LINK_SHARE,
    SAMPLING,
    TEXT_TOKENS,
    TRAINING,
    choose_split,
    possible_splits,
    sharing_seconds,
    split_seconds,
)

FULL, TOKENS = DiTConfig(), 44520
FAST, SLOW = CARDS["h100"], CARDS["4090"]


def test_any_number_of_ranks_has_splits_and_heads_are_shared_evenly():
    assert possible_splits(1, 24) == [(1, 1)] and possible_splits(5, 24) == [(1, 5)]
    assert possible_splits(16, 24) == [(1, 16), (2, 8), (4, 4), (8, 2)]
    assert possible_splits(48, 24)[-1] == (24, 2)


@pytest.mark.parametrize("passes", [SAMPLING, TRAINING])
def test_the_split_is_the_cheapest_one(passes):
    for num_ranks in (1, 2, 5, 6, 8, 16, 48):
        for card in (FAST, SLOW, replace(FAST, nvlink=1e15), replace(FAST, nvlink=1e9)):
            for num_tokens in (200, 11130, TOKENS):
                seconds = {
                    split: split_seconds(split, FULL, num_tokens, card, passes)
                    for split in possible_splits(num_ranks, 24)
                }
                chosen = choose_split(num_ranks, FULL, num_tokens, card, passes)
                assert seconds[chosen] == min(seconds.values()) and chosen[0] * chosen[1] == num_ranks


def test_a_fast_link_shares_heads_and_a_slow_one_uses_a_ring():
    assert choose_split(8, FULL, TOKENS, FAST) == (8, 1) and choose_split(5, FULL, TOKENS, FAST) == (1, 5)
    heads, ring = choose_split(8, FULL, TOKENS, SLOW)
    assert ring > 1 and heads * ring == 8
    # With few tokens, or a link that is slow for everything, a ring has no computation to hide its transfers.
    assert choose_split(8, FULL, 200, replace(SLOW, host=1e9)) == (8, 1)


def test_seconds_are_what_is_computed_exchanged_and_not_hidden():
    attention = 4 * FULL.hidden_size_x * (TOKENS + TEXT_TOKENS) ** 2 / (FAST.matrix * ATTENTION_SHARE)
    assert split_seconds((1, 1), FULL, TOKENS, FAST) == pytest.approx(FULL.depth * attention)
    assert sharing_seconds((1, 1), FULL, TOKENS, FAST) == 0
    # With infinite bandwidth of memory and link, only the text remains, which every row computes.
    endless = Card(80, FAST.matrix, 1e30, 1e30)
    for heads, ring in ((1, 4), (2, 2)):
        shared = attention / heads * (TOKENS / ring + TEXT_TOKENS) / (TOKENS + TEXT_TOKENS)
        waited = 5 * 25e-6 if heads > 1 else 0
        found = split_seconds((heads, ring), FULL, TOKENS, endless)
        assert found == pytest.approx(FULL.depth * (shared + waited), rel=1e-9)
    # On a slow link, the time of a ring is that of its transfers, which overlap all but the last block of keys. The
    # exchanges of q, k, v and the output overlap nothing. 2 bytes per number.
    slow = Card(80, FAST.matrix, 1e30, 1e9)
    numbers = 2 * FULL.hidden_size_x * TOKENS / (1e9 * LINK_SHARE)
    last = attention / 4 * (TOKENS / 4 + TEXT_TOKENS) / (TOKENS + TEXT_TOKENS)
    assert split_seconds((1, 4), FULL, TOKENS, slow) == pytest.approx(
        FULL.depth * (2 * numbers * 3 / 4 + last), rel=1e-3
    )
    shared = split_seconds((4, 1), FULL, TOKENS, slow)
    assert shared == pytest.approx(FULL.depth * (4 * numbers / 4 * 3 / 4 + attention / 4), rel=1e-3)
    assert split_seconds((4, 1), FULL, TOKENS, FAST, TRAINING) > 3 * split_seconds((4, 1), FULL, TOKENS, FAST)
