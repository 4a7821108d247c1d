"""Cuts clips from videos and stills: upright, with square pixels, resized and cropped. No model is involved."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mochi_tune.data_prep.colour import RgbConverter
from mochi_tune.data_prep.decord_frames import is_plain, read_with_decord
from mochi_tune.data_prep.frames import (
    find_seek_time,
    image_matrix,
    read_pictures,
    read_pictures_from,
)
from mochi_tune.data_prep.orientation import turn_upright
from mochi_tune.data_prep.probe import Scan, VideoIndex, read_index
from mochi_tune.data_prep.timeline import FrameRate, Picture, Span, place_pictures
from mochi_tune.errors import DataError
from mochi_tune.models.latents import FPS

# Part of the cache's fingerprint: increase it when the same file would give other frames.
TRANSFORM_VERSION = 2
# Range of mean frame rates that "auto" retimes to 30 fps.
_RETIMED_FPS = (23, 33)


@dataclass(frozen=True)
class Cut:
    """A clip to cut from a file.

    Attributes:
        num_frames: of the clip.
        height: of the clip in pixels.
        width: of the clip in pixels.
        start: the clip's first frame: among the file's frames at 30 fps, or among its pictures for retime.
        allow_upscale: whether sources may be smaller than the clip.
        frame_rate: resample keeps the speed and repeats or drops pictures; retime shows each picture for 1/30 s.
        hdr: whether to refuse or tone-map PQ and HLG.
        decoder: the library that decodes; the pixels do not depend on it.
    """

    num_frames: int
    height: int
    width: int
    start: int = 0
    allow_upscale: bool = False
    frame_rate: FrameRate = "resample"
    hdr: Literal["refuse", "tonemap"] = "refuse"
    decoder: Literal["auto", "pyav", "decord"] = "auto"


@dataclass(frozen=True)
class DecodedClip:
    """A clip as the VAE takes it.

    Attributes:
        frames: uint8 (F, H, W, 3), upright, one every 1/30 s.
        report: what was done: source_width, source_height (upright, square pixels), source_frames, source_seconds,
            source_fps, pixel_aspect (width to height of one stored pixel, corrected), rotation (degrees
            counter-clockwise), is_mirrored, deinterlaced, hdr (what was tone-mapped), color_matrix, frame_rate,
            distinct_frames, scale, crop (left, top, width, height in upright source pixels), start_seconds (as stored
            in the file), decoder.
    """

    frames: torch.Tensor
    report: dict


@dataclass(frozen=True)
class _Fit:
    """How an upright picture is fitted to the clip: scaled to rows x columns, then cropped from (left, top)."""

    scale: float
    rows: int
    columns: int
    top: int
    left: int
    height: int
    width: int


class _Window:
    """A clip that is being filled with frames, in ascending order."""

    def __init__(self, cut: Cut, fit: _Fit) -> None:
        self.cut = cut
        self.fit = fit
        self.frames: torch.Tensor | None = None
        self.distinct_frames = 0
        self.was_interlaced = False
        self.decoder = ""
        self.first_time: Fraction | None = None

    @property
    def stop(self) -> int:
        return self.cut.start + self.cut.num_frames

    def put(self, span: Span, image: torch.Tensor) -> None:
        """Copies a span's picture, resized and cropped, into its frames."""
        if self.frames is None:
            self.frames = torch.empty((self.cut.num_frames, self.cut.height, self.cut.width, 3), dtype=torch.uint8)
            self.first_time, self.decoder = span.picture.time, span.picture.decoder
        begin, end = max(span.begin, self.cut.start), min(span.end, self.stop)
        self.frames[begin - self.cut.start : end - self.cut.start] = image
        self.distinct_frames += 1
        self.was_interlaced |= span.picture.was_interlaced


def choose_frame_rate(scan: Scan, setting: Literal["auto", "resample", "retime"]) -> FrameRate:
    """Returns how data.frame_rate applies to a file: "auto" retimes constant rates of 23 to 33 fps.

    A file of 30 fps gives the same frames either way and counts as resampled.
    """
    if scan.is_still or scan.is_30_fps:
        return "resample"
    if setting != "auto":
        return setting
    low, high = _RETIMED_FPS
    return "retime" if scan.is_constant_rate and low <= round(scan.source_fps, 1) <= high else "resample"


def decode_clip(path: Path, cut: Cut) -> DecodedClip:
    """Decodes one clip.

    Raises:
        DataError: the file is unreadable, truncated, damaged, without pictures, HDR, too short, or too small.
    """
    return next(cut_clips(path, [cut]))


