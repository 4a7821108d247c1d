"""Reads a video file's metadata: each frame's time, the rotation, and whether the file is complete."""

import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from mochi_tune.errors import DataError

# Transfer characteristics of ITU-T H.273 that need tone mapping before they are right as SDR.
HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}


@dataclass(frozen=True)
class Packet:
    """One coded frame: its presentation time in seconds, whether it is displayed, whether decoding may start at it."""

    time: Fraction
    displayed: bool
    key: bool


@dataclass(frozen=True)
class VideoSource:
    """A file's metadata.

    Attributes:
        packets: of the video stream, in the order of decoding.
        width: of the stored picture, in pixels.
        height: of the stored picture, in pixels.
        rotation: degrees counter-clockwise that turn the stored picture upright: 0, 90, 180 or 270.
        codec: the name of its decoder.
        reorders: its decoder shows frames in another order than it is given them.
        pixel_aspect: width to height of one stored pixel.
    """

    packets: list[Packet]
    width: int
    height: int
    rotation: int
    codec: str
    reorders: bool
    pixel_aspect: float

    @cached_property
    def timestamps(self) -> list[Fraction]:
        """Presentation times in seconds of the frames that are displayed, ascending."""
        return sorted(packet.time for packet in self.packets if packet.displayed)

    @property
    def last_period(self) -> Fraction:
        """Seconds between the last two frames, 0 for a single one."""
        return self.timestamps[-1] - self.timestamps[-2] if len(self.timestamps) > 1 else Fraction(0)


def probe_video(path: Path) -> VideoSource:
    """Reads all packets' times and the first picture's properties with PyAV, which reports more than decord.

    Raises:
        DataError: the file is unreadable, truncated, without pictures, HDR, or displayed mirrored or askew.
    """
    import av
    from av.error import FFmpegError
    from av.video.stream import VideoStream

    try:
        if path.is_file() and path.stat().st_size == 0:
            raise DataError(f"{path}: is empty (0 bytes): copy it again or remove it.")
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            if stream is None:
                kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise DataError(f"{path}: holds no video stream, only {kinds}: remove it.")
            if stream.codec_context is None:
                raise DataError(f"{path}: has a codec that is not known: re-encode it as H.264.")
            assert isinstance(stream, VideoStream)
            transfer = HDR_TRANSFERS.get(stream.codec_context.color_trc)
            if transfer:
                raise DataError(f"{path}: is HDR, {transfer}, but the models take SDR: convert it to BT.709 first.")
            packets, first = _read_packets(path, container, stream)
            return VideoSource(
                packets,
                first.width,
                first.height,
                _rotation(path, first),
                stream.codec_context.name,
                bool(stream.codec_context.has_b_frames),
                float(stream.sample_aspect_ratio or 1),
            )
    except (FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as a video ({reason}): it is damaged or cut short; copy it again or remove it."
        ) from error


def _read_packets(path: Path, container, stream) -> tuple[list[Packet], Any]:
    """Returns all packets and the first frame, decoded."""
    packets, first = [], None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if packet.size:
            time = packet.pts if packet.pts is not None else packet.dts
            if time is None:
                raise DataError(f"{path}: has frames without timestamps: remux it, e.g. ffmpeg -i IN -c copy OUT.mkv.")
            # A packet outside the edit list is needed to decode the others but is never displayed.
            packets.append(Packet(time * stream.time_base, not packet.is_discard, packet.is_keyframe))
    if first is None or not any(packet.displayed for packet in packets):
        raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
    missing = _missing_part(path, container, stream, packets)
    if missing:
        raise DataError(f"{path}: is cut short, {missing}: copy it again or remove it.")
    return packets, first


def _missing_part(path: Path, container, stream, packets: list[Packet]) -> str:
    """Describes what the container announces but does not hold; "" if nothing is missing."""
    if "mp4" in container.format.name:
        missing = _missing_bytes(path)
        return f"{missing} bytes are missing" if missing else ""
    if stream.frames > len(packets):
        return f"its header lists {stream.frames} frames and it holds {len(packets)}"
    announced = stream.metadata.get("DURATION")
    if announced:
        hours, minutes, seconds = announced.split(":")
        end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        last = float(max(packet.time for packet in packets))
        if end - last > 1:
            return f"its header announces {end:.2f} s and its last frame is at {last:.2f} s"
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


def _rotation(path: Path, frame) -> int:
    """Returns the degrees, counter-clockwise, that turn the stored picture upright: 0, 90, 180 or 270."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    a, b, _, c, d = struct.unpack("=9i", bytes(matrix))[:5]
    if a * d < b * c:
        raise DataError(f"{path}: is displayed mirrored by its metadata, which is not supported: re-encode it upright.")
    if frame.rotation % 90:
        raise DataError(f"{path}: is turned by {frame.rotation} degrees, not a multiple of 90: re-encode it upright.")
    return frame.rotation % 360
