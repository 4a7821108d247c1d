"""Reads what a video or still is: its size, times and colours, by its packets and its first picture."""

import math
import struct
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

from mochi_tune.data_prep.colour import HDR_TRANSFERS, describe_matrix
from mochi_tune.data_prep.orientation import read_orientation
from mochi_tune.data_prep.stills import STILL_SUFFIXES, StillSize, read_still_size
from mochi_tune.data_prep.timeline import Clock, frame_number
from mochi_tune.errors import DataError
from mochi_tune.models.latents import FPS

# A larger picture is refused before memory is taken for it; 8K has 33 million.
MAX_PIXELS = 64_000_000
# The codecs refuse it too, when a picture is larger than the header says.
CODEC_OPTIONS = {"max_pixels": str(MAX_PIXELS)}
# Formats of recordings that may begin anywhere, and whose clock may jump forward.
CUT_FORMATS = ("mpegts", "mpeg")
# Pixels further from square than this are an error of the header.
MAX_PIXEL_ASPECT = 8
# Gaps between frames that lie so near their mean, as a share and in seconds, are a constant rate; Matroska rounds
# times to the millisecond.
RATE_TOLERANCE, ROUNDING = 0.1, 0.0021


@dataclass(frozen=True)
class Scan:
    """What a file holds, in plain values.

    Attributes:
        width: pixels of the upright picture, were its pixels square.
        height: of the same.
        num_frames: frames that it gives at 30 fps when it is resampled.
        num_source_frames: pictures that it holds.
        source_seconds: from the first picture's begin to the last one's end.
        source_fps: pictures a second on average.
        start_seconds: the first picture's time as stored.
        is_still: it is a picture, not a video; it has one frame.
        is_constant_rate: all pictures are shown equally long.
        is_30_fps: at 30 fps each picture is exactly one frame.
        rotation: degrees counter-clockwise that turn the stored picture upright.
        is_mirrored: the stored picture is shown mirrored.
        pixel_aspect: width to height of one stored pixel.
        is_interlaced: the first picture is made of two fields.
        hdr: the name of its HDR transfer function; "" for SDR.
        color_matrix: "BT.709", "BT.601 (assumed)"; "(assumed)" where the file does not tell.
        has_discontinuity: its clock jumps, as in joined recordings.
        codec: the decoder's name; "" for a still.
        container: the format's name; "" for a still.
        has_profile: it is a picture with a colour profile that is not sRGB's.
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

    def to_json(self) -> dict[str, Any]:
        """Returns the values as a dict that JSON can hold."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Scan":
        """Returns the scan that `to_json` made the values of."""
        return Scan(**values)


@dataclass(frozen=True)
class VideoIndex:
    """A scan with what only decoding needs.

    Attributes:
        scan: the plain values.
        second: ticks of a second.
        ticks: when each picture that can be decoded is shown, ascending; empty for a still.
        end_tick: when the last one ends.
        key_ticks: of those pictures at which decoding may begin.
        period: seconds that a picture is shown when the file does not tell.
        may_jump: its format's clock may jump forward.
    """

    scan: Scan
    second: int = FPS
    ticks: Sequence[int] = (0,)
    end_tick: int = 1
    key_ticks: Sequence[int] = ()
    period: Fraction = Fraction(1, FPS)
    may_jump: bool = False

    def time(self, number: int) -> Fraction:
        """Returns when a picture is shown, in seconds."""
        return Fraction(self.ticks[number], self.second)

    def picture_at(self, time: Fraction) -> int:
        """Returns the number of the picture that has begun last at a time."""
        return max(bisect_right(self.ticks, time * self.second) - 1, 0)


def scan_video(path: Path) -> Scan:
    """Reads a video's or still's properties; of a video it reads all packets and decodes the first picture.

    Raises:
        DataError: the file is unreadable, truncated, without pictures, too large, or displayed askew.
    """
    return read_index(path).scan


