"""Decodes a video's pictures with PyAV in display order, each with its time."""

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.data_prep.colour import fill_colours, read_header_colours
from mochi_tune.data_prep.orientation import read_matrix
from mochi_tune.data_prep.probe import VideoIndex, decode_packet, open_video
from mochi_tune.data_prep.stills import STILL_SUFFIXES, read_still
from mochi_tune.data_prep.timeline import Clock, Picture

# Minimum seconds of video that a seek must skip.
_SEEK_SECONDS = 2
# Formats with an index of keyframes, and codecs whose keyframes are reliable.
_SEEKABLE_FORMATS = ("mov", "matroska")
_SEEKABLE_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg", "prores", "dnxhd", "ffv1", "png")
# Maximum threads, and maximum pixels for frame threads: each keeps its own pictures, and 8K would take gigabytes.
_MAX_THREADS, _MAX_THREADED_PIXELS = 8, 10_000_000


def read_pictures(path: Path, video: VideoIndex) -> Iterator[Picture]:
    """Yields all pictures of a video or still from the first one; deinterlaces interlaced ones.

    Raises:
        DataError: a picture cannot be decoded.
    """
    if path.suffix.lower() in STILL_SUFFIXES:
        yield from read_still(path)
        return
    with open_video(path) as (container, stream):
        yield from _deinterlace(_decode(path, container, stream, video))


def find_seek_time(video: VideoIndex, number: int) -> Fraction | None:
    """Returns the time of the keyframe to seek to for a picture; None to decode from the beginning."""
    scan = video.scan
    is_safe = scan.container.startswith(_SEEKABLE_FORMATS) and scan.codec in _SEEKABLE_CODECS
    if not is_safe or scan.has_discontinuity:
        return None
    # The deinterlacer needs the previous picture too.
    place = bisect_right(video.key_ticks, video.ticks[max(number - 1, 0)]) - 1
    if place < 1 or video.key_ticks[place] - video.ticks[0] < _SEEK_SECONDS * video.second:
        return None
    return Fraction(video.key_ticks[place], video.second)


def read_pictures_from(path: Path, video: VideoIndex, key_time: Fraction) -> Iterator[Picture]:
    """Yields the pictures from a keyframe; none if decoding does not begin exactly there.

    Raises:
        DataError: a picture cannot be decoded.
    """
    with open_video(path) as (container, stream):
        container.seek(round(key_time / stream.time_base), stream=stream)
        pictures = _decode(path, container, stream, video)
        # Pictures before the keyframe refer to others that were not decoded.
        first = next((picture for picture in pictures if picture.time >= key_time), None)
        if first is None or first.time != key_time:
            return
        yield from _deinterlace(_chain(first, pictures))


def _chain(first: Picture, rest: Iterator[Picture]) -> Iterator[Picture]:
    yield first
    yield from rest


def _decode(path: Path, container, stream, video: VideoIndex) -> Iterator[Picture]:
    context = stream.codec_context
    is_large = context.width * context.height > _MAX_THREADED_PIXELS
    stream.thread_type = "SLICE" if is_large else "AUTO"
    context.thread_count = min(os.cpu_count() or 1, _MAX_THREADS)
    clock, is_avi = Clock(video.period, video.may_jump), container.format.name == "avi"
    has_key, header = not video.may_jump, read_header_colours(stream)
    for packet in container.demux(stream):
        has_key = has_key or packet.is_keyframe
        frames = decode_packet(path, packet, has_key, float(clock.last or 0))
        for frame in frames:
            fill_colours(frame, header)
            # AVI stores no display times, only the decoding order.
            ticks = frame.dts if is_avi else frame.pts
            duration = (frame.duration or 0) * frame.time_base
            time = clock.read(None if ticks is None else ticks * frame.time_base, duration)
            if time is not None:
                yield Picture(Fraction(time), Fraction(clock.end - time), frame, was_interlaced=frame.interlaced_frame)


def _deinterlace(pictures: Iterator[Picture]) -> Iterator[Picture]:
    """Yields progressive pictures unchanged; from the first interlaced one, applies FFmpeg's yadif filter to all.

    The filter keeps the field that is shown first, so that each picture keeps its time.
    """
    waiting: deque[Picture] = deque()
    graph, layout = None, None
    for picture in pictures:
        frame = picture.image
        if graph is not None and layout != (frame.width, frame.height, frame.format.name):
            yield from _drain(graph, waiting, is_end=True)
            graph = None
        if graph is None and not frame.interlaced_frame:
            yield picture
            continue
        if graph is None:
            graph, layout = _build_graph(frame), (frame.width, frame.height, frame.format.name)
        waiting.append(picture)
        graph.vpush(frame)
        yield from _drain(graph, waiting, is_end=False)
    if graph is not None:
        yield from _drain(graph, waiting, is_end=True)


def _build_graph(frame) -> Any:
    from av.filter import Graph

    graph = Graph()
    buffer = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=frame.time_base
    )
    graph.link_nodes(
        buffer, graph.add("yadif", "mode=send_frame:parity=auto:deint=interlaced"), graph.add("buffersink")
    )
    graph.configure()
    return graph


def _drain(graph: Any, waiting: deque[Picture], is_end: bool) -> Iterator[Picture]:
    """Yields the finished pictures of the filter, one for each input, in order."""
    from av.error import EOFError as EndOfFile

    if is_end:
        graph.vpush(None)
    while waiting:
        try:
            frame = graph.vpull()
        except (BlockingIOError, EndOfFile):
            assert not is_end, f"the filter kept {len(waiting)} pictures"
            return
        picture = waiting.popleft()
        yield replace(picture, image=frame)


def image_matrix(picture: Picture) -> tuple[int, int, int, int] | None:
    """Returns the display matrix of a picture in its stored orientation; None if it is upright."""
    return None if isinstance(picture.image, np.ndarray) else read_matrix(picture.image)
