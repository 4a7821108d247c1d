"""Writes one HTML page, which needs nothing beside it, that shows what a lesson taught the toy model."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mochi_tune.data_prep.html_page import Head, data_uri, document, section
from mochi_tune.files import write_atomic
from mochi_tune.sampling.video import read_frames

# The chart's picture, its plot area inside, and how near to each other two numbers may be; all in pixels.
CHART_WIDTH, CHART_HEIGHT = 354, 220
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 38, 306, 24, 184
MIN_GAP = 14

BEFORE_AFTER_NOTE = "Both of a pair start from the same noise. Under each: its first, middle and last frame."
STYLE = """
.rows{display:grid;gap:2rem 2.5rem}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.videos{display:flex;flex-wrap:wrap;gap:1rem}
.videos figure{flex:0 0 max(8.5rem,min(240px,(100% - (var(--n) - 1)*1rem)/var(--n) - .1px))}
video,figure img{display:block;width:100%;height:auto;border-radius:6px;outline:1px solid var(--rule);
background:var(--rule)}
figure img{margin-top:3px;border-radius:3px}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;min-height:1.5em;color:var(--soft);font-size:.85rem}
.legend i{display:inline-block;width:1.2em;margin-right:.4em;vertical-align:.28em;border-top:2px solid}
.legend .thin{border-top-width:1px}
svg .grid{stroke:var(--rule)}svg .axis{stroke:var(--soft)}
polyline{fill:none;stroke-width:2;stroke-linejoin:round;stroke:currentColor}polyline.thin{stroke-width:.8}
circle{fill:currentColor}svg .end{fill:currentColor;font-weight:600}
.accent{color:var(--accent)}.plain{color:var(--soft)}
.thin{color:color-mix(in srgb,var(--accent) 38%,var(--back))}
pre{margin:1rem 0 0;padding:1.2rem 1.4rem;border:1px solid var(--rule);border-radius:6px;overflow-x:auto;
columns:3 17rem;column-gap:2rem;font:.78rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap}
@media print{body{padding:0}section,.rows article,figure{break-inside:avoid}}
"""

# The clips last less than half a second, so they are slowed down; each time a row's first video begins again, the
# others do so with it.
SCRIPT = """
addEventListener("load",()=>document.querySelectorAll(".videos").forEach(row=>{
const all=[...row.querySelectorAll("video")],now=()=>all[0].currentTime,
again=()=>all.forEach(v=>{if(Math.abs(v.currentTime-now())>.03)v.currentTime=now()});
all.forEach(v=>{v.playbackRate=.4;v.currentTime=0});all[0].addEventListener("seeked",again)}))
"""


@dataclass(frozen=True)
class Row:
    """One prompt and its videos, all from one seed; the keys are what is written under each."""

    prompt: str
    videos: dict[str, Path]


@dataclass(frozen=True)
class Report:
    """All that the page says; none of its lists is empty.

    Attributes:
        figures: by label, the value as text and what it means.
        losses: training loss by step.
        validation: validation loss by step.
        clips: some of the training clips, each under its caption.
        success_by_strength: strength, share of samples that show the new thing, share of base captions obeyed.
        settings: the run's settings as YAML.
    """

    title: str
    summary: str
    figures: dict[str, tuple[str, str]]
    losses: list[tuple[int, float]]
    validation: list[tuple[int, float]]
    clips: Row
    before_after: list[Row]
    strengths: list[Row]
    success_by_strength: list[tuple[float, float, float]]
    settings: str


@dataclass(frozen=True)
class Line:
    """A line of a chart, at least one point; its style is `accent`, `plain` or `thin`."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]


def write_report(path: Path, report: Report) -> None:
    """Writes the page with all videos inside; it appears whole.

    Args:
        path: an .html file, which is replaced; its folder exists.
        report: what the page says; its videos exist.
    """
    write_atomic(path, _page(report).encode(), durable=True)


def _page(report: Report) -> str:
    strengths = "One prompt and one seed in each row; only the strength of the LoRA grows. At 0 it is the base."
    sections = [
        section("What it was taught", report.clips.prompt, _videos(report.clips, columns=6)),
        section(
            "Before and after",
            "Both of a pair start from the same noise. Under each: its first, middle and last frame.",
            _rows(report.before_after),
        ),
        section("From the base to the LoRA", strengths, _rows(report.strengths, "strength ")),
        section("Curves", "How the loss fell, and what the LoRA's strength does.", _charts(report)),
        section("Settings", "What the run was made with.", f"<pre>{escape(report.settings.strip())}</pre>"),
    ]
    head = Head(report.title, report.summary, report.figures)
    return document(head, STYLE, "\n".join(sections) + f"\n<script>{SCRIPT}</script>")


def _rows(rows: Sequence[Row], prefix: str = "") -> str:
    """Prompts with their videos under them; two prompts side by side where each has no more than two videos."""
    arrangement = "rows pairs" if all(len(row.videos) <= 2 for row in rows) else "rows"
    articles = "".join(
        f"<article><h3>{escape(row.prompt)}</h3>{_videos(row, len(row.videos), prefix)}</article>" for row in rows
    )
    return f'<div class="{arrangement}">{articles}</div>'


