"""Finds the scenes of a film: cuts by PySceneDetect, over pictures that are decoded in the order of display."""

import importlib.util
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from mochi_tune.data_prep.frames import read_pictures
from mochi_tune.data_prep.probe import ROUNDING, read_index
from mochi_tune.data_prep.timeline import Picture
from mochi_tune.errors import ConfigError, DataError

DETECTORS = ("adaptive", "content", "threshold")
# PySceneDetect's own. Source: Breakthrough/PySceneDetect@v0.7.2 scenedetect/detectors/*.py, the detectors' arguments.
DEFAULT_THRESHOLDS = {"adaptive": 3.0, "content": 27.0, "threshold": 12.0}
# Pixels of the longer side of what the detector sees.
# Source: Breakthrough/PySceneDetect@v0.7.2 scenedetect/scene_manager.py, DEFAULT_MIN_WIDTH.
DETECTOR_PIXELS = 256
# Pictures between two reports of how far it is.
REPORT_EVERY = 10


@dataclass(frozen=True)
class SceneRules:
    """How a film is divided.

    Attributes:
        detector: adaptive (a picture that differs much more than its neighbours), content (a picture that differs) or
            threshold (the picture goes dark and comes back).
        threshold: of the detector.
        margin_seconds: left out on each side of a cut that was found.
        min_seconds: shorter scenes give no clip.
        max_seconds: longer scenes are divided.
    """

    detector: Literal["adaptive", "content", "threshold"] = "adaptive"
    threshold: float = DEFAULT_THRESHOLDS["adaptive"]
    margin_seconds: float = 0.1
    min_seconds: float = 1.25
    max_seconds: float = 6.0

    def check(self) -> None:
        """Refuses lengths that contradict each other.

        Raises:
            ConfigError: the longest clip is shorter than the shortest one.
        """
        if self.max_seconds < self.min_seconds:
            raise ConfigError(
                f"max_seconds={self.max_seconds:g} is less than min_seconds={self.min_seconds:g}: no clip can be both."
            )


@dataclass(frozen=True)
class Scene:
    """A scene, or a part of one.

    Attributes:
        number: of the scene in its film, from 1.
        part: of a scene that was divided, from 1; 0 is a whole one.
        start_seconds: when its first picture is shown, from the film's first picture on.
        end_seconds: when its last picture ends.
        num_frames: pictures that it has.
        is_short: it is too short for a clip.
    """

    number: int
    part: int
    start_seconds: float
    end_seconds: float
    num_frames: int
    is_short: bool


def check_scenedetect() -> None:
    """Refuses to begin without PySceneDetect.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("scenedetect") is None:
        raise ConfigError('split needs PySceneDetect, which is not installed: pip install "mochi-tune[footage]".')
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        # OpenCV, which it uses, is linked with libraries that a small system lacks.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"split needs PySceneDetect, which cannot be imported ({reason}): install what is missing, or "
            "opencv-python-headless in the place of opencv-python."
        ) from None


def find_scenes(path: Path, rules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decodes a film and finds its scenes; runs in a child process.

    Args:
        path: of the film.
        rules: the values of `SceneRules`.

    Yields:
        {"total": pictures that it is expected to have}, {"pictures": decoded since the last report} now and then, and
        {"scenes": the values of each `Scene`}.

    Raises:
        DataError: the film cannot be read, or its pictures change their size.
    """
    wanted = SceneRules(**rules)
    video = read_index(path)
    yield {"total": video.scan.num_source_frames}
    detector = _Detector(wanted, Fraction(video.scan.source_fps).limit_denominator(1001))
    times: list[Fraction] = []
    last: Picture | None = None
    for picture in read_pictures(path, video):
        _check_same_size(path, last, picture)
        detector.look_at(len(times), picture)
        times.append(picture.time)
        last = picture
        if len(times) % REPORT_EVERY == 0:
            yield {"pictures": REPORT_EVERY}
    if last is None:
        raise DataError(f"{path}: not one frame of it can be decoded: it is damaged; remove it.")
    yield {"pictures": len(times) % REPORT_EVERY}
    end = last.time + last.duration - times[0]
    scenes = plan_scenes([time - times[0] for time in times], end, detector.cuts, wanted)
    yield {"scenes": [asdict(scene) for scene in scenes]}


