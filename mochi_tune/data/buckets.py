"""Buckets, the sizes that clips are cut to, and the choice of the one that loses least of a video or a still."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from mochi_tune.errors import ConfigError, DataError
from mochi_tune.models.latents import FPS, TEMPORAL_FACTOR, TOKEN_PIXELS, check_geometry, num_visual_tokens

# Aspect ratios (width / height) of `auto` buckets; the inverse of each is used too. Screens, cameras, phones.
_ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 21 / 9)
# Kept shares that differ by less than this count as equal; then the larger bucket is chosen.
_ALIKE = 0.005


@dataclass(frozen=True, order=True)
class Bucket:
    """The size of a clip: frames (6k+1), height and width in pixels (multiples of 16)."""

    num_frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens of a clip."""
        return num_visual_tokens(self.num_frames, self.height, self.width)

    def __str__(self) -> str:
        return f"{self.num_frames} frame{'s' * (self.num_frames > 1)} of {self.height}x{self.width}"


@dataclass(frozen=True)
class Footage:
    """The size of a video or a still that clips are cut from.

    Attributes:
        num_frames: frames at the clips' frame rate.
        height: of the upright picture, in square pixels.
        width: of the upright picture, in square pixels.
        is_still: whether it is a single picture, which only fits buckets of one frame.
    """

    num_frames: int
    height: int
    width: int
    is_still: bool = False


def auto_buckets(max_frames: int, height: int, width: int) -> list[Bucket]:
    """Returns buckets of several aspect ratios and lengths, each with about height x width pixels.

    The lengths are `max_frames`, about a half, a quarter and so on of it, and one frame for stills.

    Args:
        max_frames: maximum number of frames, 6k+1.
        height: pixels; height x width itself is one of the sizes.
        width: pixels.
    """
    lengths = [max_frames]
    while lengths[-1] > TEMPORAL_FACTOR + 1:
        lengths.append(max(lengths[-1] // 2 // TEMPORAL_FACTOR, 1) * TEMPORAL_FACTOR + 1)
    sizes = {(height, width)}
    for aspect in _ASPECTS:
        short, long = (_whole_tokens(sqrt(height * width * ratio)) for ratio in (1 / aspect, aspect))
        sizes |= {(short, long), (long, short)}
    return sorted(Bucket(length, *size) for length in {*lengths, 1} for size in sizes)


def _whole_tokens(pixels: float) -> int:
    return max(round(pixels / TOKEN_PIXELS), 1) * TOKEN_PIXELS


def read_buckets(sizes: Sequence[Sequence[int]], name: str) -> list[Bucket]:
    """Returns the buckets that a setting lists.

    Args:
        sizes: [frames, height, width] of each bucket.
        name: of the setting, for errors.

    Raises:
        ConfigError: the list is empty, an entry has not three numbers or does not fit the models, or is listed twice.
    """
    buckets = []
    for size in sizes:
        if len(size) != 3:
            raise ConfigError(f"{name} has {list(size)}: a bucket is [frames, height, width], such as [37, 480, 848].")
        check_geometry(*size)
        buckets.append(Bucket(*size))
    if not buckets or len(set(buckets)) < len(buckets):
        raise ConfigError(f"{name}={[list(size) for size in sizes]}: list one or more buckets, each once.")
    return buckets


def kept_share(footage: Footage, bucket: Bucket, max_frames: int) -> float:
    """Returns the share of the picture that a clip of a bucket keeps, times the share of the first `max_frames`."""
    scale = scale_to(footage, bucket)
    picture = bucket.height * bucket.width / (scale**2 * footage.height * footage.width)
    return picture * bucket.num_frames / min(footage.num_frames, max_frames)


def scale_to(footage: Footage, bucket: Bucket) -> float:
    """Returns the factor by which a picture is scaled to cover a bucket."""
    return max(bucket.height / footage.height, bucket.width / footage.width)


def choose_bucket(
    footage: Footage, buckets: Sequence[Bucket], may_enlarge: bool, shorter: str = "a smaller data.num_frames"
) -> Bucket:
    """Returns the bucket that keeps most of the footage; of equal ones, the one with the most pixels.

    Args:
        footage: of one file.
        buckets: to choose from.
        may_enlarge: whether pictures smaller than the bucket fit too.
        shorter: the setting that makes clips shorter, for errors.

    Raises:
        DataError: no bucket fits. The message lacks the file's name.
    """
    # Videos are cut to a single frame only where no bucket has more frames.
    moving = [bucket for bucket in buckets if bucket.num_frames > 1] or buckets
    of_its_kind = [bucket for bucket in buckets if bucket.num_frames == 1] if footage.is_still else moving
    if not of_its_kind:
        raise DataError("is a still picture, and no bucket has one frame: use data.buckets=auto, or remove it.")
    long_enough = [bucket for bucket in of_its_kind if bucket.num_frames <= footage.num_frames]
    if not long_enough:
        fewest = min(bucket.num_frames for bucket in of_its_kind)
        raise DataError(
            f"is too short: has {footage.num_frames} frames at {FPS} fps, needs {fewest}: "
            f"use a longer clip or {shorter}."
        )
    large_enough = [bucket for bucket in long_enough if may_enlarge or scale_to(footage, bucket) <= 1]
    if not large_enough:
        smallest = min(long_enough, key=lambda bucket: scale_to(footage, bucket))
        raise DataError(
            f"is {footage.width}x{footage.height} pixels, too small for {smallest.width}x{smallest.height}: "
            f"set a smaller {'data.height and data.width' if len(buckets) == 1 else 'bucket or data.resolution'}, or "
            "data.allow_upscale=true."
        )
    max_frames = max(bucket.num_frames for bucket in buckets)
    shares = {bucket: kept_share(footage, bucket, max_frames) for bucket in large_enough}
    best = max(shares.values())
    alike = [bucket for bucket, share in shares.items() if share >= best * (1 - _ALIKE)]
    return max(alike, key=lambda bucket: (bucket.height * bucket.width, bucket.num_frames, bucket))
