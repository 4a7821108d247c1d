"""Pictures are upright, with square pixels and deinterlaced; oversized ones are refused before memory runs out."""

import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_video import (
    frame_number,
    is_upright,
    paint_frame,
    write_interlaced,
    write_video,
)
from PIL import Image

from mochi_tune.data_prep.clips import Cut, cut_clips, decode_clip
from mochi_tune.data_prep.probe import scan_video
from mochi_tune.errors import DataError


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_a_mirrored_picture_is_shown_mirrored(tmp_path, rotation):
    path = write_video(tmp_path / "a.mp4", 7, width=96, height=64, rotation=rotation, mirrored=True)
    scan = scan_video(path)
    assert (scan.width, scan.height, scan.is_mirrored) == (96, 64, True)
    clip = decode_clip(path, Cut(7, 64, 96))
    flipped = clip.frames.flip(2)
    assert [frame_number(frame) for frame in flipped] == list(range(7)) and all(map(is_upright, flipped))
    assert clip.report["is_mirrored"]


@pytest.mark.parametrize(
    ("aspect", "rotation", "width"), [(Fraction(2), 0, 192), (Fraction(2, 3), 0, 64), (Fraction(4, 3), 180, 128)]
)
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_pixels_become_square(tmp_path, name, aspect, rotation, width):
    path = write_video(tmp_path / name, 7, width=96, height=64, rotation=rotation, pixel_aspect=aspect)
    scan = scan_video(path)
    assert (scan.width, scan.height) == (width, 64) and scan.pixel_aspect == pytest.approx(float(aspect))
    clip = decode_clip(path, Cut(7, 64, width))
    assert [frame_number(frame) for frame in clip.frames] == list(range(7)) and all(map(is_upright, clip.frames))
    report = clip.report
    assert (report["source_width"], report["source_height"], report["crop"]) == (width, 64, [0, 0, width, 64])
    painted = Image.fromarray(paint_frame(5, 96, 64)).resize((width, 64), Image.Resampling.BICUBIC)
    assert np.abs(clip.frames[5].numpy() - np.asarray(painted, float)).mean() < 12


def test_a_turned_picture_has_its_pixels_turned_too(tmp_path):
    # Stored 64x96 with pixels twice as wide as high: shown 128x96 and turned, 96x128.
    path = write_video(tmp_path / "a.mp4", 7, width=96, height=64, rotation=90, pixel_aspect=Fraction(2))
    assert (scan_video(path).width, scan_video(path).height) == (96, 128)
    clip = decode_clip(path, Cut(7, 128, 96))
    assert [frame_number(frame) for frame in clip.frames] == list(range(7)) and all(map(is_upright, clip.frames))


@pytest.mark.parametrize("top_first", [True, False])
def test_interlaced_pictures_are_deinterlaced_and_keep_their_first_field(tmp_path, top_first):
    path = write_interlaced(tmp_path / "a.mp4", 20, top_first)
    assert scan_video(path).is_interlaced
    clip = decode_clip(path, Cut(20, 64, 64))
    for row in (10, 11, 16, 17):
        # Rows of both fields, as if all rows of the picture were equal.
        assert [frame_number(frame[row : row + 1].expand(64, -1, -1)) for frame in clip.frames] == list(range(0, 40, 2))
    assert clip.report["deinterlaced"] and scan_video(path).num_frames == 20
    late = list(cut_clips(path, [Cut(5, 64, 64, start=9), Cut(5, 64, 64, start=15)]))
    assert torch.equal(torch.cat([clip.frames for clip in late]), clip.frames[[*range(9, 14), *range(15, 20)]])
    progressive = write_video(tmp_path / "b.mp4", 7)
    assert not scan_video(progressive).is_interlaced
    assert not decode_clip(progressive, Cut(7, 64, 64)).report["deinterlaced"]


def test_where_the_size_changes_the_video_ends(tmp_path):
    first = write_video(tmp_path / "1.ts", 20, width=96, height=64)
    second = write_video(tmp_path / "2.ts", 20, width=128, height=96, first_number=100)
    path = tmp_path / "both.ts"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    assert [frame_number(frame) for frame in decode_clip(path, Cut(20, 64, 96)).frames] == list(range(20))
    with pytest.raises(DataError) as caught:
        decode_clip(path, Cut(21, 64, 96))
    assert "has 20 frames at 30 fps, where its pictures change from 96x64 to 128x96 pixels, needs 21" in str(
        caught.value
    )


# Memory


def _patched_png(path: Path) -> Path:
    Image.new("RGB", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    # IHDR's width and height, and its checksum.
    struct.pack_into(">II", data, 16, 60000, 60000)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    path.write_bytes(data)
    return path


def _patched_avi(path: Path) -> Path:
    """Makes the header announce 12000x12000 pixels; HuffYUV has no other size."""
    write_video(path, 7, codec="huffyuv")
    data = bytearray(path.read_bytes())
    struct.pack_into("<ii", data, data.find(b"strf") + 12, 12000, 12000)
    path.write_bytes(data)
    return path


def _patched_jpegs(path: Path) -> Path:
    """Makes each JPEG of an AVI announce 60000x60000 pixels, after a header that announces 64x64."""
    write_video(path, 7, codec="mjpeg")
    data = bytearray(path.read_bytes())
    start = data.find(b"\xff\xc0")
    while start > 0:
        struct.pack_into(">HH", data, start + 5, 60000, 60000)
        start = data.find(b"\xff\xc0", start + 2)
    path.write_bytes(data)
    return path


def _patched_count(path: Path) -> Path:
    """Makes the header announce 200 million pictures of 8K, all of one size."""
    write_video(path, 7)
    data = bytearray(path.read_bytes())
    struct.pack_into(">HH", data, data.find(b"stsd") + 44, 7680, 4320)
    # stsz: version, size of all, number of them.
    struct.pack_into(">II", data, data.find(b"stsz") + 8, 100, 200_000_000)
    # stts: the first entry's number.
    struct.pack_into(">I", data, data.find(b"stts") + 12, 200_000_000)
    path.write_bytes(data)
    return path


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
import av
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.errors import DataError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    try:
        decode_clip(Path(path), Cut(7, 64, 64))
    except DataError as error:
        print(error)
    else:
        print("done")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_header_that_announces_too_much_is_refused_before_memory_is_taken(tmp_path):
    paths = [
        _patched_png(tmp_path / "still.png"),
        _patched_avi(tmp_path / "huffyuv.avi"),
        _patched_jpegs(tmp_path / "mjpeg.avi"),
        _patched_count(tmp_path / "count.mp4"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, *map(str, paths)], capture_output=True, text=True, check=True
    )
    *lines, mebibytes = done.stdout.splitlines()
    words = ["too many pixels", "more than 64 million pixels are not read", "it is damaged", "it is damaged"]
    for path, line, expected in zip(paths, lines, words, strict=True):
        assert line.startswith(f"{path}: ") and expected in line
    assert int(mebibytes) < 300


def test_memory_does_not_grow_with_the_length_of_the_clip(tmp_path):
    # 150 pictures of 1.5 MB; only one small clip and the decoder's own pictures are in memory.
    path = write_video(tmp_path / "clip.mp4", 150, width=960, height=544, options={"preset": "ultrafast", "g": "10"})
    script = MEMORY_SCRIPT.replace("Cut(7, 64, 64)", "Cut(150, 32, 48)")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    line, mebibytes = done.stdout.splitlines()
    assert line == "done" and int(mebibytes) < 100
