import json
from collections import Counter

import pytest
import torch

from mochi_tune.data.buckets import Bucket
from mochi_tune.data.order import ClipOrder, ClipPool, apportion, epoch_order, make_pools, shuffled_pools

WIDE, TALL, STILL = Bucket(13, 48, 80), Bucket(13, 80, 48), Bucket(1, 64, 64)


def one_pool(num_clips: int, batch_size: int, seed: int = 0) -> ClipOrder:
    return ClipOrder((ClipPool("/a", tuple(range(num_clips)), num_clips),), batch_size, seed)


def stream(order: ClipOrder, count: int) -> list[int]:
    return [clip for number in range(count) for clip in order.batch(number)]


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 1), (1, 4), (5, 2), (7, 3), (4, 4), (3, 8), (10, 1)])
def test_every_clip_comes_exactly_once_an_epoch(num_clips, batch_size):
    num_epochs = 6
    clips = stream(one_pool(num_clips, batch_size, 3), -(-num_epochs * num_clips // batch_size))
    for epoch in range(num_epochs):
        assert sorted(clips[epoch * num_clips : (epoch + 1) * num_clips]) == list(range(num_clips))


def test_the_stream_of_clips_of_one_bucket_does_not_depend_on_the_batch_size():
    streams = [stream(one_pool(7, size, 1), 60 // size) for size in (1, 2, 3, 5)]
    assert all(each == streams[0] for each in streams)


def test_resuming_gives_the_batches_of_a_straight_run():
    pools = make_pools({i: ("", WIDE if i % 3 else TALL) for i in range(11)}, {"": (1.0, None)}, {})
    for order in (one_pool(11, 4, 9), ClipOrder(pools, 4, 9)):
        straight = [order.batch(number) for number in range(40)]
        epoch_order.cache_clear()
        shuffled_pools.cache_clear()
        assert [order.batch(number) for number in range(25, 40)] == straight[25:]


def test_epochs_and_seeds_and_pools_are_shuffled_differently():
    orders = {tuple(epoch_order(20, seed, epoch, key)) for seed in range(3) for epoch in range(3) for key in ("", "/a")}
    assert len(orders) == 18
    assert tuple(range(20)) not in orders


def test_each_clip_takes_each_place_about_equally_often():
    places = Counter(epoch_order(4, 0, epoch).index(0) for epoch in range(2000))
    assert all(400 < places[place] < 600 for place in range(4)), places


def test_the_order_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    one_pool(13, 2, 5).batch(100)
    assert torch.equal(torch.get_rng_state(), state)


def mixed(sources=None, shares=None, batch_size=1) -> tuple[ClipOrder, dict]:
    """Nine clips of two sources in three buckets."""
    buckets = [WIDE, WIDE, WIDE, TALL, STILL, STILL, WIDE, WIDE, TALL]
    clips = {i: ("cats" if i < 6 else "dogs", bucket) for i, bucket in enumerate(buckets)}
    pools = make_pools(clips, sources or {"cats": (1.0, None), "dogs": (1.0, None)}, shares or {})
    return ClipOrder(pools, batch_size, 4), clips


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_batch_has_one_bucket_and_every_clip_comes_equally_often(batch_size):
    order, clips = mixed(batch_size=batch_size)
    batches = [order.batch(number) for number in range(9)]  # batch_size epochs
    for batch in batches:
        assert len(batch) == batch_size and len({clips[clip][1] for clip in batch}) == 1
    drawn = Counter(clip for batch in batches for clip in batch)
    assert drawn == dict.fromkeys(range(9), batch_size)
    # Buckets are mixed.
    assert [clips[batch[0]][1] for batch in batches] != sorted(clips[batch[0]][1] for batch in batches)


def test_repeats_are_exact_over_an_epoch():
    order, _ = mixed({"cats": (1.0, None), "dogs": (3.0, None)})
    length = 6 + 3 * 3
    for epoch in range(3):
        drawn = Counter(stream(order, (epoch + 1) * length)[epoch * length :])
        assert drawn == {**dict.fromkeys(range(6), 1), **dict.fromkeys((6, 7, 8), 3)}


def test_weights_divide_an_epoch():
    order, clips = mixed({"cats": (1.0, 1.0), "dogs": (1.0, 2.0)})
    # In a third of nine clips, the only upright cat has half a draw: two epochs are shuffled as one.
    drawn = Counter(clips[clip][0] for clip in stream(order, 18))
    assert drawn == {"cats": 6, "dogs": 12} and order.epoch_length == 9


def test_shares_of_buckets_are_those_that_are_asked_for():
    buckets = {i: ("", WIDE if i < 8 else STILL) for i in range(10)}
    order = ClipOrder(make_pools(buckets, {"": (1.0, None)}, {WIDE: 1.0, STILL: 1.0}), 1, 0)
    drawn = Counter(buckets[clip][1] for clip in stream(order, 40))
    assert drawn == {WIDE: 20, STILL: 20}


def test_another_pool_does_not_change_the_order_within_a_pool():
    order, clips = mixed()
    more = {**clips, 9: ("dogs", STILL)}
    grown = ClipOrder(make_pools(more, {"cats": (1.0, None), "dogs": (1.0, None)}, {}), 1, 4)
    wide = [clip for clip in stream(order, 90) if clip < 3]
    assert wide == [clip for clip in stream(grown, 100) if clip < 3]


def test_the_fingerprint_is_of_what_the_batches_hold():
    names = [f"{i}.mp4" for i in range(10)]
    order, _ = mixed()
    prints = {
        order.fingerprint(names),
        mixed(batch_size=2)[0].fingerprint(names),
        mixed({"cats": (2.0, None), "dogs": (1.0, None)})[0].fingerprint(names),
        order.fingerprint([*names[:3], "renamed.mp4", *names[4:]]),
    }
    assert len(prints) == 4
    # With one pool, the batch size only changes where the stream is cut.
    assert one_pool(5, 1).fingerprint(names) == one_pool(5, 3).fingerprint(names)
    assert json.dumps(order.fingerprint(names))


def test_apportion_adds_up_and_stays_within_one_of_the_exact_share():
    generator = torch.Generator().manual_seed(0)
    for total in (0, 1, 7, 100):
        weights = (torch.rand(5, generator=generator) + 0.01).tolist()
        parts = apportion(total, weights)
        assert sum(parts) == total
        assert all(abs(part - total * w / sum(weights)) < 1 for part, w in zip(parts, weights, strict=True))
    # The part with the largest remainder gets the rest.
    assert apportion(4, [1, 1, 1.6]) == [1, 1, 2]


def test_shares_stay_where_a_source_has_many_buckets():
    """Ten clips of ten sizes, with one draw for nine of the other source: each size has a pool."""
    clips = {number: ("film", Bucket(7, 32, 16 * (number + 1))) for number in range(10)}
    clips |= {10 + number: ("cats", Bucket(7, 32, 32)) for number in range(10)}
    for sources, share in (
        ({"film": (1, 1.0), "cats": (1, 9.0)}, 0.1),
        ({"film": (0.1, None), "cats": (1, None)}, 1 / 11),
    ):
        order = ClipOrder(make_pools(clips, sources, {}), 1, 0)
        total = sum(pool.num_draws for pool in order.pools)
        film = sum(pool.num_draws for pool in order.pools if pool.name.startswith("film"))
        assert film / total == pytest.approx(share) and len(order.pools) == 11
        assert order.epoch_length == pytest.approx(20 if share == 0.1 else 11)
        drawn = Counter(clips[clip][0] for number in range(total) for clip in order.batch(number))
        assert drawn["film"] == film
    [one] = ClipOrder(make_pools({0: ("a", Bucket(7, 32, 32))}, {"a": (1, None)}, {}), 1, 0).pools
    assert (one.num_draws, one.num_epochs) == (1, 1)


def test_the_order_of_pools_differs_between_cycles():
    assert len({tuple(shuffled_pools((9, 9), 0, cycle)[0]) for cycle in range(5)}) == 5
