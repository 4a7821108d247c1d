import errno
import multiprocessing
import os
import signal
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from helpers_video import frame_number, is_upright, paint_frame, write_bad_video, write_video
from PIL import Image

from mochi_tune.data_prep import clips
from mochi_tune.data_prep.clips import ClipDecoder, ClipTransform, DecodedClip, decode_clip, find_videos
from mochi_tune.errors import DataError

CONTAINERS = ["mp4", "mov", "m4v", "mkv", "webm", "avi"]


def _numbers(clip: DecodedClip) -> list[int]:
    return [frame_number(frame) for frame in clip.frames]


def _error(path: Path, transform: ClipTransform | None = None) -> str:
    with pytest.raises(DataError) as info:
        decode_clip(path, transform or ClipTransform(7, 64, 64))
    message = str(info.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


def _decord_frames(path: Path, num_frames: int) -> torch.Tensor:
    import av  # noqa: F401
    import decord

    reader = decord.VideoReader(str(path))
    return torch.stack([torch.from_numpy(reader.next().asnumpy()) for _ in range(num_frames)])


def _nearest(timestamps, num_frames: int) -> list[int]:
    targets = np.arange(num_frames)[:, None] / 30
    return np.abs(np.asarray(timestamps, float) - targets).argmin(1).tolist()


# Finding


def test_videos_are_found_below_the_folder_whatever_the_case_and_sorted(tmp_path):
    names = ["b.MP4", "a.webm", "sub/deep/c.Mov", "sub/d.mkv", "e.avi", "f.M4V"]
    for name in [*names, "a.txt", "._b.mp4", "metadata.csv", "g.gif"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.mp4").mkdir()
    assert find_videos(tmp_path) == sorted(tmp_path / name for name in names)


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
    clip = decode_clip(exact, ClipTransform(37, 64, 64))
    assert _numbers(clip) == list(range(37))
    assert clip.frames.shape == (37, 64, 64, 3) and clip.frames.dtype == torch.uint8
    assert clip.report["source_frames"] == 37
    assert clip.report["source_seconds"] == pytest.approx(37 / 30, abs=2e-3)
    short = write_video(tmp_path / f"short.{container}", 36)
    assert "have 36 frames at 30 fps, need 37" in _error(short, ClipTransform(37, 64, 64))


@pytest.mark.parametrize("rate", [12, 15, 24, Fraction(24000, 1001), 25, Fraction(30000, 1001), 48, 60, 120])
@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_other_rates_are_resampled_to_the_nearest_frame(tmp_path, rate, container):
    path = write_video(tmp_path / f"clip.{container}", 2 * round(rate), rate=rate)
    numbers = _numbers(decode_clip(path, ClipTransform(55, 64, 64)))
    times = np.asarray(numbers) / float(rate)
    half_period = max(1 / float(rate), 1 / 30) / 2
    # Matroska rounds to the millisecond.
    assert np.abs(times - np.arange(55) / 30).max() <= half_period + 1e-3
    assert numbers[0] == 0 and sorted(numbers) == numbers


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_a_variable_frame_rate_keeps_its_speed(tmp_path, container):
    steps = np.random.default_rng(0).choice([8, 17, 33, 42, 71], 60)
    timestamps = [2.5, *(2.5 + np.cumsum(steps) / 1000)]
    path = write_video(tmp_path / f"clip.{container}", timestamps=[Fraction(round(t * 1000), 1000) for t in timestamps])
    clip = decode_clip(path, ClipTransform(61, 64, 64))
    assert _numbers(clip) == _nearest(np.asarray(timestamps) - 2.5, 61)
    assert clip.report["start_seconds"] == 2.5


@pytest.mark.parametrize(
    ("rate", "num_frames", "have"), [(60, 60, 30), (60, 59, 30), (60, 58, 29), (24, 24, 30), (15, 15, 29)]
)
def test_the_count_that_is_refused_is_the_count_at_30_fps(tmp_path, rate, num_frames, have):
    path = write_video(tmp_path / "clip.mp4", num_frames, rate=rate)
    assert len(decode_clip(path, ClipTransform(have, 64, 64)).frames) == have
    assert f"have {have} frames at 30 fps, need 61" in _error(path, ClipTransform(61, 64, 64))


def test_a_single_frame_is_a_clip_of_one(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 1)
    assert _numbers(decode_clip(path, ClipTransform(1, 64, 64))) == [0]
    assert "have 1 frames" in _error(path)


def test_a_clip_without_a_frame_rate_tag_decodes(tmp_path):
    path = write_video(tmp_path / "clip.mkv", 19)
    data = bytearray(path.read_bytes())
    # Matroska's DefaultDuration becomes a Void element of the same length.
    start = data.find(b"\x23\xe3\x83")
    length = 4 + (data[start + 3] & 0x7F)
    data[start : start + 2] = bytes([0xEC, 0x80 | (length - 2)])
    path.write_bytes(data)
    assert _numbers(decode_clip(path, ClipTransform(19, 64, 64))) == list(range(19))


# Upright


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "webm"])
def test_rotated_clips_come_out_upright(tmp_path, container, rotation):
    path = write_video(tmp_path / f"clip.{container}", 7, width=96, height=64, rotation=rotation)
    clip = decode_clip(path, ClipTransform(7, 64, 96))
    assert _numbers(clip) == list(range(7))
    assert all(is_upright(frame) for frame in clip.frames)
    painted = np.stack([paint_frame(number, 96, 64) for number in range(7)]).astype(float)
    assert np.abs(clip.frames.numpy() - painted).mean() < 12
    report = clip.report
    assert (report["source_width"], report["source_height"], report["rotation"]) == (96, 64, rotation)


