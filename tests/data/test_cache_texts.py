"""Errors for caches that training cannot use."""

from dataclasses import replace

import pytest
from helpers_cache import BUCKETS, SETTINGS, make_cache

from mochi_tune.data.cache import PARTS_FOLDER, open_cache
from mochi_tune.errors import DataError


def test_shares_that_were_not_merged_are_told_with_what_merges_them(tmp_path):
    make_cache(tmp_path, {"a.mp4": "a cat"})
    (tmp_path / PARTS_FOLDER / "1-of-2").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path, BUCKETS)
    assert "its shares were not merged: run `mochi-tune prepare` with parallel.shard=merge" in str(caught.value)
    (tmp_path / PARTS_FOLDER / "1-of-2").rename(tmp_path / PARTS_FOLDER / "latents-1")
    with pytest.raises(DataError, match="was stopped before its end"):
        open_cache(tmp_path, BUCKETS)


def test_texts_that_differ_are_told_in_quotes(tmp_path):
    kept = {"data.caption_prefix": "", "data.clips": "head", "data.max_clips": None}
    settings = replace(SETTINGS, transform=SETTINGS.transform | {"settings": kept})
    make_cache(tmp_path, {"a.mp4": "a cat"}, settings)
    wanted = kept | {"data.caption_prefix": "glass style, ", "data.clips": "all", "data.max_clips": 3}
    with pytest.raises(DataError) as caught:
        open_cache(tmp_path, BUCKETS, settings=wanted)
    for text in (
        "data.caption_prefix: the cache has '', the config wants 'glass style, '",
        "data.clips: the cache has head, the config wants all",
        "data.max_clips: the cache has None, the config wants 3",
    ):
        assert text in str(caught.value)
