"""`prepare` with several sizes, stills, many clips per video and several folders in one cache."""

import csv
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from helpers_video import frame_number, write_video
from PIL import Image

import mochi_tune
from mochi_tune.config.schema import DataConfig, ModelConfig, RunConfig
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.buckets import Bucket
from mochi_tune.data.cache import Cache, open_cache
from mochi_tune.data_prep import gather
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.prepare import main, prepare
from mochi_tune.errors import ConfigError

TINY = Path(mochi_tune.__file__).parent / "assets" / "tiny"
SIZES = [[7, 32, 48], [13, 32, 48], [7, 48, 32], [1, 32, 48]]


def config_for(folder: Path, **data) -> RunConfig:
    data = {"videos": str(folder / "videos"), "cache": str(folder / "cache"), "buckets": SIZES} | data
    return RunConfig(
        device="cpu", model=ModelConfig(name="tiny", weights=str(TINY), dtype="fp32"), data=DataConfig(**data)
    )


def cache_of(config: RunConfig) -> Cache:
    return open_cache(Path(config.data.cache), buckets_by_source(config.data))


def add(path: Path, num_frames: int, width: int, height: int, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, num_frames, width=width, height=height, **options)
    path.with_suffix(".txt").write_text(f"a clip, {path.stem}")


@pytest.fixture
def mixed(tmp_path):
    """Wide and tall clips of several lengths, a still, and other files."""
    videos = tmp_path / "videos"
    add(videos / "long.mp4", 33, 96, 64)
    add(videos / "phone.mp4", 9, 64, 96, rotation=90)
    add(videos / "screen.mkv", 8, 128, 80)
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, :48] = 255
    Image.fromarray(picture).save(videos / "still.png")
    (videos / "still.txt").write_text("half white")
    (videos / "music.mp3").write_bytes(b"\0" * 100)
    (videos / "alone.txt").write_text("no video has this name")
    return tmp_path


def report_of(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "cache" / "report.csv").open(newline="") as file:
        return {record["clip"]: record for record in csv.DictReader(file)}


def test_each_clip_has_the_size_that_loses_least(mixed, capsys):
    config = config_for(mixed)
    assert main(config) == 0
    cache = cache_of(config)
    assert {row.sample_id: row.bucket for row in cache.rows} == {
        "long.mp4": Bucket(13, 32, 48),
        "phone.mp4": Bucket(7, 48, 32),
        "screen.mkv": Bucket(7, 32, 48),
        "still.png": Bucket(1, 32, 48),
    }
    shapes = [tuple(cache.read(index)["mean"].shape) for index in range(4)]
    assert shapes == [(12, 3, 4, 6), (12, 2, 6, 4), (12, 2, 4, 6), (12, 1, 4, 6)]
    report = report_of(mixed)
    assert {name: record["status"] for name, record in report.items()} == {
        "long.mp4": "kept",
        "phone.mp4": "kept",
        "screen.mkv": "kept",
        "still.png": "kept",
        "music.mp3": "unused",
        "alone.txt": "unused",
    }
    assert report["long.mp4"]["bucket"] == "13 frames of 32x48"
    assert "is not a known video format" in report["music.mp3"]["reason"]
    out = capsys.readouterr().out
    assert "height, width]: 1 in [1, 32, 48]; 1 in [7, 32, 48]; 1 in [7, 48, 32]; 1 in [13, 32, 48]" in out
    assert "0.8 of 1.7 s of footage are not used; data.clips=all cuts 0.7 s of it\n" in out
    assert "not used: 1 file (music.mp3)" in out