def test_narrow_rows_are_read_without_their_padding(tmp_path):
    for width in (16, 24, 48, 72):
        path = write_video(tmp_path / f"{width}.mp4", 2, width=width, height=32)
        clip = decode_clip(path, ClipTransform(1, 32, width))
        assert np.abs(clip.frames[0].numpy() - paint_frame(0, width, 32).astype(float)).mean() < 12


# Size


def test_a_clip_of_the_same_size_passes_bit_for_bit(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 7, width=96, height=64)
    clip = decode_clip(path, ClipTransform(7, 64, 96))
    assert torch.equal(clip.frames, _decord_frames(path, 7))
    assert clip.report["crop"] == [0, 0, 96, 64] and clip.report["scale"] == 1


@pytest.mark.parametrize("chunk_bytes", [1, 2**27])
@pytest.mark.parametrize(
    ("width", "height", "resized", "crop"),
    [
        (192, 128, (144, 96), [32.0, 0.0, 128.0, 128.0]),
        (200, 110, (175, 96), [44.57, 0.0, 109.71, 110.0]),
        (96, 300, (96, 300), [0.0, 102.0, 96.0, 96.0]),
        (160, 310, (96, 186), [0.0, 75.0, 160.0, 160.0]),
    ],
)
def test_a_larger_clip_is_scaled_to_cover_and_cut_at_the_centre(
    tmp_path, monkeypatch, width, height, resized, crop, chunk_bytes
):
    monkeypatch.setattr(clips, "CHUNK_BYTES", chunk_bytes)
    path = write_video(tmp_path / "clip.mp4", 3, width=width, height=height, rate=15)
    clip = decode_clip(path, ClipTransform(5, 96, 96))
    left, top = (resized[0] - 96) // 2, (resized[1] - 96) // 2
    # Pillow's bicubic filter is antialiased too.
    planes = _decord_frames(path, 3)[[0, 0, 1, 1, 2]].permute(0, 3, 1, 2).reshape(-1, height, width).float().numpy()
    scaled = np.stack([Image.fromarray(plane).resize(resized, Image.Resampling.BICUBIC) for plane in planes])
    expected = scaled.reshape(5, 3, *resized[::-1]).transpose(0, 2, 3, 1).round().clip(0, 255)
    difference = clip.frames.numpy() - expected[:, top : top + 96, left : left + 96]
    # A sum that ends near one half may be rounded either way.
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.01
    assert clip.report["crop"] == pytest.approx(crop, abs=0.01)
    assert clip.report["scale"] == pytest.approx(max(96 / width, 96 / height), abs=1e-6)


def test_a_smaller_clip_is_refused_unless_it_may_be_upscaled(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 7, width=96, height=64)
    message = _error(path, ClipTransform(7, 64, 112))
    for words in ("96x64", "112x64", "data.height", "data.width", "data.allow_upscale=true"):
        assert words in message
    clip = decode_clip(path, ClipTransform(7, 64, 112, allow_upscale=True))
    assert clip.frames.shape == (7, 64, 112, 3)
    assert clip.report["scale"] == pytest.approx(112 / 96, abs=1e-6)


# The child process


def _child() -> multiprocessing.Process:
    (child,) = [child for child in multiprocessing.active_children() if child.name == "clip-decoder"]
    return child


