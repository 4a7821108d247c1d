from dataclasses import asdict
from fractions import Fraction

import numpy as np
import pytest
from helpers_film import numbers_of, write_film
from helpers_video import write_interlaced, write_planes, write_video

from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.cutting import Mark, cut_clips, read_mark
from mochi_tune.data_prep.frames import find_seek_time
from mochi_tune.data_prep.probe import read_index
from mochi_tune.errors import DataError

FIRST, STOP = 4, 17


def ten_bits(path):
    planes = [np.full(shape, value, np.uint16) for shape, value in (((64, 96), 600), ((32, 48), 400), ((32, 48), 520))]
    return write_planes(path, "yuv420p10le", planes, 20, color_trc=16, colorspace=9, color_primaries=9, color_range=1)


def grey(path):
    return write_planes(path, "gray", [np.tile(np.arange(16, 240, 2, np.uint8), (64, 1))], 20, color_range=1)


FILMS = {
    "turned": lambda folder: write_video(folder / "a.mp4", 20, width=96, rotation=90),
    "upside down": lambda folder: write_video(folder / "a.mp4", 20, width=96, rotation=180),
    "mirrored": lambda folder: write_video(folder / "a.mp4", 20, width=96, mirrored=True),
    "turned and mirrored": lambda folder: write_video(folder / "a.mp4", 20, width=96, rotation=270, mirrored=True),
    "wide pixels": lambda folder: write_video(folder / "a.mp4", 20, pixel_aspect=Fraction(4, 3)),
    "other times": lambda folder: write_video(folder / "a.mkv", timestamps=[i**1.3 / 20 for i in range(20)]),
    "full range": lambda folder: write_video(folder / "a.avi", 20, codec="mjpeg"),
    "RGB": lambda folder: write_video(folder / "a.mov", 20, codec="png"),
    "odd sides": lambda folder: write_video(folder / "a.mkv", 20, codec="ffv1", width=97, height=65),
    "interlaced": lambda folder: write_interlaced(folder / "a.mp4", 20, True),
    "grey of limited range": lambda folder: grey(folder / "a.mkv"),
    "HDR, 10 bits": lambda folder: ten_bits(folder / "a.mkv"),
}


def cut(film, spans, crf=0):
    """Cuts spans of seconds; returns the files."""
    files = [film.with_name(f"clip_{number}.mp4") for number in range(len(spans))]
    marks = [asdict(Mark("a", 1, start, end, crf)) for start, end in spans]
    pieces = [{"file": str(file), "mark": mark} for file, mark in zip(files, marks, strict=True)]
    done = [message["frames"] for message in cut_clips(film, pieces) if "done" in message]
    assert len(done) == len(spans)
    return files


@pytest.mark.parametrize("kind", FILMS)
def test_a_lossless_clip_is_decoded_as_its_part_of_the_film_is(kind, tmp_path):
    film = FILMS[kind](tmp_path)
    source = read_index(film)
    start, end = (round(float(source.time(n) - source.time(0)), 4) for n in (FIRST, STOP))
    (clip,) = cut(film, [(start, end)])
    made = read_index(clip)
    times = [round(float(source.time(n) - source.time(FIRST)), 3) for n in range(FIRST, STOP)]
    assert [round(float(made.time(n)), 3) for n in range(len(made.ticks))] == pytest.approx(times, abs=0.002)
    # The last frame is shown as long as in the film.
    assert made.scan.source_seconds == pytest.approx(end - start, abs=0.002)
    for name in ("width", "height", "rotation", "is_mirrored", "pixel_aspect", "hdr"):
        assert getattr(made.scan, name) == getattr(source.scan, name), name
    assert not made.scan.is_interlaced
    size, hdr = (source.scan.height, source.scan.width), "tonemap" if source.scan.hdr else "refuse"
    frames = [
        decode_clip(path, Cut(STOP - FIRST, *size, start=at, frame_rate="retime", hdr=hdr, allow_upscale=True)).frames
        for path, at in ((film, FIRST), (clip, 0))
    ]
    # RGB becomes YUV in 4:4:4, which rounds by 1; more for a picture with odd sides, whose chroma is doubled first.
    tolerance = 2 if kind in ("RGB", "odd sides") else 0
    assert (frames[0].int() - frames[1].int()).abs().max() <= tolerance


def test_clips_may_touch_overlap_and_lie_behind_a_seek(tmp_path):
    film = write_film(tmp_path / "film.mp4")
    files = cut(film, [(0.0, 0.5), (0.5, 1.0), (0.8, 1.2), (5.0, 5.5)], crf=12)
    whole = numbers_of(film)
    assert [numbers_of(file) for file in files] == [whole[:15], whole[15:30], whole[24:36], whole[150:165]]
    assert find_seek_time(read_index(film), 210) is not None
    (late,) = cut(film, [(7.0, 9.0)], crf=12)
    assert numbers_of(late) == whole[210:]
    assert read_mark(late) == Mark("a", 1, 7.0, 9.0, 12) and read_mark(film) is None
    assert read_mark(tmp_path / "nothing.mp4") is None


def test_a_time_behind_the_end_is_refused(tmp_path):
    film = write_video(tmp_path / "film.mp4", 20)
    with pytest.raises(DataError, match=r"has no frame at 3 s"):
        cut(film, [(0.0, 0.5), (3.0, 4.0)])


def test_a_visually_lossless_clip_is_near_the_film(tmp_path):
    film = write_film(tmp_path / "film.mp4")
    (clip,) = cut(film, [(0.0, 1.0)], crf=12)
    frames = [decode_clip(path, Cut(30, 128, 192)).frames.double() for path in (film, clip)]
    error = float((frames[0] - frames[1]).pow(2).mean())
    assert 10 * np.log10(255**2 / error) > 40
