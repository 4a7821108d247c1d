"""Reads plain videos with decord, when data.decoder=decord asks for it.

decord returns the same frames as PyAV, bit for bit, when it reads from the beginning. `auto` never uses it, for two
reasons measured with decord 0.6: a seek into HEVC with open groups returns wrong frames without an error (number 35 for
61), and it decodes ahead without a limit (37 of 1800 frames of 640x360 pixels took 1 GB). PyAV's seek to a keyframe is
as fast and has neither fault.
"""

import importlib.util
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np

from mochi_tune.data_prep.probe import VideoIndex
from mochi_tune.data_prep.timeline import Picture
from mochi_tune.errors import ConfigError, DataError

_PLAIN_CODECS = ("h264", "hevc", "vp9", "mpeg4")
# Maximum deviation of times in seconds: some containers round to the millisecond.
_MAX_DEVIATION = 0.002


def check_decord() -> None:
    """Checks that decord is installed, without importing it.

    Raises:
        ConfigError: it is not; there is none for processors other than x86-64.
    """
    if importlib.util.find_spec("decord") is None:
        raise ConfigError(
            "data.decoder=decord needs decord, which is not installed: use data.decoder=auto, or pip install decord."
        )


def is_plain(video: VideoIndex) -> bool:
    """Whether decord reads a file correctly: progressive SDR at a constant rate, upright, square pixels."""
    scan = video.scan
    return (
        scan.codec in _PLAIN_CODECS
        and scan.container.startswith(("mov", "matroska"))
        and scan.is_constant_rate
        and scan.color_matrix in ("BT.601", "BT.709", "BT.601 (assumed)")
        and not (scan.is_interlaced or scan.hdr or scan.rotation or scan.is_mirrored or scan.has_discontinuity)
        and scan.pixel_aspect == 1
    )


def read_with_decord(path: Path, video: VideoIndex, stop: int) -> Iterator[Picture]:
    """Yields the pictures before number `stop`; none if decord's count or times differ from PyAV's.

    Raises:
        DataError: decord cannot decode the file.
    """
    import av  # noqa: F401  before decord, which makes its own old codecs visible to libraries that are loaded later
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path.absolute()))
        if len(reader) != len(video.ticks) or not _has_times(reader, video):
            return
        for begin, end in pairwise([*video.ticks, video.end_tick][: stop + 1]):
            frame = reader.next().asnumpy()
            if frame.shape[:2] != (video.scan.height, video.scan.width):
                raise RuntimeError("its pictures change their size")
            # decord returns the padding of narrow rows as additional channels.
            frame = frame.reshape(frame.shape[0], -1)[:, : 3 * video.scan.width].reshape(*frame.shape[:2], 3)
            yield Picture(Fraction(begin, video.second), Fraction(end - begin, video.second), frame, "decord")
    except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, StopIteration) as error:
        raise DataError(
            f"{path}: decord cannot decode it (codec {video.scan.codec}): use data.decoder=auto, or re-encode it."
        ) from error


def _has_times(reader, video: VideoIndex) -> bool:
    """Whether the times of the reader's frames, from the first one, match those of the packets."""
    begins = np.array(reader.get_frame_timestamp(range(len(reader))))[:, 0]
    times = np.array(video.ticks) / video.second
    return bool(np.abs((begins - begins[0]) - (times - times[0])).max() <= _MAX_DEVIATION)