def test_the_child_gives_the_same_clips_and_errors_and_keeps_quiet_and_slim(tmp_path, capfd):
    transform = ClipTransform(85, 96, 96)
    good = write_video(tmp_path / "good.mp4", 90, width=128, height=112)
    unknown = write_video(tmp_path / "unknown.mkv", 90, codec="libsvtav1")
    damaged = write_bad_video(tmp_path, "damaged")
    errors = {path: _error(path, transform) for path in (unknown, damaged)}
    expected = decode_clip(good, transform)
    capfd.readouterr()
    with ClipDecoder(transform, timeout_seconds=600) as decoder:
        paths = [good, unknown, good, damaged, good]
        results = list(decoder.decode_all(paths))
        assert capfd.readouterr().err == ""
        assert [path for path, _ in results] == paths
        for path, result in results:
            if path == good:
                assert torch.equal(result.frames, expected.frames) and result.report == expected.report
            else:
                assert isinstance(result, DataError) and str(result) == errors[path]
        with pytest.raises(DataError):
            decoder.decode(unknown)
        child = _child()
        sizes = []
        for _ in range(3):
            for _ in range(25):
                decoder.decode(good)
            sizes.append(int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        # One clip kept by mistake is 2 MB; what the allocator holds goes up and down by some 40 MB.
        assert sizes[2] - sizes[0] < 90 * 2**20
    assert not child.is_alive()


def test_a_clip_that_hangs_is_refused_and_the_next_one_decodes(tmp_path):
    good = write_video(tmp_path / "good.mp4", 37, width=96, height=96)
    hanging = tmp_path / "hanging.mp4"
    os.mkfifo(hanging)
    # Little time for what hangs, and all that a busy machine may need for what does not.
    with ClipDecoder(ClipTransform(37, 96, 96), timeout_seconds=600) as decoder:
        assert _numbers(decoder.decode(good)) == list(range(37))
        first = _child()
        results = decoder.decode_all([hanging, good])
        decoder.timeout_seconds = 1.5
        assert str(next(results)[1]).startswith(f"{hanging}: was not decoded within 1.5 s")
        decoder.timeout_seconds = 600
        assert _numbers(next(results)[1]) == list(range(37))
        assert not first.is_alive()
        # Stopped halfway through handing over a clip, which is larger than the socket's buffer.
        ahead = decoder.decode_all([good, good])
        next(ahead)
        time.sleep(0.5)
        os.kill(_child().pid, signal.SIGSTOP)
        # While it finds room in the socket's buffer, it goes on with what it is at.
        while psutil.Process(_child().pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        decoder.timeout_seconds = 1.5
        _, result = next(ahead)
        assert str(result).startswith(f"{good}: was not decoded within 1.5 s")


def _kill_when_it_reads(pid: int, fifo: Path) -> None:
    """Kills a process that has opened a pipe to read from it, while the pipe is open."""
    with open(fifo, "wb"):
        os.kill(pid, signal.SIGKILL)


def test_a_clip_that_kills_the_child_is_refused_and_the_next_one_decodes(tmp_path):
    good = write_video(tmp_path / "good.mp4", 7)
    hanging = tmp_path / "hanging.mp4"
    os.mkfifo(hanging)
    with ClipDecoder(ClipTransform(7, 64, 64), timeout_seconds=600) as decoder:
        decoder.decode(good)
        threading.Thread(target=_kill_when_it_reads, args=(_child().pid, hanging), daemon=True).start()
        with pytest.raises(DataError, match=f"^{hanging}: the decoder died on it, killed by SIGKILL"):
            decoder.decode(hanging)
        assert _numbers(decoder.decode(good)) == list(range(7))
        # Killed between two clips, the next one is not to blame.
        child = _child()
        child.kill()
        child.join()
        assert _numbers(decoder.decode(good)) == list(range(7))


def _is_being_read(fifo: Path) -> bool:
    try:
        os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
    except OSError as error:
        assert error.errno == errno.ENXIO
        return False
    return True


def test_exactly_one_clip_is_decoded_ahead_and_waits_for_a_late_caller(tmp_path):
    good = [write_video(tmp_path / f"good{number}.mp4", 7, first_number=number) for number in range(2)]
    fifos = [tmp_path / "second.mp4", tmp_path / "third.mp4"]
    for fifo in fifos:
        os.mkfifo(fifo)
    with ClipDecoder(ClipTransform(7, 64, 64), timeout_seconds=600) as decoder:
        ahead = decoder.decode_all([good[0], *fifos])
        next(ahead)
        # Only a clip that the child has opened can be opened for writing; doing so also ends it.
        deadline = time.monotonic() + 600
        while not _is_being_read(fifos[0]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
        assert not _is_being_read(fifos[1])
        ahead.close()
        assert multiprocessing.active_children() == []
        late = decoder.decode_all(good)
        next(late)
        # The second one is there, and was asked for longer ago than a clip may take.
        decoder._child.socket.recv(1, socket.MSG_PEEK | socket.MSG_WAITALL)
        decoder._asked_at -= 1000
        path, clip = next(late)
        assert path == good[1] and _numbers(clip) == list(range(1, 8))
