"""Finds the scenes of a film with PySceneDetect, on pictures decoded in display order."""

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
# PySceneDetect's defaults.
# Source: Breakthrough/PySceneDetect@v0.7.2 scenedetect/detectors/*.py, the detectors' arguments.
DEFAULT_THRESHOLDS = {"adaptive": 3.0, "content": 27.0, "threshold": 12.0}
# Pixels of the longer side of pictures for the detector.
# Source: Breakthrough/PySceneDetect@v0.7.2 scenedetect/scene_manager.py, DEFAULT_MIN_WIDTH.
_DETECTOR_PIXELS = 256
# Number of pictures between two progress reports.
REPORT_EVERY = 10


@dataclass(frozen=True)
class SceneRules:
    """Rules for dividing a film into clips.

    Attributes:
        detector: adaptive (a picture changes much more than its neighbours), content (a picture changes) or threshold
            (fades to black and back).
        threshold: of the detector.
        margin_seconds: left out on both sides of each cut.
        min_seconds: minimum length of a clip; shorter scenes give none.
        max_seconds: maximum length of a clip; longer scenes are divided.
    """

    detector: Literal["adaptive", "content", "threshold"] = "adaptive"
    threshold: float = DEFAULT_THRESHOLDS["adaptive"]
    margin_seconds: float = 0.1
    min_seconds: float = 1.25
    max_seconds: float = 6.0

    def check(self) -> None:
        """Refuses lengths that contradict each other.

        Raises:
            ConfigError: max_seconds is less than min_seconds.
        """
        if self.max_seconds < self.min_seconds:
            raise ConfigError(
                f"max_seconds={self.max_seconds:g} is less than min_seconds={self.min_seconds:g}: no clip can fit both."
            )


@dataclass(frozen=True)
class Scene:
    """A scene, or a part of one.

    Attributes:
        number: of the scene in its film, from 1.
        part: number of the part, from 1; 0 for an undivided scene.
        start_seconds: begin of its first picture, from the film's first picture.
        end_seconds: end of its last picture.
        num_frames: number of its pictures.
        is_short: whether it is too short for a clip.
    """

    number: int
    part: int
    start_seconds: float
    end_seconds: float
    num_frames: int
    is_short: bool


def check_scenedetect() -> None:
    """Checks that PySceneDetect can be imported.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    if importlib.util.find_spec("scenedetect") is None:
        raise ConfigError('split needs PySceneDetect, which is not installed: pip install "mochi-tune[footage]".')
    try:
        import scenedetect  # noqa: F401
    except ImportError as error:
        # It uses OpenCV, which needs libraries that small systems lack.
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"split needs PySceneDetect, which cannot be imported ({reason}): install what is missing, or "
            "opencv-python-headless instead of opencv-python."
        ) from None


def find_scenes(path: Path, rules: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Decodes a film and finds its scenes; a job of `WatchedProcess`.

    Args:
        path: of the film.
        rules: the values of `SceneRules`.

    Yields:
        {"total": expected number of pictures}, {"pictures": decoded since the last report} regularly, and finally
        {"scenes": values of each `Scene`}.

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
        detector.process(len(times), picture)
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
    """Returns the scenes between the cuts, without margins, and divided if they are too long.

    Args:
        times: of each picture, in seconds, ascending, the first at 0.
        end: of the last picture, in seconds.
        cuts: numbers of the pictures that begin a scene, ascending, without the first picture.
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
    """Returns the equal parts of a scene; if these were too short, parts of max_seconds without the rest."""
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
    """A detector of PySceneDetect; `cuts` has the numbers of the pictures that begin a scene."""

    def __init__(self, rules: SceneRules, fps: Fraction) -> None:
        from scenedetect.detectors import AdaptiveDetector, ContentDetector, ThresholdDetector

        # min_scene_len=0: else short scenes would be merged with their neighbours into clips with a cut inside.
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

    def process(self, number: int, picture: Picture) -> None:
        from scenedetect import FrameTimecode

        image = picture.image
        scale = min(_DETECTOR_PIXELS / max(image.width, image.height), 1)
        width, height = (max(round(side * scale), 2) for side in (image.width, image.height))
        small = image.reformat(width=width, height=height, format="bgr24").to_ndarray()
        # A timecode of the picture's number at a constant rate, whatever its real time.
        found = self._detector.process_frame(FrameTimecode(number, fps=self._fps), small)
        self._cuts |= {cut.frame_num for cut in found}


def _check_same_size(path: Path, last: Picture | None, picture: Picture) -> None:
    if last is None or (last.image.width, last.image.height) == (picture.image.width, picture.image.height):
        return
    raise DataError(
        f"{path}: its pictures change from {last.image.width}x{last.image.height} to "
        f"{picture.image.width}x{picture.image.height} pixels at {float(picture.time):.2f} s: cut it there first."
    )
