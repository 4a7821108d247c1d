"""The path of a shape through a clip as an arrow, so that a still picture shows the motion."""

import math
from dataclasses import dataclass

from torch import Tensor

from mochi_tune.toy.measure import MIN_TRAVEL, track

# Sizes of the arrow, in pixels of the clip.
HEAD_LENGTH, HEAD_WIDTH, LINE_WIDTH, EDGE_WIDTH = 7.0, 6.5, 1.5, 0.6

Point = tuple[float, float]


@dataclass(frozen=True)
class Trail:
    """The points of an arrow's line, oldest first, and the corners of its head, in pixels of the clip."""

    line: list[Point]
    head: list[Point]


def trail_of(frames: Tensor) -> Trail | None:
    """Returns the trail of the shape in a clip, uint8 frames (F, H, W, 3); None if the shape hardly moves."""
    centres: list[Point] = [(x, y) for x, y in track(frames).tolist()]
    if len(centres) < 2 or math.dist(centres[0], centres[-1]) < MIN_TRAVEL:
        return None
    (x, y), (end_x, end_y) = centres[0], centres[-1]
    length = math.dist(centres[0], centres[-1])
    along = ((end_x - x) / length, (end_y - y) / length)

    def corner(forward: float, aside: float) -> Point:
        return end_x + forward * along[0] - aside * along[1], end_y + forward * along[1] + aside * along[0]

    # The tip is ahead of the last centre, and the line ends inside the head.
    half = HEAD_LENGTH / 2
    head = [corner(half, 0), corner(-half, HEAD_WIDTH / 2), corner(-half, -HEAD_WIDTH / 2)]
    line = [centre for centre in centres[:-1] if math.dist(centre, centres[-1]) > half]
    return Trail([*line, corner(-half, 0)], head)


def trail_svg(frames: Tensor) -> str:
    """Returns the trail as an SVG to be placed over the clip, "" if there is none."""
    trail = trail_of(frames)
    if trail is None:
        return ""
    _, height, width, _ = frames.shape
    line, head = (" ".join(f"{x:.1f},{y:.1f}" for x, y in points) for points in (trail.line, trail.head))
    edge = LINE_WIDTH + 2 * EDGE_WIDTH
    return (
        f'<svg class="trail" viewBox="0 0 {width} {height}" aria-hidden="true">'
        f'<polyline points="{line}" style="stroke-width:{edge}"/>'
        f'<polygon points="{head}" style="stroke-width:{2 * EDGE_WIDTH}"/>'
        f'<polyline class="inner" points="{line}" style="stroke-width:{LINE_WIDTH}"/></svg>'
    )
