"""Time in a video: when each picture is shown, and which one is on screen at each frame of 30 per second."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mochi_tune.models.latents import FPS

Time = int | Fraction
FrameRate = Literal["resample", "retime"]
# A step back by so much, in seconds, is a new recording that was joined on; a smaller one is a picture out of order.
# Source: FFmpeg n7.1 fftools/ffmpeg_demux.c:300-340, ts_discontinuity_detect.
MAX_DISORDER = Fraction(1, 10)
# A step forward by so much is a joint too, in formats whose clock may jump (MPEG-TS, MPEG-PS).
MAX_GAP = 10


class Clock:
    """Turns a video's stored times into ascending ones; a jump backwards goes on where the picture before ended.

    Times are in seconds, or in whole ticks, which are faster to count with.

    Args:
        period: how long a picture is shown if the file does not tell.
        may_jump: the format's clock may also jump forward.
        second: ticks of a second.
    """

    def __init__(self, period: Time, may_jump: bool, second: int = 1) -> None:
        self.period = period
        self.may_jump = may_jump
        self.max_disorder, self.max_gap = MAX_DISORDER * second, MAX_GAP * second
        self.shift: Time = 0
        self.last: Time | None = None
        self.end: Time = 0
        self.has_jumped = False

    def read(self, stored: Time | None, duration: Time) -> Time | None:
        """Returns when a picture is shown; None for one that comes too late to be shown.

        Args:
            stored: the picture's own time; None follows the picture before.
            duration: how long it is shown; 0 is unknown.
        """
        time = self.end if stored is None else stored + self.shift
        if self.last is not None:
            is_joint = time < self.last - self.max_disorder or (self.may_jump and time > self.end + self.max_gap)
            if is_joint:
                self.shift += self.end - time
                time, self.has_jumped = self.end, True
            elif time <= self.last:
                return None
        self.last, self.end = time, time + (duration or self.period)
        return time


def frame_number(seconds: Fraction) -> int:
    """Returns the output frame at which a picture begins, the nearest one; of two equally near the later.

    Source: FFmpeg n7.1 libavfilter/vf_fps.c:180-230, with its default round=near.
    """
    return math.floor(seconds * FPS + Fraction(1, 2))


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        time: when it is shown, in seconds, later than the picture before.
        duration: how long it is shown if none follows, in seconds.
        image: what was decoded: an `av.VideoFrame`, or an upright uint8 RGB (H, W, 3) array.
        decoder: the library that decoded it.
        was_interlaced: it was made of two fields.
    """

    time: Fraction
    duration: Fraction
    image: Any
    decoder: str = "pyav"
    was_interlaced: bool = False


@dataclass(frozen=True)
class Span:
    """A picture and the output frames that show it: from `begin` up to and without `end`, never empty."""

    picture: Picture
    begin: int
    end: int


def place_pictures(
    pictures: Iterator[Picture], first_time: Fraction, frame_rate: FrameRate, first_number: int = 0
) -> Iterator[Span]:
    """Yields each picture that is on screen at some output frame; the last one is held for its duration.

    Args:
        pictures: by ascending time.
        first_time: of the video's first picture, which begins at output frame 0.
        frame_rate: resample shows at each 1/30 s the picture that has begun last; retime shows each picture once.
        first_number: of the first one of `pictures` among all of the video, for retime.
    """
    if frame_rate == "retime":
        for number, picture in enumerate(pictures, first_number):
            yield Span(picture, number, number + 1)
        return
    held = None
    for picture in pictures:
        if held is not None:
            begin, end = frame_number(held.time - first_time), frame_number(picture.time - first_time)
            if begin < end:
                yield Span(held, begin, end)
        held = picture
    if held is not None:
        begin, end = (frame_number(time - first_time) for time in (held.time, held.time + held.duration))
        # A lone picture is shown, however short it is.
        end = max(end, 1)
        if begin < end:
            yield Span(held, begin, end)