def read_index(path: Path) -> VideoIndex:
    """Reads what `cut_clips` needs to know of a file.

    Raises:
        DataError: as `scan_video`.
    """
    if path.suffix.lower() in STILL_SUFFIXES:
        still = read_still_size(path, MAX_PIXELS)
        if still.num_frames == 1:
            scan = Scan(still.width, still.height, is_still=True, is_30_fps=True, has_profile=still.has_profile)
            return VideoIndex(scan)
        return _index_animation(still)
    with open_video(path) as (container, stream):
        return _read_stream(path, container, stream)


@contextmanager
def open_video(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a file with PyAV; yields the container and its video stream.

    Raises:
        DataError: the file is empty, is no video, or breaks off while it is read.
    """
    import av
    from av.error import FFmpegError
    from av.video.stream import VideoStream

    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes): copy it again or remove it.")
        with av.open(str(path), metadata_errors="replace", options=CODEC_OPTIONS) as container:
            stream = container.streams.best("video")
            if stream is None:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise DataError(f"{path}: holds no video stream, only {kinds}: remove it.")
            if stream.codec_context is None:
                raise DataError(f"{path}: has a codec that is not known: re-encode it as H.264.")
            assert isinstance(stream, VideoStream)
            _check_pixels(path, stream.codec_context.width, stream.codec_context.height)
            stream.codec_context.options = CODEC_OPTIONS
            yield container, stream
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        if error.errno == EINVAL:
            # What the codec says when a picture is over the limit.
            reason += f"; pictures of more than {MAX_PIXELS // 10**6} million pixels are not read"
        raise DataError(
            f"{path}: cannot be read as a video ({reason}): it is damaged or cut short; copy it again or remove it."
        ) from error


def _check_pixels(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: has pictures of {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million: its header is "
            "damaged, or scale it down first."
        )


class _Packet(NamedTuple):
    """A coded picture: when it is decoded and shown, in the stream's units, and whether decoding may begin at it."""

    order: int | None
    time: int | None
    duration: int
    key: bool


def _read_stream(path: Path, container, stream) -> VideoIndex:
    packets, first = _read_packets(path, container, stream)
    may_jump = container.format.name in CUT_FORMATS
    rate = stream.guessed_rate or stream.average_rate
    period = 1 / Fraction(rate) if rate else Fraction(1, FPS)
    # Ticks of which both the stream's unit and the period are a whole number.
    second = math.lcm(stream.time_base.denominator, period.denominator)
    unit = int(stream.time_base * second)
    ticks, keys, clock = _order(packets, unit, Clock(int(period * second), may_jump, second))
    # AVI stores no times of display, so that this one is a guess.
    if first.pts is not None and container.format.name != "avi":
        begin = bisect_left(ticks, int(first.pts * first.time_base * second))
        # Pictures before it are of an open group whose begin was cut off: no one can decode them.
        ticks = ticks[begin:] or ticks
    missing = _missing_part(path, container, stream, len(packets), float(clock.end / second))
    if missing:
        raise DataError(f"{path}: is cut short, {missing}: copy it again or remove it.")
    video = VideoIndex(
        _describe(path, container, stream, first),
        second, ticks, int(clock.end), keys, period, may_jump,
    )  # fmt: skip
    return replace(video, scan=_count(replace(video.scan, has_discontinuity=clock.has_jumped), video))


def _read_packets(path: Path, container, stream) -> tuple[list[_Packet], Any]:
    """Returns all packets that are displayed and the first frame, decoded."""
    packets, first, has_key = [], None, container.format.name not in CUT_FORMATS
    has_pts = container.format.name != "avi"
    for packet in container.demux(stream):
        has_key = has_key or packet.is_keyframe
        if first is None:
            first = next(iter(decode_packet(path, packet, has_key, 0.0)), None)
        # A packet outside the edit list is needed to decode the others but is never displayed.
        if packet.size and not packet.is_discard and not _is_hidden(stream.codec_context.name, packet):
            time = packet.pts if has_pts and packet.pts is not None else packet.dts
            packets.append(_Packet(packet.dts, time, packet.duration or 0, packet.is_keyframe))
    if first is None or not packets:
        raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
    return packets, first


def decode_packet(path: Path, packet, has_key: bool, seconds: float) -> list[Any]:
    """Returns the frames that the decoder gives for a packet.

    Args:
        path: for messages.
        packet: of a video stream.
        has_key: it is a keyframe, or one came before it. A recording may begin in the middle of a group, which is not
            damage: decoding begins behind that.
        seconds: the time of the last frame before it, for messages.

    Raises:
        DataError: the packet is damaged.
    """
    from av.error import InvalidDataError

    try:
        return packet.decode()
    except InvalidDataError as error:
        if not has_key:
            return []
        raise DataError(
            f"{path}: cannot be decoded behind {seconds:.2f} s (codec {packet.stream.codec_context.name}): it is "
            "damaged; copy it again, cut it there, or remove it."
        ) from error


def _is_hidden(codec: str, packet) -> bool:
    """Whether a packet of VP8 is a reference that is never shown. Source: RFC 6386, section 9.1, show_frame."""
    return codec == "vp8" and not bytes(packet)[0] & 0x10


def _order(packets: list[_Packet], unit: int, clock: Clock) -> tuple[list[int], list[int], Clock]:
    """Returns the ticks of all pictures in the order of display, those of the keyframes, and the clock at the end.

    Args:
        packets: in the order of decoding.
        unit: ticks of one of the stream's units.
        clock: at its begin.
    """
    runs: list[list[_Packet]] = []
    orders = copy(clock)
    for packet in packets:
        before = orders.shift
        # Matroska does not tell the order of the first ones.
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
    """Returns the scan with what the times of its pictures tell."""
    ticks, second = video.ticks, video.second
    duration = video.end_tick - ticks[0]
    gaps = [(after - before) / second for before, after in pairwise(ticks)]
    mean = (ticks[-1] - ticks[0]) / second / len(gaps) if gaps else (video.end_tick - ticks[-1]) / second
    num_frames = max(1, frame_number(Fraction(duration, second)))
    # `frame_number` of each, in whole numbers.
    begins = [(2 * FPS * (tick - ticks[0]) + second) // (2 * second) for tick in ticks]
    return replace(
        scan,
        num_frames=num_frames,
        num_source_frames=len(ticks),
        source_seconds=duration / second,
        source_fps=1 / mean,
        start_seconds=ticks[0] / second,
        is_constant_rate=all(abs(gap - mean) <= RATE_TOLERANCE * mean + ROUNDING for gap in gaps),
        is_30_fps=begins == list(range(len(ticks))) and num_frames <= len(ticks),
    )


def _describe(path: Path, container, stream, first) -> Scan:
    """Returns the scan of a video by its header and first picture, its times not yet counted."""
    rotation, is_mirrored = read_orientation(path, first)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not 1 / MAX_PIXEL_ASPECT <= aspect <= MAX_PIXEL_ASPECT:
        raise DataError(f"{path}: has pixels of {aspect} times their height, which cannot be right: re-encode it.")
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
        hdr=HDR_TRANSFERS.get(first.color_trc, "") or HDR_TRANSFERS.get(stream.codec_context.color_trc, ""),
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


def _missing_part(path: Path, container, stream, num_packets: int, end: float) -> str:
    """Describes what the container announces but does not hold; "" if nothing is missing."""
    if "mp4" in container.format.name:
        missing = _missing_bytes(path)
        return f"{missing} bytes are missing" if missing else ""
    if stream.frames > num_packets:
        return f"its header lists {stream.frames} frames and it holds {num_packets}"
    announced = stream.metadata.get("DURATION")
    if announced:
        hours, minutes, seconds = announced.split(":")
        announced_end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if announced_end - end > 1:
            return f"its header announces {announced_end:.2f} s and its last frame ends at {end:.2f} s"
    return ""


def _missing_bytes(path: Path) -> int:
    """Counts the bytes by which the boxes of an MP4 file reach beyond its end.

    Its number of frames does not show that: an edit list may rightly hide some of them.
    """
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position + 16 <= size:
            file.seek(position)
            length, kind, long_length = struct.unpack(">I4sQ", file.read(16))
            length = long_length if length == 1 else length
            # 0 means "to the end"; anything else that small is no box but trailing bytes.
            if length < 8:
                return 0
            position += length
            if position > size and kind in (b"mdat", b"moov", b"moof"):
                return position - size
    return 0
