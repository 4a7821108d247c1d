"""Compares the times of pictures with FFmpeg's fps filter, which shares no code with ours."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers_video import copy_from_keyframe, frame_number, numbers_by_fps_filter, write_video

from mochi_tune.data_prep.clips import Cut, choose_frame_rate, cut_clips, decode_clip
from mochi_tune.data_prep.frames import find_seek_time, read_pictures
from mochi_tune.data_prep.probe import read_index, scan_video
from mochi_tune.errors import DataError

CLOSED = {"g": "12", "x264-params": "bframes=3:scenecut=0"}
OPEN = {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}
X265 = {"x265-params": "keyint=12:min-keyint=12:bframes=3:scenecut=0:log-level=none:open-gop="}


def numbers_of(path: Path, **options) -> list[int]:
    """Returns the numbers of all frames of a file."""
    scan = scan_video(path)
    num_frames = scan.num_source_frames if options.get("frame_rate") == "retime" else scan.num_frames
    cut = Cut(num_frames, 64, 64, **options)
    with pytest.raises(DataError, match=f"has {num_frames} frames"):
        decode_clip(path, Cut(num_frames + 1, 64, 64, **options))
    return [frame_number(frame) for frame in decode_clip(path, cut).frames]


@pytest.mark.parametrize("rate", [Fraction(1, 2), 1, 12, 24, 60, 240])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.mov"])
def test_constant_rates(tmp_path, name, rate):
    path = write_video(tmp_path / name, max(6, min(round(rate), 120)), rate=rate)
    numbers = numbers_of(path)
    assert numbers == numbers_by_fps_filter(path)
    assert numbers[:2] == {24: [0, 1], 60: [0, 2], 240: [3, 11]}.get(rate, [0, 0])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.ts"])
def test_variable_rates_gaps_and_late_starts(tmp_path, name):
    times = [Fraction(n, 1000) for n in (2500, 2800, 2833, 2866, 2900, 2904, 2911, 3000, 3700, 3733, 3734, 4000)]
    path = write_video(tmp_path / name, timestamps=times)
    numbers = numbers_of(path)
    assert numbers == numbers_by_fps_filter(path)
    assert numbers[:12] == [0] * 9 + [1, 2, 3]


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", CLOSED),
        ("libx264", OPEN),
        ("libx265", {"x265-params": X265["x265-params"] + "0"}),
        ("libx265", {"x265-params": X265["x265-params"] + "1"}),
        ("mpeg2video", {"g": "12", "bf": "2", "flags": "+cgop", "sc_threshold": "1000000000"}),
        ("mpeg2video", {"g": "12", "bf": "2"}),
        ("libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "deadline": "realtime"}),
        ("libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "8", "arnr-maxframes": "3"}),
    ],
)
@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_groups_that_are_open_or_closed_and_cuts_out_of_them(tmp_path, codec, options, suffix):
    if codec.startswith("libvpx") and suffix != ".mkv":
        suffix = ".webm"
    whole = write_video(tmp_path / f"whole{suffix}", 60, codec=codec, options=options)
    assert numbers_of(whole) == list(range(60))
    cut = copy_from_keyframe(whole, tmp_path / f"cut{suffix}", 2)
    numbers = numbers_of(cut)
    assert numbers == numbers_by_fps_filter(cut)
    # Pictures decoded after the keyframe and shown before it refer to missing pictures.
    assert numbers == list(range(60 - len(numbers), 60)) and 10 < len(numbers) < 50


def test_a_stream_that_is_cut_anywhere_begins_at_its_next_keyframe(tmp_path):
    whole = write_video(tmp_path / "whole.ts", 60, options={"g": "20", "bf": "0"})
    data = whole.read_bytes()
    # Packets of 188 bytes; a recording may begin at any of them.
    (tmp_path / "cut.ts").write_bytes(data[len(data) // 188 // 4 * 188 :])
    numbers = numbers_of(tmp_path / "cut.ts")
    assert numbers in (list(range(20, 60)), list(range(40, 60)))
    assert numbers == numbers_by_fps_filter(tmp_path / "cut.ts")


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}])
def test_a_recording_that_stops_inside_a_picture_ends_before_it(tmp_path, options):
    path, noise = tmp_path / "a.ts", np.random.default_rng(0)
    with av.open(str(path), "w", format="mpegts") as container:
        stream = container.add_stream("libx264", rate=30, options=options)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        for _ in range(12):
            picture = noise.integers(0, 255, (128, 160, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 188 * 188 - 40 * 188])
    assert len(list(read_pictures(path, read_index(path)))) == 11


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.mov", "a.avi", "a.ts"])
def test_frames_that_are_stored_in_another_order(tmp_path, name):
    path = write_video(tmp_path / name, 50, codec="libx264", options={"bf": "4", "g": "20"})
    assert numbers_of(path) == list(range(50))


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libsvtav1"), ("a.mov", "prores_ks"), ("a.mov", "png"), ("a.mov", "qtrle"), ("a.avi", "huffyuv"),
        ("a.avi", "mjpeg"), ("a.mov", "mjpeg"), ("a.avi", "utvideo"), ("a.mkv", "ffv1"), ("a.webm", "libvpx"),
        ("a.mpg", "mpeg2video"), ("a.ts", "libx265"), ("a.m4v", "mpeg4"), ("a.mkv", "libvpx-vp9"),
    ],
)  # fmt: skip
def test_codecs_and_containers(tmp_path, name, codec):
    path = write_video(tmp_path / name, 20, codec=codec)
    assert numbers_of(path) == list(range(20))


def test_dnxhr_and_gif(tmp_path):
    path = write_video(tmp_path / "a.mov", 4, width=256, height=128, codec="dnxhd", options={"profile": "dnxhr_sq"})
    assert [frame_number(frame) for frame in decode_clip(path, Cut(4, 128, 256)).frames] == [0, 1, 2, 3]
    # GIF has times in hundredths of a second.
    path = write_video(tmp_path / "a.gif", 10, rate=10)
    assert numbers_of(path) == [number for number in range(10) for _ in range(3)]


@pytest.mark.parametrize("step_back", [30, 1])
@pytest.mark.parametrize("suffix", [".ts", ".mp4"])
def test_joined_transport_streams_go_on_where_the_first_one_ended(tmp_path, step_back, suffix):
    first = write_video(tmp_path / "1.ts", 30, options={"bf": "2"})
    late = [Fraction(index, 30) + 30 - step_back for index in range(30)]
    second = write_video(tmp_path / "2.ts", timestamps=late, options={"bf": "2"}, first_number=100)
    both = tmp_path / f"both{suffix}"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    assert scan_video(both).has_discontinuity
    assert numbers_of(both) == [*range(30), *range(100, 130)]


def test_a_film_rate_is_resampled_or_played_frame_by_frame(tmp_path):
    path = write_video(tmp_path / "film.mp4", 60, rate=24)
    resampled, retimed = (decode_clip(path, Cut(37, 64, 64, frame_rate=rate)) for rate in ("resample", "retime"))
    assert [frame_number(frame) for frame in resampled.frames[:10]] == [0, 1, 1, 2, 3, 4, 5, 5, 6, 7]
    assert resampled.report["distinct_frames"] == 30 and resampled.report["frame_rate"] == "resample"
    assert [frame_number(frame) for frame in retimed.frames] == list(range(37))
    assert retimed.report["distinct_frames"] == 37 and retimed.report["source_fps"] == 24
    assert numbers_of(path, frame_rate="retime") == list(range(60))
    assert numbers_of(path, frame_rate="retime", start=0) == list(range(60))
    late = decode_clip(path, Cut(7, 64, 64, start=50, frame_rate="retime"))
    assert [frame_number(frame) for frame in late.frames] == list(range(50, 57))


@pytest.mark.parametrize(
    ("rate", "num_frames", "expected"),
    [
        (24, 40, "retime"), (25, 40, "retime"), (Fraction(30000, 1001), 40, "resample"), (30, 40, "resample"),
        (15, 40, "resample"), (60, 40, "resample"), (23, 40, "retime"), (33, 40, "retime"), (34, 40, "resample"),
    ],
)  # fmt: skip
def test_auto_retimes_what_is_near_30_fps_and_not_30(tmp_path, rate, num_frames, expected):
    scan = scan_video(write_video(tmp_path / "a.mkv", num_frames, rate=rate))
    assert choose_frame_rate(scan, "auto") == expected
    assert choose_frame_rate(scan, "resample") == "resample"


def test_auto_resamples_a_variable_rate(tmp_path):
    times = [Fraction(index + index // 5, 30) for index in range(40)]
    scan = scan_video(write_video(tmp_path / "a.mp4", timestamps=times))
    assert 23 < scan.source_fps < 33 and choose_frame_rate(scan, "auto") == "resample"
    assert choose_frame_rate(scan, "retime") == "retime"


@pytest.mark.parametrize("frame_rate", ["resample", "retime"])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", OPEN),
        ("a.mkv", "libx264", CLOSED),
        ("a.mkv", "libx265", {"x265-params": X265["x265-params"] + "1"}),
        ("a.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
        ("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("a.ts", "libx264", OPEN),
        ("a.mp4", "libx264", {"g": "12", "x264-params": "intra-refresh=1:scenecut=0"}),
    ],
)
def test_windows_of_a_long_file_are_those_of_the_whole(tmp_path, name, codec, options, frame_rate):
    path = write_video(tmp_path / name, 200, rate=25, codec=codec, options=options)
    whole = numbers_of(path, frame_rate=frame_rate)
    assert whole[:3] == [0, 1, 2]
    starts = [70, 75, 77, 131, 160]
    cuts = [Cut(9 + index, 64, 64, start=start, frame_rate=frame_rate) for index, start in enumerate(starts)]
    together = list(cut_clips(path, cuts))
    for cut, clip in zip(cuts, together, strict=True):
        assert [frame_number(frame) for frame in clip.frames] == whole[cut.start : cut.start + cut.num_frames]
        alone = decode_clip(path, cut)
        assert alone.frames.equal(clip.frames) and alone.report == clip.report
    assert (find_seek_time(read_index(path), 160) is not None) == name.endswith(("mp4", "mkv", "webm"))


def test_frames_before_time_0(tmp_path):
    times = [Fraction(index - 10, 30) for index in range(40)]
    path = write_video(tmp_path / "a.mp4", timestamps=times, container_options={"avoid_negative_ts": "disabled"})
    # MP4's edit list hides them.
    assert numbers_of(path) == numbers_by_fps_filter(path) == list(range(10, 40))


@pytest.mark.parametrize("frame_rate", ["resample", "retime"])
@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx265"), ("a.webm", "libvpx-vp9")])
def test_decord_reads_plain_files_to_the_same_frames(tmp_path, name, codec, frame_rate):
    path = write_video(tmp_path / name, 120, rate=25, codec=codec, options={"g": "30"})
    cuts = [Cut(20, 64, 64, start=start, frame_rate=frame_rate) for start in (0, 61, 100)]
    for cut in cuts:
        ours, theirs = decode_clip(path, cut), decode_clip(path, replace(cut, decoder="decord"))
        assert (ours.report["decoder"], theirs.report["decoder"]) == ("pyav", "decord")
        assert ours.frames.equal(theirs.frames)
        assert ours.report | {"decoder": ""} == theirs.report | {"decoder": ""}


def test_decord_is_not_asked_for_what_it_reads_wrong(tmp_path):
    turned = write_video(tmp_path / "turned.mp4", 20, rotation=90)
    uneven = write_video(tmp_path / "uneven.mp4", timestamps=[Fraction(n * n, 300) for n in range(20)])
    open_group = copy_from_keyframe(write_video(tmp_path / "a.mkv", 60, options=OPEN), tmp_path / "cut.mkv", 2)
    for path in (turned, uneven, open_group):
        ours, theirs = (decode_clip(path, Cut(10, 64, 64, decoder=decoder)) for decoder in ("auto", "decord"))
        assert ours.frames.equal(theirs.frames) and theirs.report["decoder"] == "pyav", path
