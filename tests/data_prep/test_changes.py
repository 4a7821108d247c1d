"""Messages of `train` about files that changed after `prepare`; test_train_lora_buckets.py has more."""

import shutil

import pytest
from helpers_prepare import add_clip, config_for
from helpers_road import SIZES, prepared
from helpers_video import write_video

from mochi_tune.config.load import load_config
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.cache import open_cache
from mochi_tune.data_prep.changes import describe_changes
from mochi_tune.data_prep.prepare import prepare


def lines_of(home, videos):
    config = load_config("my_lora", [*SIZES, f"data.videos={videos}", f"data.cache={home / 'cache'}"])
    return describe_changes(config.data, config.seed, open_cache(home / "cache", buckets_by_source(config.data)))


@pytest.mark.parametrize(
    ("change", "goes_on"), [("new", False), ("gone", False), ("folder", False), ("replaced", True), ("words", True)]
)
def test_that_a_run_cannot_go_on_is_said_of_clips_that_came_or_went_alone(tmp_path, change, goes_on):
    for name in ("videos", "cache"):
        shutil.copytree(prepared() / name, tmp_path / name)
    clip = tmp_path / "videos" / ("new.mp4" if change == "new" else "clip_0.mp4")
    folder = tmp_path / "videos"
    if change == "folder":
        folder = tmp_path / "others"
        clip = folder
        assert not lines_of(tmp_path, folder), "the folder is on another machine"
        folder.mkdir()
        assert not lines_of(tmp_path, folder), "the disk of another machine is mounted there"
        write_video(folder / "other.mp4", 9, width=48, height=32)
    elif change == "gone":
        clip.unlink()
    elif change == "words":
        clip.with_suffix(".txt").write_text("other words")
    else:
        write_video(clip, 9, width=48, height=32, first_number=90)
        clip.with_suffix(".txt").write_text("a red ball rolls slowly over the hill")
    [line] = lines_of(tmp_path, folder)
    assert clip.name in line and "stop, run `mochi-tune prepare` with these settings" in line
    assert line.endswith("train again") == goes_on
    assert (
        "train in another run_dir=DIR; this run continues with other clips only with resume=force" in line
    ) != goes_on


def test_a_video_of_two_sources_is_counted_once(tmp_path):
    folder = add_clip(tmp_path, "a.mp4", "a clip").parent
    add_clip(tmp_path, "b.mp4", "another clip", 8)
    config = config_for(tmp_path, sources=[{"folder": str(folder)}, {"folder": str(folder), "name": "again"}])
    assert prepare(config).kept == 4
    (folder / "a.txt").write_text("other words")
    (folder / "b.mp4").unlink()
    add_clip(tmp_path, "c.mp4", "a third clip", 9)
    cache = open_cache(tmp_path / "cache", buckets_by_source(config.data))
    gone, new, captions = describe_changes(config.data, config.seed, cache)
    assert gone.startswith("1 video of the cache is no longer in the folder (b.mp4)")
    assert new.startswith("1 file has been added") and captions.startswith("captions of 1 video have changed")
