"""Line charts as SVG in the colours of the page."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

# Size of a chart, its plot area, and the minimum distance of two numbers, in pixels.
CHART_WIDTH, CHART_HEIGHT = 354, 220
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 38, 306, 24, 184
MIN_GAP = 14
STYLE = """
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;min-height:1.5em;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:1.2em;margin-right:.4em;vertical-align:.28em;border-top:2px solid}
.legend .thin{border-top-width:1px}
svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--soft)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke:currentColor}polyline.thin{stroke-width:.8}
circle{fill:currentColor}svg .end{fill:currentColor;font-weight:600}
svg line.mark{stroke:var(--soft);stroke-dasharray:2 3}svg circle.mark{fill:none;stroke:var(--ink);stroke-width:1.5}
svg text.mark{fill:var(--ink);font-weight:600}
.accent{color:var(--accent)}.plain{color:var(--soft)}
.thin{color:color-mix(in srgb,var(--accent) 38%,var(--back))}
.level1{color:var(--level1)}.level2{color:var(--level2)}.level3{color:var(--level3)}
svg{overflow:visible}
:root{--level1:#7a4fb5;--level2:#b83280;--level3:#c2410c}
@media(prefers-color-scheme:dark){:root{--level1:#b79cf0;--level2:#f28bc4;--level3:#ffab7a}}
"""


@dataclass(frozen=True)
class Line:
    """A line of at least one point. Its style is `accent`, `plain`, `thin` or `level1` to `level3`."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Mark:
    """A labelled point of a chart."""

    label: str
    point: tuple[float, float]


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Returns the mean of the last `window` values at each point, or of fewer values at the start."""
    sums = [0.0, *accumulate(y for _, y in points)]
    return [(x, (sums[i] - sums[max(0, i - window)]) / min(i, window)) for i, (x, _) in enumerate(points, 1)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_unit: str,
    y_unit: str,
    y_range: tuple[float, float] | None = None,
    mark: Mark | None = None,
) -> str:
    """Returns an HTML figure of the lines with round tick values. The x axis goes from 0 to the largest x.

    Args:
        title: title of the chart.
        lines: lines in drawing order. The last value of each is printed at its end, unless its style is `thin`.
        x_unit: unit of x.
        y_unit: unit of y.
        y_range: range of the y axis; points outside are drawn at its ends. None: the range of all points.
        mark: point to label.
    """
    x_high = max(x for line in lines for x, _ in line.points) or 1
    kept = [_thinned(line.points, x_high) for line in lines]
    everything = [point for points in kept for point in points]
    low, high = y_range or (min(y for _, y in everything), max(y for _, y in everything))
    y_ticks = round_ticks(low, high)
    low, high = y_ticks[0], y_ticks[-1]
    # Nearly equal values have one tick.
    span = (high - low) or 1

    def to_pixels(point: tuple[float, float]) -> tuple[float, float]:
        across, up = point[0] / x_high, min(max((point[1] - low) / span, 0), 1)
        return PLOT_LEFT + across * (PLOT_RIGHT - PLOT_LEFT), PLOT_BOTTOM - up * (PLOT_BOTTOM - PLOT_TOP)

    is_whole = all(x == int(x) for x, _ in everything)
    x_ticks = [x for x in round_ticks(0, x_high, is_whole) if x <= x_high]
    drawn = _axes(
        [(to_pixels((x, low))[0], f"{x:g}") for x in x_ticks], [(to_pixels((0, y))[1], f"{y:g}") for y in y_ticks]
    )
    drawn += f'<text x="0" y="11">{escape(y_unit)}</text>'
    drawn += f'<text x="{PLOT_RIGHT}" y="{CHART_HEIGHT - 4}" text-anchor="end">{escape(x_unit)}</text>'
    drawn += "".join(_line(line, list(map(to_pixels, points))) for line, points in zip(lines, kept, strict=True))
    drawn += _mark(mark, *to_pixels(mark.point)) if mark is not None else ""
    drawn += _ends([(line, to_pixels(line.points[-1])[1]) for line in lines if line.style != "thin"])
    entries = [f'<span><i class="{line.style}"></i>{escape(line.label)}</span>' for line in lines]
    # Lines may share an entry.
    legend = "".join(dict.fromkeys(entries))
    return (
        f'<figure><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg>'
        "</figure>"
    )


def round_ticks(low: float, high: float, is_whole: bool = False) -> list[float]:
    """Returns about five evenly spaced round values that include the range from `low` to `high`.

    Args:
        low: smallest value.
        high: largest value.
        is_whole: whether all ticks must be whole numbers.
    """
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= (high - low) / 4 * (1 - 1e-9))
    step = math.ceil(step) if is_whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    """Returns the grid lines and the tick values. A tick is a position in pixels and a text."""
    across = "".join(
        f'<line class="grid" x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{PLOT_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        for y, text in y_ticks
    )
    down = "".join(
        f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM + 4}"/>'
        f'<text x="{x:.1f}" y="{PLOT_BOTTOM + 17}" text-anchor="middle">{text}</text>'
        for x, text in x_ticks
    )
    return (
        f'{across}{down}<line class="axis" x1="{PLOT_LEFT}" x2="{PLOT_RIGHT}" y1="{PLOT_BOTTOM}" y2="{PLOT_BOTTOM}"/>'
    )


def _line(line: Line, pixels: Sequence[tuple[float, float]]) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in pixels) if len(pixels) <= 12 else ""
    return f'<g class="{line.style}"><polyline class="{line.style}" points="{points}"/>{dots}</g>'


def _thinned(points: Sequence[tuple[float, float]], x_high: float) -> Sequence[tuple[float, float]]:
    """Keeps only the highest and the lowest point of each pixel column if there are very many points."""
    if len(points) <= 2 * CHART_WIDTH:
        return points
    columns: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        columns.setdefault(int(point[0] / x_high * (PLOT_RIGHT - PLOT_LEFT)), []).append(point)
    kept = []
    for column in columns.values():
        kept += sorted({min(column, key=lambda p: p[1]), max(column, key=lambda p: p[1])})
    return kept


def _mark(mark: Mark, x: float, y: float) -> str:
    """Returns a ring around a point and a vertical line through it with a label."""
    # Marks are mostly lowest points, so the label is at the top, away from the curve, unless the point is there.
    anchor, aside = ("end", -7) if x > (PLOT_LEFT + PLOT_RIGHT) / 2 else ("start", 7)
    height = PLOT_TOP + 12 if y > PLOT_TOP + 24 else PLOT_BOTTOM - 8
    return (
        f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{PLOT_TOP}" y2="{PLOT_BOTTOM}"/>'
        f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
        f'<text class="mark" x="{x + aside:.1f}" y="{height:.1f}" text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _ends(lines: Sequence[tuple[Line, float]]) -> str:
    """Returns the last value of each line at its height, moved down where two would overlap."""
    texts, lowest = "", -math.inf
    for line, y in sorted(lines, key=lambda pair: pair[1]):
        lowest = max(y, lowest + MIN_GAP)
        value = f"{line.points[-1][1]:.3g}"
        texts += f'<text class="end {line.style}" x="{PLOT_RIGHT + 8}" y="{lowest + 4:.1f}">{value}</text>'
    return texts
