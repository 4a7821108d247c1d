"""Reads the properties of a video or still from its packets and first picture: size, times and colours."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, replace
from errno import EINVAL
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mochi_tune.data_prep.colour import (
    HDR_TRANSFERS,
    describe_matrix,
    fill_colours,
    is_limited_grey,
    read_header_colours,
)
from mochi_tune.data_prep.completeness import find_missing
from mochi_tune.data_prep.orientation import read_orientation
from mochi_tune.data_prep.stills import STILL_SUFFIXES, StillSize, read_still_size
from mochi_tune.data_prep.timeline import Clock, frame_number
from mochi_tune.errors import DataError
from mochi_tune.models.latents import FPS

# Maximum pixels of a picture; larger ones are refused before memory is allocated. 8K has 33 million.
_MAX_PIXELS = 64_000_000
# Makes the codecs refuse pictures that are larger than the header says.
_CODEC_OPTIONS = {"max_pixels": str(_MAX_PIXELS)}
# FFmpeg's formats for lists of other files, which a small text named a.mp4 can be: they would read any file.
_LISTS = ("concat", "dash", "hls", "imf", "rtsp", "sap", "sdp")
# Maximum length: times beyond it are mostly errors in a file, and the clips of years would take all memory.
_MAX_HOURS = 24
# Formats of recordings that may begin inside a group of pictures, and whose clock may jump forward.
_CUT_FORMATS = ("mpegts", "mpeg")
# Maximum aspect ratio of a pixel; a larger one is an error in the header.
_MAX_PIXEL_ASPECT = 8
# Maximum deviation of frame intervals from their mean at a constant rate: as a share, plus seconds for Matroska, which
# rounds times to the millisecond.
_RATE_TOLERANCE, ROUNDING = 0.1, 0.0021


@dataclass(frozen=True)
class Scan:
    """Properties of a file, as plain values.

    Attributes:
        width: of the upright picture, in square pixels.
        height: of the upright picture, in square pixels.
        num_frames: number of frames when it is resampled to 30 fps.
        num_source_frames: number of pictures.
        source_seconds: from the begin of the first picture to the end of the last one.
        source_fps: mean number of pictures per second.
        start_seconds: stored time of the first picture.
        is_still: whether it is a still picture, not a video.
        is_constant_rate: whether all pictures have the same duration.
        is_30_fps: whether each picture is exactly one frame at 30 fps.
        rotation: degrees counter-clockwise that turn the stored picture upright.
        is_mirrored: whether the stored picture is displayed mirrored.
        pixel_aspect: width / height of a stored pixel.
        is_interlaced: whether the first picture is interlaced.
        hdr: name of the HDR transfer function; "" for SDR.
        color_matrix: such as "BT.709" or "BT.601 (assumed)", which the file does not state.
        has_discontinuity: whether its clock jumps, as in joined recordings.
        codec: name of the decoder; "" for a still.
        container: name of the format; "" for a still.
        has_profile: whether it is a picture with a colour profile other than sRGB.
        colour_rules: 2 if colour tags that only the container has, or a limited range of grey, change its colours;
            versions that ignored both read it as 1.
    """

    width: int
    height: int
    num_frames: int = 1
    num_source_frames: int = 1
    source_seconds: float = 1 / FPS
    source_fps: float = FPS
    start_seconds: float = 0.0
    is_still: bool = False
    is_constant_rate: bool = True
    is_30_fps: bool = False
    rotation: int = 0
    is_mirrored: bool = False
    pixel_aspect: float = 1.0
    is_interlaced: bool = False
    hdr: str = ""
    color_matrix: str = ""
    has_discontinuity: bool = False
    codec: str = ""
    container: str = ""
    has_profile: bool = False
    colour_rules: int = 1

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Scan":
        """Builds a scan from the result of `to_json`."""
        return Scan(**values)


@dataclass(frozen=True)
class VideoIndex:
    """The properties of a file with the times of its pictures, which decoding needs.

    Attributes:
        scan: the properties.
        second: ticks per second.
        ticks: time of each picture that can be decoded, ascending.
        end_tick: end of the last picture.
        key_ticks: times of the keyframes, at which decoding may begin.
        period: seconds that a picture is shown if the file does not state it.
        may_jump: whether the clock of the format may jump forward.
    """

    scan: Scan
    second: int = FPS
    ticks: Sequence[int] = (0,)
    end_tick: int = 1
    key_ticks: Sequence[int] = ()
    period: Fraction = Fraction(1, FPS)
    may_jump: bool = False

    def time(self, number: int) -> Fraction:
        """Returns the time of a picture, in seconds."""
        return Fraction(self.ticks[number], self.second)

    def picture_at(self, time: Fraction) -> int:
        """Returns the number of the picture that is shown at a time in seconds."""
        return max(bisect_right(self.ticks, time * self.second) - 1, 0)


def scan_video(path: Path) -> Scan:
    """Reads the properties of a video or still; reads all packets of a video and decodes its first picture.

    Raises:
        DataError: the file is unreadable, truncated, without pictures, too large, or not rotated by a multiple of 90
            degrees.
    """
    return read_index(path).scan


def read_index(path: Path) -> VideoIndex:
    """Reads the properties of a file and the times of its pictures.

    Raises:
        DataError: as `scan_video`.
    """
    if path.suffix.lower() in STILL_SUFFIXES:
        still = read_still_size(path, _MAX_PIXELS)
        if still.num_frames == 1:
            scan = Scan(still.width, still.height, is_still=True, is_30_fps=True, has_profile=still.has_profile)
            return VideoIndex(scan)
        video = _index_animation(still)
    else:
        with open_video(path) as (container, stream):
            video = _read_stream(path, container, stream)
    if video.scan.source_seconds > _MAX_HOURS * 3600:
        hours = f"{video.scan.source_seconds / 3600:.0f} hours, more than {_MAX_HOURS}"
        raise DataError(f"{path}: lasts {hours}: its times are damaged, or it must be cut into shorter files.")
    return video


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a file with PyAV; yields the container and its video stream.

    Raises:
        DataError: the file is empty, is not a video, or cannot be read to its end.
    """
    import av
    from av.error import FFmpegError
    from av.video.stream import VideoStream

    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes): copy it again or remove it.")
        # Without "file:", FFmpeg takes a relative path with a colon for an address.
        options = _CODEC_OPTIONS | {"protocol_whitelist": "file"}
        with av.open(f"file:{path}", metadata_errors="replace", options=options) as container:
            if container.format.name.split(",")[0] in _LISTS:
                kind = container.format.name
                raise DataError(f"{path}: is a list of other files ({kind}), not a video: use those files instead.")
            stream = container.streams.best("video")
            if stream is None:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise DataError(f"{path}: has no video stream, only {kinds}: remove it.")
            if stream.codec_context is None:
                raise DataError(f"{path}: has an unknown codec: re-encode it as H.264.")
            assert isinstance(stream, VideoStream)
            _check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = _CODEC_OPTIONS
            yield container, stream
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        if error.errno == EINVAL:
            # The error of the codec when a picture exceeds the limit.
            reason += f"; pictures of more than {_MAX_PIXELS // 10**6} million pixels are not read"
        raise DataError(
            f"{path}: cannot be read as a video ({reason}): it is damaged or cut short; copy it again or remove it."
        ) from error


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise DataError(
            f"{path}: has pictures of {width}x{height} pixels, more than {_MAX_PIXELS // 10**6} million: its header is "
            "damaged, or it must be scaled down."
        )