def cut_clips(path: Path, cuts: Sequence[Cut]) -> Iterator[DecodedClip]:
    """Yields clips of one file, which is decoded once from front to back.

    Args:
        path: a video or still.
        cuts: by ascending start; they may overlap; all with the same `frame_rate`, `hdr` and `decoder`.

    Raises:
        DataError: as `decode_clip`, for the first clip that cannot be cut.
    """
    for result in try_clips(path, cuts):
        if isinstance(result, DataError):
            raise result
        yield result


def try_clips(path: Path, cuts: Sequence[Cut]) -> Iterator[DecodedClip | DataError]:
    """Yields for each cut, in order, its clip or the error that refuses it; see `cut_clips`."""
    num_done = 0
    try:
        for result in _try_clips(path, cuts):
            yield result
            num_done += 1
    except DataError as error:
        for _ in cuts[num_done:]:
            yield error


def _try_clips(path: Path, cuts: Sequence[Cut]) -> Iterator[DecodedClip | DataError]:
    video = read_index(path)
    scan, cut = video.scan, cuts[0]
    assert all(one.start <= other.start for one, other in pairwise(cuts)), "cuts are sorted"
    assert {(one.frame_rate, one.hdr, one.decoder) for one in cuts} == {(cut.frame_rate, cut.hdr, cut.decoder)}
    if scan.hdr and cut.hdr == "refuse":
        raise DataError(
            f"{path}: is HDR, {scan.hdr}, but the models take SDR: set data.hdr=tonemap, or convert it to BT.709 first."
        )
    windows = deque(_open_window(path, scan, one) for one in cuts)
    yield from _fill(path, video, windows, RgbConverter(path, scan.hdr))


def _fill(
    path: Path, video: VideoIndex, windows: deque[_Window | DataError], converter: RgbConverter
) -> Iterator[DecodedClip | DataError]:
    """Yields the clips in order, each when decoding has reached its end."""
    have, size, changed = 0, None, ""
    yield from _pop_done(video, windows, have)
    for span in _spans(path, video, windows) if windows else ():
        shape = _image_size(span.picture)
        if size not in (None, shape):
            changed = f", where its pictures change from {size[0]}x{size[1]} to {shape[0]}x{shape[1]} pixels"
            break
        size, have = shape, span.end
        _put(span, list(_takers(windows, span)), converter)
        yield from _pop_done(video, windows, have)
        if not windows:
            return
    for window in windows:
        yield window if isinstance(window, DataError) else _too_short(path, have, window.cut, changed)


def _pop_done(
    video: VideoIndex, windows: deque[_Window | DataError], reached: int
) -> Iterator[DecodedClip | DataError]:
    while windows:
        first = windows[0]
        if isinstance(first, DataError):
            yield first
        elif first.stop <= reached:
            assert first.frames is not None
            yield DecodedClip(first.frames, _report(video, first))
        else:
            return
        windows.popleft()


def _takers(windows: Iterable[_Window | DataError], span: Span) -> Iterator[_Window]:
    """Yields the windows that show a span; stops at the first that has not begun, as long films have thousands."""
    for window in windows:
        if isinstance(window, DataError):
            continue
        if window.cut.start >= span.end:
            return
        if span.begin < window.stop:
            yield window


def _put(span: Span, takers: list[_Window], converter: RgbConverter) -> None:
    """Copies a span's picture into each window; converts it once, and resizes it once per size."""
    if not takers:
        return
    image = span.picture.image
    if not isinstance(image, np.ndarray):
        image = turn_upright(converter.convert(image), image_matrix(span.picture))
    upright = torch.from_numpy(np.ascontiguousarray(image))
    resized: dict[_Fit, torch.Tensor] = {}
    for window in takers:
        if window.fit not in resized:
            resized[window.fit] = _resize_and_crop(upright, window.fit)
        window.put(span, resized[window.fit])


def _spans(path: Path, video: VideoIndex, windows: deque[_Window | DataError]) -> Iterator[Span]:
    """Yields the spans from the first window's start or earlier; seeks past earlier pictures if possible."""
    cuts = [window.cut for window in windows if isinstance(window, _Window)]
    frame_rate = cuts[0].frame_rate
    for number, pictures in _readers(path, video, cuts):
        first = next(pictures, None)
        if first is not None:
            first_time = first.time if number == 0 else video.time(0)
            return place_pictures(chain([first], pictures), first_time, frame_rate, number)
    raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")