def _videos(row: Row, columns: int, prefix: str = "") -> str:
    figures = "".join(
        f"<figure>{_video(path)}<figcaption>{escape(prefix + label)}</figcaption></figure>"
        for label, path in row.videos.items()
    )
    return f'<div class="videos" style="--n:{columns}">{figures}</div>'


def _video(path: Path) -> str:
    """A video, and under it its first, middle and last frame, so that a still page shows the motion."""
    from PIL import Image

    frames = read_frames(path)
    poster, strip, (width, height) = io.BytesIO(), io.BytesIO(), frames[0].size
    frames[len(frames) // 2].save(poster, "PNG")
    side_by_side = Image.new("RGB", (3 * width, height))
    for i, frame in enumerate((frames[0], frames[len(frames) // 2], frames[-1])):
        side_by_side.paste(frame, (i * width, 0))
    side_by_side.save(strip, "JPEG", quality=85)
    return (
        f'<video autoplay loop muted playsinline width="{width}" height="{height}" '
        f'poster="{data_uri("image/png", poster.getvalue())}" src="{data_uri("video/mp4", path.read_bytes())}">'
        f'</video><img alt="first, middle and last frame" src="{data_uri("image/jpeg", strip.getvalue())}">'
    )


def _charts(report: Report) -> str:
    window = max(1, len(report.losses) // 20)
    mean = running_mean(report.losses, window)
    shows = [(strength, 100 * new) for strength, new, _ in report.success_by_strength]
    obeys = [(strength, 100 * base) for strength, _, base in report.success_by_strength]
    each, smooth = Line("each step", "thin", report.losses), Line(f"mean of {window} steps", "accent", mean)
    success = [Line("shows the new thing", "accent", shows), Line("base captions obeyed", "plain", obeys)]
    charts = [
        line_chart("Training loss", [each, smooth], "step", "mean squared error"),
        line_chart("Validation loss", [Line("fixed clips, noise and sigmas", "accent", report.validation)], "step",
                   "mean squared error"),
        line_chart("Success by strength", success, "strength of the LoRA", "% of samples", y_range=(0, 100)),
    ]  # fmt: skip
    return f'<div class="charts">{"".join(charts)}</div>'


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Returns at each point the mean of the last `window` values, of fewer where fewer came before."""
    means = []
    for i, (x, _) in enumerate(points):
        last = [y for _, y in points[max(0, i + 1 - window) : i + 1]]
        means.append((x, sum(last) / len(last)))
    return means


def line_chart(
    title: str, lines: Sequence[Line], x_unit: str, y_unit: str, y_range: tuple[float, float] | None = None
) -> str:
    """Returns an HTML figure with the lines over round tick values; the x axis goes from 0 to the largest x.

    Args:
        title: what the chart shows.
        lines: drawn in order; at the end of each, unless it is thin, stands its last value.
        x_unit: what x counts.
        y_unit: what y counts.
        y_range: ends of the y axis; without it, round values around all points.
    """
    everything = [point for line in lines for point in line.points]
    x_high = max(x for x, _ in everything) or 1
    low, high = y_range or (min(y for _, y in everything), max(y for _, y in everything))
    y_ticks = round_ticks(low, high)
    low, high = y_ticks[0], y_ticks[-1]

    def to_pixels(point: tuple[float, float]) -> tuple[float, float]:
        across, up = point[0] / x_high, (point[1] - low) / (high - low)
        return PLOT_LEFT + across * (PLOT_RIGHT - PLOT_LEFT), PLOT_BOTTOM - up * (PLOT_BOTTOM - PLOT_TOP)

    x_ticks = [x for x in round_ticks(0, x_high) if x <= x_high]
    drawn = _axes(
        [(to_pixels((x, low))[0], f"{x:g}") for x in x_ticks], [(to_pixels((0, y))[1], f"{y:g}") for y in y_ticks]
    )
    drawn += f'<text x="0" y="11">{escape(y_unit)}</text>'
    drawn += f'<text x="{PLOT_RIGHT}" y="{CHART_HEIGHT - 4}" text-anchor="end">{escape(x_unit)}</text>'
    drawn += "".join(_line(line, [to_pixels(point) for point in line.points]) for line in lines)
    drawn += _ends([(line, to_pixels(line.points[-1])[1]) for line in lines if line.style != "thin"])
    legend = "".join(f'<span><i class="{line.style}"></i>{escape(line.label)}</span>' for line in lines)
    return (
        f'<figure><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
        f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" role="img" aria-label="{escape(title)}">{drawn}</svg>'
        "</figure>"
    )


def round_ticks(low: float, high: float) -> list[float]:
    """Returns about five round values, evenly spaced, the first not above `low` and the last not below `high`."""
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= (high - low) / 4 * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _axes(x_ticks: Sequence[tuple[float, str]], y_ticks: Sequence[tuple[float, str]]) -> str:
    """Grid lines and tick values; a tick is its pixel and its text."""
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


def _ends(lines: Sequence[tuple[Line, float]]) -> str:
    """The last value of each line, at its height and far enough from the next one to be read."""
    texts, lowest = "", -math.inf
    for line, y in sorted(lines, key=lambda pair: pair[1]):
        lowest = max(y, lowest + MIN_GAP)
        value = f"{line.points[-1][1]:.3g}"
        texts += f'<text class="end {line.style}" x="{PLOT_RIGHT + 8}" y="{lowest + 4:.1f}">{value}</text>'
    return texts
