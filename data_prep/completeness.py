"""Finds out from a video's container whether the file is cut short."""

import struct
from pathlib import Path

# Identifiers of the two elements of a Matroska file.
_EBML, _SEGMENT = b"\x1aE\xdf\xa3", b"\x18S\x80g"


def find_missing(path: Path, container, stream, num_packets: int, end: float) -> str:
    """Describes what is missing compared with the container's header; "" if nothing is.

    Args:
        path: of the file.
        container: that PyAV opened.
        stream: of its video.
        num_packets: number of pictures that were read.
        end: of the last one, in seconds.
    """
    if "mp4" in container.format.name:
        missing = _missing_boxes(path)
        return f"{missing} bytes are missing" if missing else ""
    if container.format.name == "avi":
        # An empty chunk, which is not read as a packet, shows the picture before it once more.
        num_packets = max(num_packets, round(end * (stream.average_rate or 0)))
    if stream.frames > num_packets:
        return f"its header lists {stream.frames} frames and it has {num_packets}"
    announced = stream.metadata.get("DURATION")
    if announced:
        hours, minutes, seconds = announced.split(":")
        announced_end = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        if announced_end - end > 1:
            return f"its header announces {announced_end:.2f} s and its last frame ends at {end:.2f} s"
    # Many programs write DURATION at the end of the file, or not at all.
    missing = _missing_segment(path) if container.format.name.startswith("matroska") else 0
    return f"{missing} bytes are missing" if missing else ""


def _missing_boxes(path: Path) -> int:
    """Returns the number of bytes by which the boxes of an MP4 file exceed its end.

    The number of frames does not show that: an edit list may hide some of them.
    """
    size, position = path.stat().st_size, 0
    with path.open("rb") as file:
        while position + 16 <= size:
            file.seek(position)
            length, kind, long_length = struct.unpack(">I4sQ", file.read(16))
            length = long_length if length == 1 else length
            # 0 means "to the end"; other values below 8 are trailing bytes, not a box.
            if length < 8:
                return 0
            position += length
            if position > size and kind in (b"mdat", b"moov", b"moof"):
                return position - size
    return 0


def _missing_segment(path: Path) -> int:
    """Returns the number of bytes by which the segment of a Matroska file exceeds its end; 0 if its size is unknown.

    Source: RFC 8794, sections 4 to 6 (sizes of elements), and RFC 9559, section 4.5 (EBML header and segment).
    """
    end = 0
    with path.open("rb") as file:
        for kind in (_EBML, _SEGMENT):
            file.seek(end)
            found, first = file.read(4), file.read(1)
            if found != kind or not first or not first[0]:
                return 0
            length = 9 - first[0].bit_length()
            size = int.from_bytes(first + file.read(length - 1), "big") - (1 << 7 * length)
            # All bits set: a recording that was not finished.
            if size == (1 << 7 * length) - 1:
                return 0
            end = file.tell() + size
    return max(end - path.stat().st_size, 0)