class _Packet(NamedTuple):
    """A coded picture: its decoding and display times in the stream's units, and whether decoding may begin at it."""

    order: int | None
    time: int | None
    duration: int
    key: bool


def _read_stream(path: Path, container, stream) -> VideoIndex:
    header = read_header_colours(stream)
    packets, first = _read_packets(path, container, stream)
    are_changed = fill_colours(first, header) or is_limited_grey(first)
    may_jump = container.format.name in _CUT_FORMATS
    rate = stream.guessed_rate or stream.average_rate
    period = 1 / Fraction(rate) if rate else Fraction(1, FPS)
    # Both the stream's unit and the period are a whole number of ticks.
    second = math.lcm(stream.time_base.denominator, period.denominator)
    unit = int(stream.time_base * second)
    ticks, keys, clock = _order(packets, unit, Clock(int(period * second), may_jump, second))
    # AVI stores no display times; PyAV only guesses this one.
    if first.pts is not None and container.format.name != "avi":
        begin = bisect_left(ticks, int(first.pts * first.time_base * second))
        # Earlier pictures belong to an open group whose beginning is missing, and cannot be decoded.
        ticks = ticks[begin:] or ticks
    missing = find_missing(path, container, stream, len(packets), float(clock.end / second))
    if missing:
        raise DataError(f"{path}: is cut short, {missing}: copy it again or remove it.")
    video = VideoIndex(
        replace(_describe(path, container, stream, first), colour_rules=2 if are_changed else 1),
        second, ticks, int(clock.end), keys, period, may_jump,
    )  # fmt: skip
    return replace(video, scan=_count(replace(video.scan, has_discontinuity=clock.has_jumped), video))


def _read_packets(path: Path, container, stream) -> tuple[list[_Packet], Any]:
    """Returns all packets that are displayed, and the first decoded frame."""
    packets, first, has_key = [], None, container.format.name not in _CUT_FORMATS
    has_pts = container.format.name != "avi"
    for packet in container.demux(stream):
        has_key = has_key or packet.is_keyframe
        if first is None:
            first = next(iter(decode_packet(path, packet, has_key, 0.0)), None)
        # Packets outside the edit list are needed for decoding but never displayed.
        if packet.size and not packet.is_discard and not _is_hidden(stream.codec_context.name, packet):
            time = packet.pts if has_pts and packet.pts is not None else packet.dts
            packets.append(_Packet(packet.dts, time, packet.duration or 0, packet.is_keyframe))
    if first is None or not packets:
        raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
    return packets, first