def test_all_clips_of_a_video_are_cut_and_what_is_encoded_is_not_encoded_again(mixed):
    assert prepare(config_for(mixed)).clips_encoded == 4
    config = config_for(mixed, clips="all")
    done = prepare(config)
    # The first clip of each is reused; 33 frames are cut into 13, 13 and 7.
    assert (done.kept, done.clips_encoded, done.captions_encoded) == (6, 2, 0)
    cache = cache_of(config)
    rows = {row.sample_id: row for row in cache.rows}
    assert [name for name in rows if name.startswith("long")] == ["long.mp4", "long.mp4@13", "long.mp4@26"]
    assert rows["long.mp4@26"].bucket == Bucket(7, 32, 48) and rows["long.mp4@26"].start == 26
    assert len({row.clip_key for row in cache.rows}) == 6
    assert float(report_of(mixed)["long.mp4@26"]["start_seconds"]) == pytest.approx(26 / 30, abs=1e-3)


def test_a_second_run_opens_no_video(mixed, monkeypatch):
    prepare(config_for(mixed, clips="all"))

    def opened(*_):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(gather.ClipDecoder, "_request", opened)
    assert prepare(config_for(mixed, clips="all")).clips_encoded == 0


@pytest.mark.parametrize(
    "kept", ["", "{", '{"version": 3, "scans": []}', '{"version": 3, "scans": {"HASH": {"width": 1}}}']
)
def test_what_files_held_is_read_again_where_it_was_damaged(mixed, kept):
    config = config_for(mixed)
    prepare(config)
    sha256 = cache_of(config).rows[0].source_sha256
    (mixed / "cache" / ".scans.json").write_text(kept.replace("HASH", sha256))
    done = prepare(config)
    assert (done.kept, done.clips_encoded) == (4, 0)