def plan_scenes(times: Sequence[Fraction], end: Fraction, cuts: Sequence[int], rules: SceneRules) -> list[Scene]:
    """Returns the scenes between the cuts, without margins and divided by their length.

    Args:
        times: when each picture is shown, in seconds, ascending; the first one at 0.
        end: when the last picture ends.
        cuts: numbers of pictures that begin a scene, ascending, without the first picture.
        rules: margins and lengths.
    """
    # Matroska rounds times to the millisecond.
    rounding, margin = Fraction(ROUNDING), Fraction(rules.margin_seconds)
    ends = [*times[1:], end]
    scenes = []
    for number, (begins, stops) in enumerate(zip([0, *cuts], [*cuts, len(times)], strict=True), start=1):
        first, stop = begins, stops
        if first:
            first = bisect_left(times, times[first] + margin - rounding)
        if stop < len(times):
            stop = bisect_right(ends, times[stop] - margin + rounding)
        if stop <= first:
            # The margins leave nothing of it.
            whole = (round(float(time), 4) for time in (times[begins], ends[stops - 1]))
            scenes.append(Scene(number, 0, *whole, num_frames=0, is_short=True))
            continue
        parts = _divide(times, ends, first, stop, rules)
        for part, (begin, behind) in enumerate(parts, start=1):
            is_short = ends[behind - 1] - times[begin] < Fraction(rules.min_seconds) - rounding
            start_seconds, end_seconds = (round(float(time), 4) for time in (times[begin], ends[behind - 1]))
            scenes.append(
                Scene(number, part if len(parts) > 1 else 0, start_seconds, end_seconds, behind - begin, is_short)
            )
    return scenes


def _divide(
    times: Sequence[Fraction], ends: Sequence[Fraction], first: int, stop: int, rules: SceneRules
) -> list[tuple[int, int]]:
    """Returns the parts of a scene: equal ones, or full ones without the rest where equal ones would be too short."""
    begin, length = times[first], ends[stop - 1] - times[first]
    rounding, longest = Fraction(ROUNDING), Fraction(rules.max_seconds)
    count = max(-(-(length - rounding) // longest), 1)
    size = length / count
    if count > 1 and size < Fraction(rules.min_seconds):
        count, size = length // longest, longest
    bounds = [bisect_left(times, begin + size * i - rounding, first, stop) for i in range(int(count) + 1)]
    if begin + size * count + rounding >= ends[stop - 1]:
        bounds[-1] = stop
    return [(one, other) for one, other in pairwise(bounds) if other > one]


class _Detector:
    """A detector of PySceneDetect that is given pictures by their numbers; `cuts` are those that begin a scene."""

    def __init__(self, rules: SceneRules, fps: Fraction) -> None:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

        # A short scene gives no clip, and is not joined with its neighbour: that clip would have a cut inside.
        if rules.detector == "adaptive":
            self._detector: Any = AdaptiveDetector(adaptive_threshold=rules.threshold, min_scene_len=0)
        elif rules.detector == "content":
            self._detector = ContentDetector(threshold=rules.threshold, min_scene_len=0)
        else:
            self._detector = ThresholdDetector(threshold=rules.threshold, min_scene_len=0)
        self._fps = fps
        self._cuts: set[int] = set()

    @property
    def cuts(self) -> list[int]:
        return sorted(self._cuts - {0})

    def look_at(self, number: int, picture: Picture) -> None:
        from scenedetect import FrameTimecode

        image = picture.image
        scale = min(DETECTOR_PIXELS / max(image.width, image.height), 1)
        width, height = (max(round(side * scale), 2) for side in (image.width, image.height))
        small = image.reformat(width=width, height=height, format="bgr24").to_ndarray()
        # Its own readers count frames by time and rate; here each picture has its number.
        found = self._detector.process_frame(FrameTimecode(number, fps=self._fps), small)
        self._cuts |= {cut.frame_num for cut in found}


def _check_same_size(path: Path, last: Picture | None, picture: Picture) -> None:
    if last is None or (last.image.width, last.image.height) == (picture.image.width, picture.image.height):
        return
    raise DataError(
        f"{path}: its pictures change from {last.image.width}x{last.image.height} to "
        f"{picture.image.width}x{picture.image.height} pixels at {float(picture.time):.2f} s: cut it there first."
    )
