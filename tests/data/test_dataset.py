import pickle
from collections import Counter

import pytest
import torch
from helpers_cache import make_cache, tensors_of

from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset, batch_indices, collate, epoch_order

GEOMETRY = {"num_frames": 7, "height": 32, "width": 48}
CAPTIONS = {f"clip{i}.mp4": f"caption number {i} " + "x " * i for i in range(7)} | {"sub/empty.mp4": ""}
# Two rows' tensors (4608 bytes of latents each) go into a shard of this size, three do not.
SMALL = 11_000


def item(length, sample_id, width=5):
    generator = torch.Generator().manual_seed(len(sample_id) * 100 + length)
    return {
        "mean": torch.randn(12, 2, 4, 6, generator=generator),
        "logvar": torch.randn(12, 2, 4, 6, generator=generator),
        "prompt_embeds": torch.randn(length, width, generator=generator),
        "sample_id": sample_id,
    }


def test_collate_pads_each_prompt_with_zeros_and_masks_the_padding():
    items = [item(3, "a.mp4"), item(0, "b/empty.mp4"), item(7, "c.mp4")]
    batch = collate(items)
    assert batch["sample_ids"] == ["a.mp4", "b/empty.mp4", "c.mp4"]
    assert torch.equal(batch["mean"], torch.stack([i["mean"] for i in items]))
    assert torch.equal(batch["logvar"], torch.stack([i["logvar"] for i in items]))
    assert batch["mean"].dtype == batch["logvar"].dtype == batch["prompt_embeds"].dtype == torch.float32
    assert batch["prompt_embeds"].shape == (3, 7, 5)
    assert batch["prompt_mask"].dtype == torch.bool
    assert batch["prompt_mask"].sum(dim=1).tolist() == [3, 0, 7]
    for row, one in enumerate(items):
        assert torch.equal(batch["prompt_embeds"][row][batch["prompt_mask"][row]], one["prompt_embeds"])
    assert batch["prompt_embeds"][~batch["prompt_mask"]].abs().sum() == 0


def test_collate_of_empty_prompts_alone_keeps_one_masked_token():
    batch = collate([item(0, "a"), item(0, "b")])
    assert batch["prompt_embeds"].shape == (2, 1, 5)
    assert not batch["prompt_mask"].any()
    assert not batch["prompt_embeds"].any()


@pytest.mark.parametrize(("num_clips", "batch_size"), [(1, 1), (1, 4), (5, 2), (7, 3), (4, 4), (3, 8), (10, 1)])
def test_every_clip_comes_exactly_once_an_epoch(num_clips, batch_size):
    num_epochs = 6
    stream = []
    while len(stream) < num_epochs * num_clips:
        batch = batch_indices(len(stream) // batch_size, num_clips=num_clips, batch_size=batch_size, seed=3)
        assert len(batch) == batch_size
        stream += batch
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * num_clips : (epoch + 1) * num_clips]) == list(range(num_clips))


def test_the_stream_of_clips_does_not_depend_on_the_batch_size():
    streams = [
        [i for k in range(60 // size) for i in batch_indices(k, num_clips=7, batch_size=size, seed=1)]
        for size in (1, 2, 3, 5)
    ]
    assert all(stream == streams[0] for stream in streams)


def test_resuming_gives_the_batches_of_a_straight_run():
    arguments = {"num_clips": 11, "batch_size": 4, "seed": 9}
    straight = [batch_indices(k, **arguments) for k in range(40)]
    epoch_order.cache_clear()
    resumed = [batch_indices(k, **arguments) for k in range(25, 40)]
    assert resumed == straight[25:]


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {epoch_order(20, seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(20)) not in orders


def test_each_clip_takes_each_place_about_equally_often():
    places = Counter(epoch_order(4, 0, epoch).index(0) for epoch in range(2000))
    assert all(400 < places[place] < 600 for place in range(4)), places


def test_the_order_does_not_touch_the_global_generator():
    state = torch.get_rng_state()
    batch_indices(100, num_clips=13, batch_size=2, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_dataset_gives_items_of_the_cache_in_worker_processes_too(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    dataset = LatentDataset(open_cache(tmp_path, **GEOMETRY))
    dataset[0]
    here = list(torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate))
    there = list(torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate, num_workers=1))
    assert [batch["sample_ids"] for batch in here] == [batch["sample_ids"] for batch in there]
    assert [name for batch in here for name in batch["sample_ids"]] == sorted(CAPTIONS)
    for ours, theirs in zip(here, there, strict=True):
        for name in ("mean", "logvar", "prompt_embeds", "prompt_mask"):
            assert torch.equal(ours[name], theirs[name])
    again = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert torch.equal(again[2]["mean"], dataset[2]["mean"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_cache_that_is_replaced_while_it_is_read_is_read_to_its_end(tmp_path, num_workers):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    cache = open_cache(tmp_path, **GEOMETRY)
    items = iter(torch.utils.data.DataLoader(LatentDataset(cache), batch_size=None, num_workers=num_workers))
    found = [next(items)]
    make_cache(tmp_path, {f"other{i}.mp4": f"other words {i}" for i in range(12)}, shard_bytes=2 * SMALL)
    assert not {row.path for row in open_cache(tmp_path, **GEOMETRY).rows} & set(CAPTIONS)
    found += items
    assert [item["sample_id"] for item in found] == sorted(CAPTIONS)
    for row, item in zip(cache.rows, found, strict=True):
        for name, tensor in tensors_of(row).items():
            assert torch.equal(item[name], tensor), (row.path, name)
