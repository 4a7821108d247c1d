import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_video import frame_number, is_upright, paint_frame, write_video
from PIL import Image

from mochi_tune.data_prep.clips import Cut, DecodedClip, _Fit, _resize_and_crop, _takers, _Window, decode_clip
from mochi_tune.data_prep.finding import find_unused, find_videos
from mochi_tune.data_prep.timeline import Picture, Span
from mochi_tune.errors import DataError

CONTAINERS = ["mp4", "mov", "m4v", "mkv", "webm", "avi"]


def _numbers(clip: DecodedClip) -> list[int]:
    return [frame_number(frame) for frame in clip.frames]


def _error(path: Path, transform: Cut | None = None) -> str:
    with pytest.raises(DataError) as info:
        decode_clip(path, transform or Cut(7, 64, 64))
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def _decord_frames(path: Path, num_frames: int) -> torch.Tensor:
    import av  # noqa: F401
    import decord

    reader = decord.VideoReader(str(path))
    return torch.stack([torch.from_numpy(reader.next().asnumpy()) for _ in range(num_frames)])


def _shown(timestamps, num_frames: int) -> list[int]:
    """Returns for each k/30 s the latest picture that has begun, or begins within half of 1/30 s."""
    targets = (np.arange(num_frames)[:, None] + 0.5) / 30
    return ((np.asarray(timestamps, float) < targets - 1e-9).sum(1) - 1).tolist()


# Finding


def test_videos_are_found_below_the_folder_whatever_the_case_and_sorted(tmp_path):
    names = ["b.MP4", "a.webm", "sub/deep/c.Mov", "sub/d.mkv", "e.avi", "f.M4V", "g.gif", "h.ts", "i.mpg"]
    others = dict.fromkeys(("a.mp3", "sub/b.zip", "README"), "is not a known video format")
    others["c.jpg"] = "is a still picture, which data.buckets=auto uses"
    for name in [*names, *others, "a.txt", "sub/A.TXT", "._b.mp4", "metadata.csv"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert find_videos(tmp_path) == sorted(tmp_path / name for name in names)
    assert find_unused(tmp_path, find_videos(tmp_path)) == {
        tmp_path / name: f"{tmp_path / name}: {why}" for name, why in others.items()
    }


def test_a_missing_folder_and_one_without_videos_are_errors(tmp_path):
    with pytest.raises(DataError, match=r"^data\.videos=\S+/none does not exist: .*"):
        find_videos(tmp_path / "none")
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(DataError, match=r"^data\.videos=\S+/clip\.mp4 is not a folder: .*"):
        find_videos(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").unlink()
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match=r"^data\.videos=\S+ holds no video: .*\.mp4"):
        find_videos(tmp_path)


# Timing


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_30_fps_clip_needs_exactly_its_frames(tmp_path, container):
    exact = write_video(tmp_path / f"exact.{container}", 37)
    clip = decode_clip(exact, Cut(37, 64, 64))
    assert _numbers(clip) == list(range(37))
    assert clip.frames.shape == (37, 64, 64, 3) and clip.frames.dtype == torch.uint8
    assert clip.report["source_frames"] == 37
    assert clip.report["source_seconds"] == pytest.approx(37 / 30, abs=2e-3)
    short = write_video(tmp_path / f"short.{container}", 36)
    assert "has 36 frames at 30 fps, needs 37" in _error(short, Cut(37, 64, 64))


@pytest.mark.parametrize("rate", [12, 15, 24, Fraction(24000, 1001), 25, Fraction(30000, 1001), 48, 60, 120])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_other_rates_are_resampled_to_what_is_on_screen(tmp_path, rate, container):
    path = write_video(tmp_path / f"clip.{container}", 2 * round(rate), rate=rate)
    times = [index / Fraction(rate) for index in range(2 * round(rate))]
    if container == "mkv":
        # Matroska rounds to the millisecond.
        times = [Fraction(math.floor(time * 1000 + Fraction(1, 2)), 1000) for time in times]
    assert _numbers(decode_clip(path, Cut(55, 64, 64))) == _shown(times, 55)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_variable_frame_rate_keeps_its_speed(tmp_path, container):
    steps = np.random.default_rng(0).choice([8, 17, 33, 42, 71], 60)
    timestamps = [2.5, *(2.5 + np.cumsum(steps) / 1000)]
    path = write_video(tmp_path / f"clip.{container}", timestamps=[Fraction(round(t * 1000), 1000) for t in timestamps])
    clip = decode_clip(path, Cut(61, 64, 64))
    assert _numbers(clip) == _shown(np.asarray(timestamps) - 2.5, 61)
    assert clip.report["start_seconds"] == 2.5


@pytest.mark.parametrize(
    ("rate", "num_frames", "have"), [(60, 60, 30), (60, 59, 30), (60, 58, 29), (24, 24, 30), (15, 15, 30)]
)
def test_the_count_that_is_refused_is_the_count_at_30_fps(tmp_path, rate, num_frames, have):
    path = write_video(tmp_path / "clip.mp4", num_frames, rate=rate)
    assert len(decode_clip(path, Cut(have, 64, 64)).frames) == have
    assert f"has {have} frames at 30 fps, needs 61" in _error(path, Cut(61, 64, 64))


def test_a_single_frame_is_a_clip_of_one(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 1)
    assert _numbers(decode_clip(path, Cut(1, 64, 64))) == [0]
    assert "has 1 frames" in _error(path)


def test_a_picture_of_a_long_film_looks_at_no_clip_that_begins_later():
    fit = _Fit(1.0, 64, 64, 0, 0, 64, 64)
    starts = iter([0, 2, 5, 6, 7, 8])
    # One of them is refused.
    windows = (_Window(Cut(4, 64, 64, start), fit) if start != 6 else DataError("") for start in starts)
    picture = Picture(Fraction(0), Fraction(1, 30), np.zeros((64, 64, 3), np.uint8))
    assert [window.cut.start for window in _takers(windows, Span(picture, 5, 6))] == [2, 5]
    assert list(starts) == [8]


def test_a_clip_without_a_frame_rate_tag_decodes(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 19)
    data = bytearray(path.read_bytes())
    # Matroska's DefaultDuration becomes a Void element of the same length.
    start = data.find(b"\x23\xe3\x83")
    length = 4 + (data[start + 3] & 0x7F)
    data[start : start + 2] = bytes([0xEC, 0x80 | (length - 2)])
    path.write_bytes(data)
    assert _numbers(decode_clip(path, Cut(19, 64, 64))) == list(range(19))


# Upright


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "webm"])
def test_rotated_clips_come_out_upright(tmp_path, container, rotation):
    path = write_video(tmp_path / f"clip.{container}", 7, width=96, height=64, rotation=rotation)
    clip = decode_clip(path, Cut(7, 64, 96))
    assert _numbers(clip) == list(range(7))
    assert all(is_upright(frame) for frame in clip.frames)
    painted = np.stack([paint_frame(number, 96, 64) for number in range(7)]).astype(float)
    assert np.abs(clip.frames.numpy() - painted).mean() < 12
    report = clip.report
    assert (report["source_width"], report["source_height"], report["rotation"]) == (96, 64, rotation)


