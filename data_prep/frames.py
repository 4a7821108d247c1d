"""Decodes frames with decord in bounded memory: it gets a few packets at a time instead of the file."""

import io
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.data_prep.probe import VideoSource
from mochi_tune.errors import DataError

# decord decodes ahead of its reader without a limit, up to the end of what it is given: so many bytes of pictures.
AHEAD_BYTES = 256 * 2**20
# The packets' own times are of no use to decord; any even spacing of their order will do.
PACKET_MILLISECONDS = 40
# As far as a frame can lie from its position in display order (H.264's and HEVC's largest picture buffer).
MAX_REORDER = 16


def decode_frames(path: Path, source: VideoSource, indices: list[int]) -> Iterator[np.ndarray]:
    """Yields displayed frames as uint8 (H, W, 3), upright, bit for bit what decord decodes.

    The packets are copied, not re-encoded, into small Matroska files in memory, each from a keyframe to the last
    packet of a span of frames. That also takes edit lists out of decord's way, which make it lose count.

    Args:
        path: the video.
        source: what `probe_video` says of it.
        indices: into `source.timestamps`, ascending, each once.

    Raises:
        DataError: decord cannot decode the file.
    """
    import av  # before decord, which makes its own old codecs visible to libraries that are loaded later
    import decord
    from av.error import FFmpegError

    decord.logging.set_level(decord.logging.QUIET)
    ranks, displayed, starts = _order(source)
    wanted = [displayed[index] for index in indices]
    # The packet up to which everything must be decoded for the pictures of rank 0..r to be complete.
    needed = list(accumulate(np.argsort(ranks).tolist(), max))
    # AVI has no times of display and reports those of decoding; the true order then lies within a few packets.
    margin = MAX_REORDER if source.reorders and ranks == sorted(ranks) else 0
    span = max(1, AHEAD_BYTES // (3 * source.width * source.height))
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            stream = container.streams.best("video")
            packets = list(islice((p for p in container.demux(stream) if p.size), needed[wanted[-1]] + 1 + margin))
            while wanted:
                group = [rank for rank in wanted if rank < wanted[0] + span]
                wanted = wanted[len(group) :]
                start = starts[bisect_right(starts, group[0]) - 1]
                piece = slice(start, needed[group[-1]] + 1 + margin)
                yield from _decode_piece(stream, packets[piece], ranks[piece], group, source.rotation // 90)
    except (decord.DECORDError, decord.DECORDLimitReachedError, FFmpegError, RuntimeError, StopIteration) as error:
        raise DataError(
            f"{path}: decord cannot decode it (codec {source.codec}): the file is damaged, or its codec is unknown to "
            "decord; re-encode it as H.264."
        ) from error


def _order(source: VideoSource) -> tuple[list[int], list[int], list[int]]:
    """Returns each packet's rank in the order of display, the ranks that are displayed, and where decoding may start.

    It may start at a keyframe with all earlier packets displayed before it and all later ones after it.
    """
    by_time = sorted(range(len(source.packets)), key=lambda position: source.packets[position].time)
    ranks = np.argsort(by_time).tolist()
    displayed = [rank for rank, position in enumerate(by_time) if source.packets[position].displayed]
    highest = [-1, *accumulate(ranks, max)]
    starts = [0] + [
        position
        for position, packet in enumerate(source.packets)
        if position and packet.key and ranks[position] == position and highest[position] == position - 1
    ]
    return ranks, displayed, starts


def _decode_piece(stream, packets: list, ranks: list[int], wanted: list[int], turns: int) -> Iterator[np.ndarray]:
    """Decodes packets that begin with a keyframe, and yields the pictures of the wanted ranks."""
    import decord

    first = min(ranks)
    # decord repeats an earlier frame in place of one that it cannot decode; this makes the first one an error.
    options: dict[str, Any] = {"fault_tol": 1e-9}  # annotated as an int
    reader = decord.VideoReader(_remux(stream, packets, ranks), **options)
    remaining = set(wanted)
    for rank in range(first, wanted[-1] + 1):
        picture = reader.next()
        if rank not in remaining:
            continue
        frame = picture.asnumpy()
        height, width, channels = frame.shape
        if channels != 3:
            # decord takes the padding at the end of narrow rows for more channels.
            frame = frame.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)
        yield np.ascontiguousarray(np.rot90(frame, turns))


def _remux(stream, packets: list, ranks: list[int]) -> io.BytesIO:
    import av

    first = min(ranks)
    delay = max(position - (rank - first) for position, rank in enumerate(ranks))
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        copy = container.add_stream_from_template(stream, opaque=True)
        for position, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.stream, packet.time_base = copy, Fraction(1, 1000)
            packet.pts = PACKET_MILLISECONDS * (rank - first + delay)
            packet.dts = PACKET_MILLISECONDS * position
            container.mux_one(packet)
    file.seek(0)
    return file
