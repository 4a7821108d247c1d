"""Times in a video: when each picture is shown, and which picture is shown at each frame at 30 fps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from mochi_tune.models.latents import FPS

Time = int | Fraction
FrameRate = Literal["resample", "retime"]
# Maximum step back of the clock, in seconds, that is a picture out of order; a larger one is a joined recording.
# Source: FFmpeg n7.1 fftools/ffmpeg_demux.c:300-340, ts_discontinuity_detect.
_MAX_DISORDER = Fraction(1, 10)
# Maximum step forward, in seconds, in formats whose clock may jump (MPEG-TS, MPEG-PS); a larger one is a joint too.
_MAX_GAP = 10


class Clock:
    """Turns a video's stored times into ascending ones; after a jump, time continues at the end of the last picture.

    Times are in seconds, or in integer ticks, which are faster to compute with.

    Args:
        period: duration of a picture if the file does not state it.
        may_jump: whether the format's clock may also jump forward.
        second: ticks per second.
    """

    def __init__(self, period: Time, may_jump: bool, second: int = 1) -> None:
        self.period = period
        self.may_jump = may_jump
        self.max_disorder, self.max_gap = _MAX_DISORDER * second, _MAX_GAP * second
        self.shift: Time = 0
        self.last: Time | None = None
        self.end: Time = 0
        self.has_jumped = False

    def read(self, stored: Time | None, duration: Time) -> Time | None:
        """Returns the time of a picture; None if it comes too late to be shown.

        Args:
            stored: time in the file; None continues at the end of the previous picture.
            duration: of the picture; 0 if unknown.
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
    """Returns the output frame nearest to a picture's begin; of two equally near, the later one.

    Source: FFmpeg n7.1 libavfilter/vf_fps.c:180-230, with its default round=near.
    """
    return math.floor(seconds * FPS + Fraction(1, 2))


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        time: of its begin, in seconds, later than the previous picture.
        duration: in seconds, if no other picture follows.
        image: an `av.VideoFrame`, or an upright uint8 RGB array (H, W, 3).
        decoder: the library that decoded it.
        was_interlaced: whether it consists of two fields.
    """

    time: Fraction
    duration: Fraction
    image: Any
    decoder: str = "pyav"
    was_interlaced: bool = False


@dataclass(frozen=True)
class Span:
    """A picture and the output frames that show it: from `begin` to `end`, exclusive; never empty."""

    picture: Picture
    begin: int
    end: int


def place_pictures(
    pictures: Iterator[Picture], first_time: Fraction, frame_rate: FrameRate, first_number: int = 0
) -> Iterator[Span]:
    """Yields each picture that is shown at an output frame; the last picture is shown for its duration.

    Args:
        pictures: by ascending time.
        first_time: of the video's first picture, which begins at output frame 0.
        frame_rate: resample shows, every 1/30 s, the latest picture; retime shows each picture for one frame.
        first_number: number of the first of `pictures` in the video, for retime.
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
        # A single picture is shown for at least one frame.
        end = max(end, 1)
        if begin < end:
            yield Span(held, begin, end)
