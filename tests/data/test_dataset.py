import pickle

import pytest
import torch
from helpers_cache import BUCKETS, make_cache, tensors_of

from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset, collate
from mochi_tune.errors import DataError

CAPTIONS = {f"clip{i}.mp4": f"caption number {i} " + "x " * i for i in range(7)} | {"sub/empty.mp4": ""}
# Two rows (4608 bytes of latents each) fit into a shard of this size, three do not.
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


def test_the_dataset_gives_items_of_the_cache_in_worker_processes_too(tmp_path):
    make_cache(tmp_path, CAPTIONS, shard_bytes=SMALL)
    dataset = LatentDataset(open_cache(tmp_path, BUCKETS))
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
    cache = open_cache(tmp_path, BUCKETS)
    items = iter(torch.utils.data.DataLoader(LatentDataset(cache), batch_size=None, num_workers=num_workers))
    found = [next(items)]
    make_cache(tmp_path, {f"other{i}.mp4": f"other words {i}" for i in range(12)}, shard_bytes=2 * SMALL)
    assert not {row.path for row in open_cache(tmp_path, BUCKETS).rows} & set(CAPTIONS)
    found += items
    assert [item["sample_id"] for item in found] == sorted(CAPTIONS)
    for row, item in zip(cache.rows, found, strict=True):
        for name, tensor in tensors_of(row).items():
            assert torch.equal(item[name], tensor), (row.path, name)


def test_a_shard_in_the_place_of_another_is_refused(tmp_path):
    make_cache(tmp_path, {f"clip{i}.mp4": f"caption {i}" for i in range(4)}, shard_bytes=SMALL)
    cache = open_cache(tmp_path, BUCKETS)
    # The cache opens its shards when it reads the first clip.
    first, second = sorted((tmp_path / "data").iterdir())
    for source, target in ((first, tmp_path / "moved"), (second, first), (tmp_path / "moved", second)):
        source.rename(target)
    for index, row in enumerate(cache.rows):
        with pytest.raises(DataError, match=f"another clip is in the place of {row.path}"):
            cache.read(index)
