"""Chooses the clips of a file: their buckets and first frames."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mochi_tune.config.schema import ClipMode, DataConfig
from mochi_tune.data.buckets import Bucket, Footage, choose_bucket
from mochi_tune.data_prep.clips import Cut, choose_frame_rate
from mochi_tune.data_prep.probe import Scan


def choose_cuts(
    scan: Scan,
    buckets: Sequence[Bucket],
    mode: ClipMode,
    data: DataConfig,
    shorter: str = "a smaller data.num_frames",
) -> list[Cut]:
    """Returns the cuts of a file, by ascending start, in the bucket that loses least.

    Args:
        scan: of the file.
        buckets: sizes to choose from.
        mode: which clips to cut; with `all`, the rest of a video goes to a shorter bucket of the same size.
        data: the other settings of the clips.
        shorter: the setting that makes clips shorter, for errors.

    Raises:
        DataError: no bucket fits the file. The message lacks the file's name.
    """
    rate = choose_frame_rate(scan, data.frame_rate)
    num_frames = scan.num_source_frames if rate == "retime" else scan.num_frames
    footage = Footage(num_frames, scan.height, scan.width, scan.is_still)
    bucket = choose_bucket(footage, buckets, data.allow_upscale, shorter)
    windows = [(start, bucket) for start in starts(num_frames, bucket.num_frames, mode, data)]
    if mode == "all" and len(windows) != data.max_clips:
        end = windows[-1][0] + bucket.num_frames
        same = [other for other in buckets if (other.height, other.width) == (bucket.height, bucket.width)]
        windows += [(end, rest) for rest in _longest(same, num_frames - end)]
    return [
        Cut(
            window.num_frames, window.height, window.width, start, data.allow_upscale, rate, data.hdr, data.decoder
        )
        for start, window in windows
    ]  # fmt: skip


def starts(num_frames: int, length: int, mode: ClipMode, data: DataConfig) -> list[int]:
    """Returns the first frames of the clips of `length` frames that are cut from `num_frames` frames."""
    room, most = num_frames - length, data.max_clips or num_frames
    if mode == "head":
        return [0]
    if mode == "uniform":
        count = min(most, num_frames // length)
        return [room // 2] if count == 1 else [round(i * room / (count - 1)) for i in range(count)]
    stride = length if mode == "all" else data.clip_stride or max(length // 2, 1)
    return list(range(0, room + 1, stride))[:most]


def _longest(buckets: Sequence[Bucket], num_frames: int) -> list[Bucket]:
    """Returns the longest bucket of more than one frame that fits into `num_frames`, in a list; [] if there is none."""
    fitting = [bucket for bucket in buckets if 1 < bucket.num_frames <= num_frames]
    return [max(fitting)] if fitting else []


def num_used_frames(cuts: Sequence[Cut]) -> int:
    """Returns the number of frames that are in at least one clip; `cuts` are by ascending start."""
    used = end = 0
    for cut in cuts:
        stop = cut.start + cut.num_frames
        used += max(stop - max(cut.start, end), 0)
        end = max(end, stop)
    return used


def decisive(cut: Cut) -> dict[str, Any]:
    """Returns the fields of a cut that determine the pixels, as JSON values."""
    values = asdict(cut)
    # All libraries decode to the same pictures.
    del values["decoder"]
    # These accept or refuse a file, and do not change its pixels: use constants.
    return values | {"allow_upscale": False, "hdr": "refuse"}