def test_narrow_rows_are_read_without_their_padding(tmp_path):
    for width in (16, 24, 48, 72):
        path = write_video(tmp_path / f"{width}.mp4", 2, width=width, height=32)
        clip = decode_clip(path, Cut(1, 32, width))
        assert np.abs(clip.frames[0].numpy() - paint_frame(0, width, 32).astype(float)).mean() < 12


# Size


def test_a_clip_of_the_same_size_passes_bit_for_bit(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 7, width=96, height=64)
    clip = decode_clip(path, Cut(7, 64, 96))
    assert torch.equal(clip.frames, _decord_frames(path, 7))
    assert clip.report["crop"] == [0, 0, 96, 64] and clip.report["scale"] == 1


@pytest.mark.parametrize(
    ("width", "height", "resized", "crop"),
    [
        (192, 128, (144, 96), [32.0, 0.0, 128.0, 128.0]),
        (200, 110, (175, 96), [44.57, 0.0, 109.71, 110.0]),
        (96, 300, (96, 300), [0.0, 102.0, 96.0, 96.0]),
        (160, 310, (96, 186), [0.0, 75.0, 160.0, 160.0]),
    ],
)
def test_a_larger_clip_is_scaled_to_cover_and_cut_at_the_centre(tmp_path, width, height, resized, crop):
    path = write_video(tmp_path / "clip.mp4", 3, width=width, height=height, rate=15)
    clip = decode_clip(path, Cut(5, 96, 96))
    left, top = (resized[0] - 96) // 2, (resized[1] - 96) // 2
    # Pillow's bicubic filter is antialiased too, and uses integers.
    pictures = [Image.fromarray(picture.numpy()) for picture in _decord_frames(path, 3)[[0, 0, 1, 1, 2]]]
    expected = np.stack([np.asarray(p.resize(resized, Image.Resampling.BICUBIC), np.float32) for p in pictures])
    difference = clip.frames.numpy() - expected[:, top : top + 96, left : left + 96]
    # Sums near one half may be rounded up or down.
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    assert clip.report["crop"] == pytest.approx(crop, abs=0.01)
    assert clip.report["scale"] == pytest.approx(max(96 / width, 96 / height), abs=1e-6)


def test_scaling_in_integers_is_scaling_in_fp32_rounded():
    y, x = np.mgrid[0:720, 0:1280]
    smooth = np.stack([128 + 90 * np.sin(x / 9 + y / 23), 128 + 90 * np.cos(y / 7), 128 + 90 * np.sin(x / 20)], -1)
    image = torch.from_numpy(smooth.astype(np.uint8))
    ours = _resize_and_crop(image, _Fit(2 / 3, 480, 853, 0, 2, 480, 848)).float()
    exact = torch.nn.functional.interpolate(
        image.permute(2, 0, 1)[None].float(), (480, 853), mode="bicubic", antialias=True
    )[0].permute(1, 2, 0)[:, 2:850]
    # Half for each of the two roundings, across and down.
    assert (ours - exact).abs().max() <= 1.1 and (ours - exact).abs().mean() < 0.4


def test_a_smaller_clip_is_refused_unless_it_may_be_upscaled(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 7, width=96, height=64)
    message = _error(path, Cut(7, 64, 112))
    for words in ("96x64", "112x64", "data.height", "data.width", "data.allow_upscale=true"):
        assert words in message
    clip = decode_clip(path, Cut(7, 64, 112, allow_upscale=True))
    assert clip.frames.shape == (7, 64, 112, 3)
    assert clip.report["scale"] == pytest.approx(112 / 96, abs=1e-6)
