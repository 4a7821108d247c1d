"""What a video file says of itself: when each frame is shown, which way is up, and whether all of it is there."""

import struct
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mochi_tune.errors import DataError

# Transfer characteristics of ITU-T H.273 that need tone mapping before they look right as SDR.
HDR_TRANSFERS = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}


@dataclass(frozen=True)
class VideoSource:
    """A file's metadata.

    Attributes:
        timestamps: presentation times in seconds of the frames that are shown, ascending.
        rotation: degrees counter-clockwise that turn the stored picture upright: 0, 90, 180 or 270.
        turned_by_decord: decord applies that rotation by itself.
        codec: the name of its decoder.
        pixel_aspect: width to height of one stored pixel.
    """

    timestamps: list[Fraction]
    rotation: int
    turned_by_decord: bool
    codec: str
    pixel_aspect: float

    @property
    def last_period(self) -> Fraction:
        """Seconds between the last two frames, 0 for a single one."""
        return self.timestamps[-1] - self.timestamps[-2] if len(self.timestamps) > 1 else Fraction(0)


def probe_video(path: Path) -> VideoSource:
    """Reads all packets' times and the first picture's properties with PyAV, which tells more than decord does.

    Raises:
        DataError: the file is unreadable, truncated, without pictures, HDR, or shown mirrored or askew.
    """
    import av

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
            transfer = HDR_TRANSFERS.get(stream.codec_context.color_trc)
            if transfer:
                raise DataError(f"{path}: is HDR, {transfer}, but the models take SDR: convert it to BT.709 first.")
            timestamps, first = _read_packets(path, container, stream)
            return VideoSource(
                timestamps,
                _rotation(path, first),
                # decord's FFmpeg knows the display matrix of the MP4 family and of no other container.
                "mp4" in container.format.name,
                stream.codec_context.name,
                float(stream.sample_aspect_ratio or 1),
            )
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise DataError(
            f"{path}: cannot be read as a video ({reason}): it is damaged or cut short; copy it again or remove it."
        ) from error


def _read_packets(path: Path, container, stream) -> tuple[list[Fraction], object]:
    """Returns the times in seconds of all frames that are shown, ascending, and the first frame, decoded."""
    times, count, first = [], 0, None
    for packet in container.demux(stream):
        if first is None:
            first = next(iter(packet.decode()), None)
        if not packet.size:
            continue
        count += 1
        # A packet outside the edit list is needed to decode the others but is never shown.
        if not packet.is_discard:
            times.append(packet.pts if packet.pts is not None else packet.dts)
    if first is None or not times:
        raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
    if None in times:
        raise DataError(f"{path}: has frames without timestamps: remux it, e.g. ffmpeg -i IN -c copy OUT.mkv.")
    timestamps = [time * stream.time_base for time in sorted(times)]
    missing = _missing_part(path, container, stream, count, timestamps[-1])
    if missing:
        raise DataError(f"{path}: is cut short, {missing}: copy it again or remove it.")
    return timestamps, first


def _missing_part(path: Path, container, stream, num_packets: int, last: Fraction) -> str:
    """Says what the container announces and does not hold, or nothing."""
    if "mp4" in container.format.name:
        missing = _missing_bytes(path)
        return f"{missing} bytes are missing" if missing else ""
    if stream.frames > num_packets:
        return f"its header lists {stream.frames} frames and it holds {num_packets}"
    announced = stream.metadata.get("DURATION")
    if announced:
        hours, minutes, seconds = announced.split(":")
        end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if end - last > 1:
            return f"its header announces {end:.2f} s and its last frame is at {float(last):.2f} s"
    return ""


def _missing_bytes(path: Path) -> int:
    """Counts the bytes by which the boxes of an MP4 file reach beyond its end.

    Its number of frames cannot tell: an edit list may hide some of them with good reason.
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
        raise DataError(f"{path}: is shown mirrored by its metadata, which is not supported: re-encode it upright.")
    if frame.rotation % 90:
        raise DataError(f"{path}: is turned by {frame.rotation} degrees, not a multiple of 90: re-encode it upright.")
    return frame.rotation % 360
