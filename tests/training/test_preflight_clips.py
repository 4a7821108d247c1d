"""Which clips of a cache are held out, which of them are measured, and which are trained on."""

from dataclasses import replace
from pathlib import Path

import pytest
from helpers_cache import SETTINGS, encode, row_of

from mochi_tune.config.load import load_config
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import open_cache
from mochi_tune.data.cache_writer import CacheWriter
from mochi_tune.errors import DataError
from mochi_tune.recipes.plan import count_clips
from mochi_tune.training.loader import held_out, spread_over
from mochi_tune.training.preflight_clips import choose_held_out, clip_order, measured_clips, video_names

SIZE = Bucket(7, 32, 48)


def cache_of(folder: Path, clips: dict[str, int]):
    """Writes a cache of clips 0.mp4, 1.mp4, ... of each source."""
    transform = {"version": 1, "buckets": {name: [[7, 32, 48]] for name in clips}}
    rows = [
        replace(
            row_of(f"{number}.mp4", "a", f"{name}{number}", bucket=SIZE),
            sample_id=f"{name}/{number}.mp4",
            source=name,
        )
        for name, count in clips.items()
        for number in range(count)
    ]
    with CacheWriter(folder) as writer:
        encode(writer, rows)
        writer.commit(rows, replace(SETTINGS, transform=transform))
    return open_cache(folder, {name: [SIZE] for name in clips})


def config_of(folder: Path, sources: str, *more: str):
    sizes = ["data.num_frames=7", "data.height=32", "data.width=48", f"data.cache={folder}"]
    return load_config("my_lora", [*sizes, f"data.sources=[{sources}]", *more])


def chosen(config, cache) -> list[int]:
    return choose_held_out(config.data, cache, config.train.validation_clips, config.seed)


def measured(config, cache) -> list[int]:
    return measured_clips(config.data, cache, chosen(config, cache), config.train.validation_clips)


def test_a_source_of_validation_is_held_out_and_measured_evenly(tmp_path):
    cache = cache_of(tmp_path, {"few": 1, "many": 6, "train": 3})
    few, many = "{folder: few, validation: true}", "{folder: many, validation: true}"
    config = config_of(tmp_path, f"{few}, {{folder: train, repeats: 2}}, {many}")
    assert chosen(config, cache) == [0, *range(1, 7)]
    assert measured(config, cache) == [0, 1, 3, 5]
    order = clip_order(config.data, cache, chosen(config, cache), 1, 0)
    assert [pool.clips for pool in order.pools] == [(7, 8, 9)]
    assert count_clips(config)[1].startswith(f"10 in {tmp_path}, 7 of them for validation, each 7 frames")
    # They are never trained on, also if nothing is measured.
    config = config_of(tmp_path, f"{few}, {{folder: train}}, {many}")
    assert choose_held_out(config.data, cache, 0, 0) == list(range(7))
    assert spread_over([[1, 2, 3, 4], [5], [6, 7, 8]], 5) == [1, 3, 5, 6, 7] and spread_over([[1], [2]], 9) == [1, 2]


def test_without_such_a_source_the_choice_is_that_of_earlier_versions(tmp_path):
    cache = cache_of(tmp_path, {"cats": 8, "dogs": 8})
    config = config_of(tmp_path, "{folder: cats}, {folder: dogs}", "seed=3")
    names = [f"{name}/{number}.mp4" for name in ("cats", "dogs") for number in range(8)]
    held = chosen(config, cache)
    # The numbers are those of the commit before sources had names.
    assert video_names(config.data, cache) == names and held == held_out(names, 4, 3) == [0, 9, 10]
    assert measured(config, cache) == held


def test_a_video_in_two_sources_is_never_split(tmp_path):
    cache = cache_of(tmp_path, {"cats": 10, "large": 10})
    for seed in range(5):
        config = config_of(tmp_path, "{folder: cats}, {folder: ./cats, name: large}", f"seed={seed}")
        held = chosen(config, cache)
        assert len(held) == 4 and {clip + 10 for clip in held if clip < 10} == {clip for clip in held if clip >= 10}


def test_a_validation_video_is_not_trained_on_at_another_size(tmp_path):
    clips = {"cats": 3, "large": 3, "dogs": 2}
    sources = "{folder: cats, validation: true}, {folder: cats, name: large}"
    cache = cache_of(tmp_path / "both", clips)
    config = config_of(tmp_path / "both", f"{sources}, {{folder: dogs}}")
    names = cache.rows.column("sample_id")
    held = chosen(config, cache)
    assert {names[clip].partition("/")[0] for clip in held} == {"cats", "large"} and len(held) == 6
    assert {names[clip] for clip in measured(config, cache)} == {f"cats/{n}.mp4" for n in range(3)}
    for folder, clips, text in (
        ("none", {"dogs": 2}, "has no clip of the sources with validation: true, cats: add clips to them"),
        ("all", {"cats": 3, "large": 3}, "has every video of the sources with validation: true, cats and no other"),
    ):
        with pytest.raises(DataError, match=text) as caught:
            chosen(config, cache_of(tmp_path / folder, clips))
        assert "\n" not in str(caught.value)