def _readers(path: Path, video: VideoIndex, cuts: Sequence[Cut]) -> Iterator[tuple[int, Iterator[Picture]]]:
    """Yields iterators over a file's pictures, the fastest first, with their first number; one may be empty."""
    first, last = cuts[0].start, max(cut.start + cut.num_frames for cut in cuts) - 1
    if video.scan.codec:
        begin, end = (_picture_at(video, frame, cuts[0].frame_rate) for frame in (first, last))
        if cuts[0].decoder == "decord" and is_plain(video):
            # One more picture gives the duration of the last one; another one may begin half a frame early.
            yield 0, read_with_decord(path, video, end + 3)
        key_time = find_seek_time(video, begin)
        if key_time is not None:
            yield video.picture_at(key_time), read_pictures_from(path, video, key_time)
    yield 0, read_pictures(path, video)


def _picture_at(video: VideoIndex, frame: int, frame_rate: FrameRate) -> int:
    """Returns the number of the picture that is shown at an output frame."""
    if frame_rate == "retime":
        return frame
    return video.picture_at(video.time(0) + Fraction(frame, FPS))


def _image_size(picture: Picture) -> tuple[int, int]:
    if isinstance(picture.image, np.ndarray):
        return picture.image.shape[1], picture.image.shape[0]
    return picture.image.width, picture.image.height


def _too_short(path: Path, have: int, cut: Cut, changed: str = "") -> DataError:
    rate = "frames, each played once," if cut.frame_rate == "retime" else f"frames at {FPS} fps"
    start = f" from frame {cut.start} on" if cut.start else ""
    return DataError(
        f"{path}: is too short: has {have} {rate}{changed}, needs {cut.num_frames}{start}: "
        "use a longer clip, or a smaller data.num_frames or shorter data.buckets, whichever is set."
    )


def _ways_out(scan: Scan, cut: Cut) -> str:
    """Returns the settings that would accept a picture that is too small."""
    smaller = "a smaller data.height and data.width, or data.allow_upscale=true"
    if (scan.height > scan.width) != (cut.height > cut.width):
        return f"data.buckets=auto, which has buckets for upright and wide clips, {smaller}"
    return smaller


def _open_window(path: Path, scan: Scan, cut: Cut) -> _Window | DataError:
    """Returns an empty window for a cut, or the error if the file has no such clip."""
    have = scan.num_source_frames if cut.frame_rate == "retime" else scan.num_frames
    if cut.start + cut.num_frames > have:
        return _too_short(path, have, cut)
    scale = max(cut.height / scan.height, cut.width / scan.width)
    if scale > 1 and not cut.allow_upscale:
        return DataError(
            f"{path}: is {scan.width}x{scan.height} pixels, too small for {cut.width}x{cut.height}: "
            f"set {_ways_out(scan, cut)}."
        )
    rows, columns = round(scan.height * scale), round(scan.width * scale)
    top, left = (rows - cut.height) // 2, (columns - cut.width) // 2
    return _Window(cut, _Fit(scale, rows, columns, top, left, cut.height, cut.width))


def _resize_and_crop(image: torch.Tensor, fit: _Fit) -> torch.Tensor:
    """Resizes uint8 (h, w, 3) with antialiased bicubic interpolation and crops the centre: uint8 (H, W, 3)."""
    if (fit.rows, fit.columns) != image.shape[:2]:
        # In integers like Pillow: five times as fast as fp32, and within 1 of it except at hard edges.
        # With the batch dim torch detects channels last and resizes without a copy, twice as fast.
        planes = image[None].permute(0, 3, 1, 2)
        planes = torch.nn.functional.interpolate(planes, (fit.rows, fit.columns), mode="bicubic", antialias=True)
        image = planes[0].permute(1, 2, 0)
    return image[fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]


def _report(video: VideoIndex, window: _Window) -> dict:
    scan, fit, cut = video.scan, window.fit, window.cut
    x, y = scan.width / fit.columns, scan.height / fit.rows
    start = video.time(0) + Fraction(cut.start, FPS)
    if cut.frame_rate == "retime":
        assert window.first_time is not None
        start = window.first_time
    return {
        "source_width": scan.width,
        "source_height": scan.height,
        "source_frames": scan.num_source_frames,
        "source_seconds": round(scan.source_seconds, 4),
        "source_fps": round(scan.source_fps, 3),
        "pixel_aspect": round(scan.pixel_aspect, 4),
        "rotation": scan.rotation,
        "is_mirrored": scan.is_mirrored,
        "deinterlaced": window.was_interlaced,
        "hdr": scan.hdr,
        "color_matrix": scan.color_matrix,
        "frame_rate": cut.frame_rate,
        "distinct_frames": window.distinct_frames,
        "scale": round(fit.scale, 6),
        "crop": [round(v, 2) for v in (fit.left * x, fit.top * y, cut.width * x, cut.height * y)],
        "start_seconds": round(float(start), 4),
        "decoder": window.decoder,
    }
