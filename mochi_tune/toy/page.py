"""Writes one HTML page, which needs nothing beside it, that shows what a lesson taught the toy model."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from mochi_tune.files import write_atomic
from mochi_tune.pages import charts
from mochi_tune.pages.charts import Line, line_chart, running_mean
from mochi_tune.pages.html_page import Head, data_uri, document, section
from mochi_tune.sampling.video import read_frames

BEFORE_AFTER_NOTE = "Both of a pair start from the same noise. Under each: its first, middle and last frame."
STYLE = """
.rows{display:grid;gap:2rem 2.5rem}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.videos{display:flex;flex-wrap:wrap;gap:1rem}
.videos figure{flex:0 0 max(8.5rem,min(240px,(100% - (var(--n) - 1)*1rem)/var(--n) - .1px))}
video,figure img{display:block;width:100%;height:auto;border-radius:6px;outline:1px solid var(--rule);
background:var(--rule)}
figure img{margin-top:3px;border-radius:3px}
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
    return document(head, charts.STYLE + STYLE, "\n".join(sections) + f"\n<script>{SCRIPT}</script>")


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
    drawn = [
        line_chart("Training loss", [each, smooth], "step", "mean squared error"),
        line_chart("Validation loss", [Line("fixed clips, noise and sigmas", "accent", report.validation)], "step",
                   "mean squared error"),
        line_chart("Success by strength", success, "strength of the LoRA", "% of samples", y_range=(0, 100)),
    ]  # fmt: skip
    return f'<div class="charts">{"".join(drawn)}</div>'