def decode_packet(path: Path, packet, has_key: bool, seconds: float) -> list[Any]:
    """Returns the frames that the decoder returns for a packet.

    Args:
        path: for messages.
        packet: of a video stream.
        has_key: whether it or an earlier packet is a keyframe. A recording may begin inside a group of pictures, which
            is not damage: decoding begins after that group.
        seconds: time of the previous frame, for messages.

    Raises:
        DataError: the packet is damaged.
    """
    from av.error import InvalidDataError

    error = None
    try:
        frames = packet.decode()
    except InvalidDataError as raised:
        error, frames = raised, []
    if packet.size == 0 and packet.stream.container.format.name in _CUT_FORMATS:
        # A recording may stop inside its last picture, which the decoder returns at the end.
        frames = [frame for frame in frames if not frame.is_corrupt]
    # FFmpeg conceals some damage, and only marks the picture.
    if has_key and (error or any(frame.is_corrupt for frame in frames)):
        raise DataError(
            f"{path}: cannot be decoded after {seconds:.2f} s (codec {packet.stream.codec_context.name}): it is "
            "damaged; copy it again, cut it there, or remove it."
        ) from error
    return frames


def _is_hidden(codec: str, packet) -> bool:
    """Whether a packet of VP8 is a reference frame that is never shown. Source: RFC 6386, section 9.1, show_frame."""
    return codec == "vp8" and not bytes(packet)[0] & 0x10


def _order(packets: list[_Packet], unit: int, clock: Clock) -> tuple[list[int], list[int], Clock]:
    """Returns the ticks of all pictures in display order, the ticks of the keyframes, and the clock at the end.

    Args:
        packets: in decoding order.
        unit: ticks per unit of the stream.
        clock: at its start.
    """
    runs: list[list[_Packet]] = []
    orders = copy(clock)
    for packet in packets:
        before = orders.shift
        # Matroska has no decoding times for the first packets.
        if packet.order is not None:
            orders.read(packet.order * unit, packet.duration * unit)
        if not runs or orders.shift != before:
            runs.append([])
        runs[-1].append(packet)
    ticks, keys = [], []
    for run in runs:
        for packet in sorted(run, key=lambda packet: packet.time or 0):
            tick = clock.read(None if packet.time is None else packet.time * unit, packet.duration * unit)
            if tick is not None:
                ticks.append(tick)
                if packet.key:
                    keys.append(tick)
    return ticks, keys, clock


def _count(scan: Scan, video: VideoIndex) -> Scan:
    """Returns the scan with the properties that follow from the times of the pictures."""
    ticks, second = video.ticks, video.second
    duration = video.end_tick - ticks[0]
    gaps = [(after - before) / second for before, after in pairwise(ticks)]
    mean = (ticks[-1] - ticks[0]) / second / len(gaps) if gaps else (video.end_tick - ticks[-1]) / second
    num_frames = max(1, frame_number(Fraction(duration, second)))
    # `frame_number` of each picture, in integers.
    begins = [(2 * FPS * (tick - ticks[0]) + second) // (2 * second) for tick in ticks]
    return replace(
        scan,
        num_frames=num_frames,
        num_source_frames=len(ticks),
        source_seconds=duration / second,
        source_fps=1 / mean,
        start_seconds=ticks[0] / second,
        is_constant_rate=all(abs(gap - mean) <= _RATE_TOLERANCE * mean + ROUNDING for gap in gaps),
        is_30_fps=begins == list(range(len(ticks))) and num_frames <= len(ticks),
    )


def _describe(path: Path, container, stream, first) -> Scan:
    """Returns the scan of a video from its header and first picture, without the properties that need its times."""
    rotation, is_mirrored = read_orientation(path, first)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not 1 / _MAX_PIXEL_ASPECT <= aspect <= _MAX_PIXEL_ASPECT:
        raise DataError(f"{path}: has pixels {aspect} times as wide as high, which cannot be right: re-encode it.")
    width, height = round(first.width * aspect), first.height
    if rotation % 180:
        width, height = height, width
    return Scan(
        width,
        height,
        rotation=rotation,
        is_mirrored=is_mirrored,
        pixel_aspect=float(aspect),
        is_interlaced=first.interlaced_frame,
        hdr=HDR_TRANSFERS.get(first.color_trc, ""),
        color_matrix=describe_matrix(path, first),
        codec=stream.codec_context.name,
        container=container.format.name,
    )


def _index_animation(still: StillSize) -> VideoIndex:
    """Returns the index of an animated picture that Pillow reads."""
    # Its durations are in milliseconds.
    ends = list(accumulate(int(duration * 1000) for duration in still.durations))
    video = VideoIndex(Scan(still.width, still.height, has_profile=still.has_profile), 1000, [0, *ends[:-1]], ends[-1])
    return replace(video, scan=_count(video.scan, video))
