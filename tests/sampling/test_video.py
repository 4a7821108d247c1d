import os
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from mochi_tune.sampling import video
from mochi_tune.sampling.formats import PNG
from mochi_tune.sampling.grid_video import frames_of
from mochi_tune.sampling.video import read_frames, write_video


def moving_frames(count):
    frames = torch.full((count, 32, 48, 3), 40, dtype=torch.uint8)
    for i in range(count):
        frames[i, 8:24, 2 * i : 2 * i + 12] = torch.tensor([200, 60, 30], dtype=torch.uint8)
    return frames


def test_frames_come_back_in_order_and_near(tmp_path):
    frames = moving_frames(13)
    assert write_video(tmp_path / "x.mp4", frames.split([1, 6, 6])) == tmp_path / "x.mp4"
    back = torch.stack([torch.from_numpy(np.array(image)) for image in read_frames(tmp_path / "x.mp4")])
    assert back.shape == frames.shape
    assert (back.float() - frames.float()).abs().mean() < 5
    assert [path.name for path in tmp_path.iterdir()] == ["x.mp4"]


def test_the_same_frames_are_the_same_file(tmp_path):
    frames = torch.randn(7, 32, 48, 3, generator=torch.Generator().manual_seed(0)).mul(60).add(128).clamp(0, 255).byte()
    frames = (frames.float().cumsum(2) / torch.arange(1, 49).view(-1, 1)).byte()
    for i in range(40):
        write_video(tmp_path / f"{i}.mp4", [frames])
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize("name", ["x.mp4", "x.webp", "x"])
def test_a_video_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch, name):
    synced, replace, fsync = set(), Path.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))

    def check(temporary, path):
        assert {each.stat().st_ino for each in (temporary, *temporary.glob("*"))} <= synced
        return replace(temporary, path)

    monkeypatch.setattr(Path, "replace", check)
    encoding = None if name != "x" else PNG
    assert write_video(tmp_path / name, [moving_frames(2)], encoding=encoding).exists() and synced


def test_a_single_frame_is_a_video(tmp_path):
    write_video(tmp_path / "x.mp4", [moving_frames(1)])
    assert len(read_frames(tmp_path / "x.mp4")) == 1


def test_a_changed_scheduling_is_restored():
    before = os.sched_getscheduler(0)
    with video.keep_scheduling():
        # Needs no privilege, unlike the real-time scheduling that SVT-AV1 chooses.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    assert os.sched_getscheduler(0) == before


def test_a_failed_write_leaves_no_video(tmp_path):
    def broken():
        yield moving_frames(2)
        raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        write_video(tmp_path / "x.mp4", broken())
    assert not list(tmp_path.iterdir())


def test_a_chunk_is_encoded_while_the_next_one_is_made(tmp_path, monkeypatch):
    is_asked, encode = threading.Event(), video._encode_chunk

    def encode_later(container, stream, chunk, start):
        assert start > 0 or is_asked.wait(30), "the next chunk was not requested"
        encode(container, stream, chunk, start)

    def chunks():
        yield moving_frames(2)
        is_asked.set()
        yield moving_frames(3)

    monkeypatch.setattr(video, "_encode_chunk", encode_later)
    write_video(tmp_path / "x.mp4", chunks())
    assert len(read_frames(tmp_path / "x.mp4")) == 5


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_failure_in_the_thread_is_raised(tmp_path, monkeypatch, num_chunks):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video, "_encode_chunk", fail)
    with pytest.raises(OSError, match=r"No space left on device: .*x\.mp4"):
        write_video(tmp_path / "x.mp4", [moving_frames(1)] * num_chunks)
    assert not list(tmp_path.iterdir())


def test_a_video_whose_name_exists_gets_a_new_name(tmp_path):
    written = [write_video(tmp_path / "x.mp4", [moving_frames(n)], may_replace=False) for n in (1, 2, 3)]
    assert [path.name for path in written] == ["x.mp4", "x_2.mp4", "x_3.mp4"]
    assert [len(read_frames(path)) for path in written] == [1, 2, 3] and len(list(tmp_path.iterdir())) == 3
    write_video(written[0], [moving_frames(4)])
    assert len(read_frames(written[0])) == 4


def test_a_relative_path_with_a_colon_is_no_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("10:30").mkdir()
    path = write_video(Path("10:30/x.mp4"), [moving_frames(2)])
    assert len(read_frames(path)) == len(list(frames_of(path))) == 2


@pytest.mark.parametrize("size", [(32, 48), (480, 848), (720, 1280)])
def test_the_colours_are_tagged_and_what_the_tags_say_is_the_frame(tmp_path, size):
    height, width = size
    y, x = np.mgrid[0:height, 0:width] / max(width, 400)
    waves = [128 + 100 * np.sin(4 * x), 128 + 100 * np.cos(5 * y + 1), 128 + 100 * np.sin(3 * x + 3 * y + 2)]
    frames = torch.from_numpy(np.stack(waves, -1).astype(np.uint8))[None].repeat(3, 1, 1, 1)
    frames[:, : height // 4, : width // 4] = torch.tensor([220, 20, 30], dtype=torch.uint8)
    write_video(tmp_path / "x.mp4", [frames])
    # The sample entry has a "colr" box: nclx, primaries 1, transfer 1, matrix 1, limited range.
    assert b"colrnclx\0\x01\0\x01\0\x01\0" in (tmp_path / "x.mp4").read_bytes()
    with av.open(str(tmp_path / "x.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc) == (1, 1, 1, 1)
    luma, blue, red = (
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    )
    # Source: ITU-R BT.709-6, section 3, for 8 bits.
    luma = (luma[::2, ::2] + luma[1::2, ::2] + luma[::2, 1::2] + luma[1::2, 1::2]) / 4
    luma, blue, red = (luma - 16) / 219, (blue - 128) / 224, (red - 128) / 224
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    shown = np.stack([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], -1) * 255
    original = frames[0].double().unfold(0, 2, 2).unfold(1, 2, 2).mean((-1, -2)).numpy()
    # Without the border of the red corner, where subsampled chroma mixes colours.
    inner = np.ones(shown.shape[:2], bool)
    inner[: height // 8 + 4, : width // 8 + 4] = False
    inner[: height // 8 - 4, : width // 8 - 4] = True
    inner[:2], inner[:, :2], inner[-2:], inner[:, -2:] = False, False, False, False
    difference = np.abs(shown - original)[inner]
    # The tolerance covers rounding of three samples and compression; a wrong matrix causes errors of 40.
    assert np.quantile(difference, 0.95) <= 2 and difference.max() <= 4
    assert np.abs(shown[inner].mean(0) - original[inner].mean(0)).max() < 0.5
