"""`prepare` with clips that are easily misread, and the settings for reading them."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers_prepare import add_clip, config_for, report_of
from helpers_road import SIZES
from helpers_video import copy_from_keyframe, frame_number, numbers_by_fps_filter, write_video
from PIL import Image

from mochi_tune.config.load import load_config
from mochi_tune.data_prep.encode import encode_frames
from mochi_tune.data_prep.prepare import main, prepare
from mochi_tune.errors import ConfigError


def write_odd_clips(folder: Path) -> dict[str, list[int]]:
    """Writes clips that are easily misread; returns the numbers of their first 7 frames at 30 fps, by name."""
    wide, still = {"width": 96, "height": 64}, {"width": 96, "height": 64, "options": {"bf": "2"}}
    folder.mkdir()
    first = write_video(folder.parent / "1.ts", 5, **still)
    second = write_video(folder.parent / "2.ts", 30, first_number=100, **still)
    (folder / "joined.mp4").write_bytes(first.read_bytes() + second.read_bytes())
    write_video(folder / "gap.mp4", timestamps=[Fraction(n, 1000) for n in (0, 167, 200, 233, 267)], **wide)
    x265 = {"x265-params": "keyint=12:min-keyint=12:bframes=3:scenecut=0:log-level=none"}
    x264 = {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
    for name, codec, options in (("hevc", "libx265", x265), ("h264", "libx264", x264)):
        whole = write_video(folder.parent / f"{name}.mkv", 40, codec=codec, **wide | {"options": options})
        copy_from_keyframe(whole, folder / f"{name}.mp4", 1)
    write_video(folder / "slow.webm", 3, rate=1, **wide)
    write_video(folder / "slower.mkv", 3, rate=Fraction(1, 2), **wide)
    write_video(folder / "png.mov", 8, codec="png", **wide)
    write_video(folder / "huffyuv.avi", 8, codec="huffyuv", **wide)
    write_video(folder / "film.mp4", 20, rate=24, **wide)
    write_video(folder / "fast.mp4", 30, rate=60, **wide)
    write_video(folder / "square.mp4", 8, width=48, height=64, pixel_aspect=Fraction(2))
    begins = {"h264": numbers_by_fps_filter(folder / "h264.mp4"), "hevc": numbers_by_fps_filter(folder / "hevc.mp4")}
    return {
        "joined.mp4": [0, 1, 2, 3, 4, 100, 101],
        "gap.mp4": [0, 0, 0, 0, 0, 1, 2],
        "slow.webm": [0] * 7,
        "slower.mkv": [0] * 7,
        "film.mp4": list(range(7)),
        "fast.mp4": list(range(0, 14, 2)),
        "png.mov": list(range(7)),
        "huffyuv.avi": list(range(7)),
        "square.mp4": list(range(7)),
    } | {f"{name}.mp4": begin[:7] for name, begin in begins.items()}


def test_clips_that_are_easily_read_wrong_go_right_through_the_command_line(tmp_path, monkeypatch, capsys):
    expected = write_odd_clips(tmp_path / "videos")
    assert expected["hevc.mp4"][0] == expected["h264.mp4"][0] == 12
    seen = {}

    def encode_seen(encoder, frames, name):
        seen[name] = [frame_number(frame) for frame in frames]
        return encode_frames(encoder, frames, name)

    monkeypatch.setattr("mochi_tune.data_prep.tasks.encode_frames", encode_seen)
    paths = [f"data.videos={tmp_path / 'videos'}", f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    assert main(load_config("my_lora", [*SIZES, *paths, "data.allow_empty_captions=true", "data.frame_rate=auto"])) == 0
    assert seen == expected
    report = report_of(tmp_path)
    assert (report["film.mp4"]["frame_rate"], report["film.mp4"]["source_fps"]) == ("retime", "24.0")
    assert (report["square.mp4"]["pixel_aspect"], report["square.mp4"]["source_width"]) == ("2.0", "96")
    names = "gap.mp4 3 in 7, slow.webm 1 in 7, slower.mkv 1 in 7"
    assert f"clips with repeated frames: 3, of 3 files (pictures in frames: {names})" in capsys.readouterr().out


def test_the_frame_rate_and_hdr_settings_reach_the_clips(tmp_path, capsys):
    add_clip(tmp_path, "film.mp4", None, 20, rate=24)
    add_clip(tmp_path, "hdr.mp4", None, 8, color_transfer=16)
    assert main(config_for(tmp_path, frame_rate="resample")) == 1
    out = capsys.readouterr().out
    assert (
        "clips with repeated frames: 1, of 1 file (pictures in frames: film.mp4 6 in 7)" in out
        and "hdr.mp4: is HDR, PQ" in out
    )
    done = prepare(config_for(tmp_path, frame_rate="resample", hdr="tonemap"))
    assert (done.kept, done.refused) == (2, 0)
    assert report_of(tmp_path)["hdr.mp4"]["hdr"].startswith("PQ")


def test_of_two_files_of_the_same_damaged_bytes_each_is_named(tmp_path):
    add_clip(tmp_path, "whole.mp4", None)
    data = bytearray(add_clip(tmp_path, "holiday.mp4", None, 60).read_bytes())
    start = data.index(b"mdat") + 200
    data[start : start + 600] = bytes(600)
    for name in ("holiday.mp4", "party.mp4"):
        (tmp_path / "videos" / name).write_bytes(data)
    prepare(config_for(tmp_path))
    reasons = {name: record["reason"] for name, record in report_of(tmp_path).items() if record["reason"]}
    assert {"holiday.mp4", "party.mp4"} <= reasons.keys()
    assert all(f"/{name}: " in reasons[name] for name in ("holiday.mp4", "party.mp4")), reasons


def test_a_still_of_floats_is_refused_and_a_cache_among_the_videos_too(tmp_path):
    add_clip(tmp_path, "whole.mp4", None)
    Image.fromarray(np.full((72, 96), 0.5, np.float32)).save(tmp_path / "videos" / "float.tif")
    prepare(config_for(tmp_path, buckets=[[7, 32, 48], [1, 32, 48]]))
    assert "holds 32-bit floats" in report_of(tmp_path)["float.tif"]["reason"]
    with pytest.raises(ConfigError, match="is the folder of the videos"):
        prepare(config_for(tmp_path, cache=str(tmp_path / "videos")))
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == ["float.tif", "whole.mp4"]