def test_the_preview_is_frame_for_frame_what_is_encoded(mixed):
    prepare(config_for(mixed))
    # Previews also of clips that are in the cache.
    prepare(config_for(mixed, clips="all", preview=str(mixed / "preview")))
    made = {path.relative_to(mixed / "preview").as_posix() for path in (mixed / "preview").rglob("*.mkv")}
    assert made == {"long.mkv", "long@13.mkv", "long@26.mkv", "phone.mkv", "screen.mkv", "still.mkv"}
    with av.open(str(mixed / "preview" / "long@13.mkv")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec_context.name == "ffv1"
    assert [frame_number(frame) for frame in frames] == list(range(13, 26))
    clip = decode_clip(mixed / "videos" / "long.mp4", Cut(13, 32, 48, start=13))
    assert torch.equal(torch.from_numpy(np.stack(frames)), clip.frames)


def test_previews_of_other_settings_are_written_anew_and_other_files_stay(mixed, capsys):
    add(mixed / "videos" / "long.webm", 9, 96, 64, first_number=50)
    prepare(config_for(mixed, preview=str(mixed / "preview")))
    # Names do not collide; two belong to files of the user.
    video = write_video(mixed / "other.mkv", 3, width=96, height=64).read_bytes()
    foreign = {mixed / "preview" / "long.webm.mkv": b"mine", mixed / "preview" / "phone.mkv": video}
    for path, content in foreign.items():
        path.write_bytes(content)
    config = config_for(mixed, preview=str(mixed / "preview"), buckets=[[7, 48, 32], [1, 32, 48]])
    prepare(config)
    sizes = {}
    told = capsys.readouterr().out
    for path, content in foreign.items():
        assert path.read_bytes() == content
        assert f"no preview was written: {path} exists and is not a preview: move it away\n" in told
    for path in {*(mixed / "preview").iterdir()} - {*foreign}:
        with av.open(str(path)) as container:
            sizes[path.name] = next(container.decode(video=0)).width
    assert sizes == dict.fromkeys(("long.mp4.mkv", "screen.mkv"), 32) | {"still.mkv": 48}


@pytest.mark.parametrize("where", ["videos", "videos/preview", "."])
def test_previews_are_kept_apart_from_videos(mixed, where):
    before = (mixed / "videos" / "screen.mkv").read_bytes()
    with pytest.raises(ConfigError, match="overlaps with the videos in"):
        prepare(config_for(mixed, preview=str(mixed / where)))
    (mixed / "file").touch()
    with pytest.raises(ConfigError, match=rf"data.preview=.*: {mixed / 'file'} is a file: name a folder"):
        prepare(config_for(mixed, preview=str(mixed / "file" / where)))
    assert (mixed / "videos" / "screen.mkv").read_bytes() == before


def test_a_still_beside_clips_of_one_size_is_not_taken_and_told(mixed, capsys):
    config = config_for(mixed, buckets=None, num_frames=7, height=32, width=48)
    assert main(config) == 0
    out = capsys.readouterr().out
    assert "not used: 1 still (still.png): data.buckets=auto or a bucket of one frame uses them\n" in out
    assert "not used: 1 file (music.mp3)\n" in out
    # The still's caption is not an orphan.
    assert "without a video of that name, not used: alone.txt\n" in out and "still.txt" not in report_of(mixed)
    assert "data.buckets=auto uses" in report_of(mixed)["still.png"]["reason"]


def test_a_portrait_clip_that_loses_most_of_its_picture_is_told(mixed, capsys):
    main(config_for(mixed, buckets=None, num_frames=7, height=32, width=48))
    out = capsys.readouterr().out
    assert "more than a third of the picture is lost in 1 clip: phone.mp4 by 56%; data.buckets=auto has a bucket" in out
    assert float(report_of(mixed)["phone.mp4"]["lost_picture"]) == pytest.approx(1 - 4 / 9, abs=0.01)


def test_folders_have_settings_of_their_own(mixed, capsys):
    add(mixed / "more" / "dogs" / "rex.mp4", 20, 96, 64)
    sources = [
        {"folder": str(mixed / "videos"), "caption_prefix": "wide,"},
        {"folder": str(mixed / "more" / "dogs"), "clips": "all", "buckets": [[7, 32, 48]], "repeats": 2},
    ]
    config = config_for(mixed, sources=sources)
    prepare(config)
    rows = cache_of(config).rows
    assert Counter(row.source for row in rows) == {"videos": 4, "dogs": 2}
    assert [row.sample_id for row in rows][:2] == ["dogs/rex.mp4", "dogs/rex.mp4@7"]
    captions = {row.sample_id: row.captions for row in rows}
    assert captions["videos/long.mp4"] == ("wide, a clip, long",) and captions["dogs/rex.mp4"] == ("a clip, rex",)
    assert "dogs/rex.mp4@7" in report_of(mixed)
    assert "an epoch takes the clips 1 x 4 of videos, 2 x 2 of dogs" in capsys.readouterr().out
    weighted = [sources[0] | {"weight": 3}, sources[1] | {"weight": 1, "repeats": 1}]
    main(config_for(mixed, sources=weighted))
    assert "the clips drawn come to 75% from videos (4), 25% from dogs (2)" in capsys.readouterr().out


def test_a_folder_within_another_one_may_be_a_source_too(mixed):
    add(mixed / "videos" / "sub" / "rex.mp4", 20, 96, 64)
    folders = (mixed / "videos", mixed / "videos" / "sub")
    sources = [{"folder": str(folder), "clips": "all"} for folder in folders]
    config = config_for(mixed, sources=sources)
    prepare(config)
    names = [row.sample_id for row in cache_of(config).rows if "rex" in row.sample_id]
    assert names == ["sub/rex.mp4", "sub/rex.mp4@13", "videos/sub/rex.mp4", "videos/sub/rex.mp4@13"]


def test_one_clips_trouble_is_its_own(mixed):
    (mixed / "videos" / "broken.mp4").write_bytes(b"no video at all" * 100)
    (mixed / "videos" / "broken.txt").write_text("broken")
    add(mixed / "videos" / "tiny.mp4", 9, 32, 16)
    done = prepare(config_for(mixed))
    assert (done.kept, done.refused) == (4, 2)
    report = report_of(mixed)
    assert "too small for 48x32" in report["tiny.mp4"]["reason"] and report["broken.mp4"]["status"] == "refused"
