"""Writes a self-contained HTML page about what a lesson taught the toy model."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from torch import Tensor

from mochi_tune.files import write_atomic
from mochi_tune.pages import charts
from mochi_tune.pages.charts import Line, Mark, line_chart, running_mean
from mochi_tune.pages.html_page import Head, data_uri, document, figures_list, section
from mochi_tune.toy.trail import trail_svg

STYLE = """
body{padding-top:2rem}
header p{max-width:none;font-size:1.05rem}
.prompt{margin:1.3rem 0 .7rem;font-weight:600}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:1rem;max-width:64rem}
.pair figcaption{font-size:1rem}.pair b{color:var(--ink)}
.figures{margin-top:1.1rem;padding:1rem 0;max-width:64rem}.figures .value{font-size:2.6rem;white-space:nowrap}
button{margin-top:.6rem;padding:.25rem 1rem;border:1px solid var(--rule);border-radius:6px;background:none;
color:var(--ink);font:inherit;font-size:.85rem;cursor:pointer}
.clip{position:relative;overflow:hidden;aspect-ratio:3/2;border-radius:6px;background:var(--rule)}
.clip img,.clip canvas{display:block;width:100%;height:100%;image-rendering:pixelated}
.clip img{object-fit:cover;object-position:bottom}
.clip svg{position:absolute;inset:0;margin:0;height:100%}
.trail polyline,.trail polygon{fill:none;stroke:#333;stroke-linejoin:round;stroke-linecap:round}
.trail polygon{fill:#fff}.trail .inner{stroke:#fff}
.clips{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(max(8.5rem,100%/(var(--n) + .9)),1fr))}
.rows{display:grid;gap:2rem 2.5rem}
.pairs{grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.alone{max-width:28rem}.alone h3{margin:0}
details{margin-top:1rem;padding-top:1rem;border-top:1px solid var(--rule)}
section+details{margin-top:3.2rem}
summary{cursor:pointer;font-size:1.1rem;font-weight:600}
details>:nth-child(2){margin-top:1.2rem}details .figures{max-width:none;border:0}
details .figures .value{font-size:1.6rem}
:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
pre{margin:1rem 0 0;padding:1.2rem 1.4rem;border:1px solid var(--rule);border-radius:6px;
font:.78rem/1.5 ui-monospace,"SF Mono",Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;overflow-wrap:anywhere}
pre.settings{columns:3 17rem;column-gap:2rem}
@media(max-width:34rem){body{padding:1rem .8rem 3rem}header p{font-size:1rem}.prompt{margin-top:.9rem}
.pair{gap:.5rem}.pair figcaption{font-size:.9rem}
.figures{grid-template-columns:1.5fr 1fr;gap:1rem}.figures .value{font-size:1.7rem}}
@media print{section,.rows article,figure{break-inside:avoid}button{display:none}}
"""

# One clock plays all clips in slow motion and holds their last frame. Readers without scripts, or who prefer reduced
# motion, see the last frame. Scaling takes the nearest pixel, so nothing is blurred.
SCRIPT = """
addEventListener("load",()=>{const FPS=12,HOLD=10,clips=[...document.querySelectorAll(".clip img")].map(img=>{
const c=document.createElement("canvas"),n=+img.dataset.frames;c.width=img.naturalWidth;c.height=img.naturalHeight/n;
c.setAttribute("role","img");c.setAttribute("aria-label",img.alt);img.replaceWith(c);const d=c.getContext("2d");
return t=>d.drawImage(img,0,-c.height*Math.min(t%(n+HOLD),n-1))});
const button=document.querySelector("button"),show=t=>clips.forEach(clip=>clip(t));
let time=HOLD+12,last=null,plays=false;
const tick=now=>{if(!plays)return;if(last===null)last=now;
if(now-last>=1000/FPS){time++;last=now;show(time)}requestAnimationFrame(tick)},
set=on=>{plays=on;last=null;button.textContent=on?"Pause":"Play";if(on)requestAnimationFrame(tick)};
button.hidden=false;button.onclick=()=>set(!plays);show(12);time=-1;
set(!matchMedia("(prefers-reduced-motion:reduce)").matches)})
"""


@dataclass(frozen=True)
class Row:
    """One prompt and its clips of one seed, uint8 frames (F, H, W, 3). The page shows each key under its clip."""

    prompt: str
    clips: Mapping[str, Tensor]


@dataclass(frozen=True)
class Report:
    """The content of the page. No list may be empty.

    Attributes:
        title: a few words.
        summary: one sentence.
        pair: two clips, before and after the lesson.
        results: label -> value as text, and its meaning; at the top of the page.
        taught: some training clips with their captions.
        stopping: explains which step was chosen.
        validation: (step, validation loss) pairs.
        lowest: step of the lowest validation loss among the kept checkpoints.
        samples: pairs of before and after.
        strengths: prompts, each at increasing strengths of the LoRA.
        success_by_strength: strength, share of samples with the new motion, share of old captions obeyed.
        losses: (step, training loss) pairs.
        figures: other figures, as `results`.
        commands: the commands, one per line.
        settings: settings of the run as YAML.
    """

    title: str
    summary: str
    pair: Row
    results: Mapping[str, tuple[str, str]]
    taught: Row
    stopping: str
    validation: list[tuple[int, float]]
    lowest: int
    samples: list[Row]
    strengths: list[Row]
    success_by_strength: list[tuple[float, float, float]]
    losses: list[tuple[int, float]]
    figures: Mapping[str, tuple[str, str]]
    commands: str
    settings: str


def write_report(path: Path, report: Report) -> None:
    """Writes the page, with all clips embedded, atomically.

    Args:
        path: .html file, which is replaced; its folder exists.
        report: content of the page.
    """
    write_atomic(path, _page(report).encode(), durable=True)


def _page(report: Report) -> str:
    same_noise = "Both of a pair start from the same noise. The first captions of each kind, not chosen."
    strengths = "One prompt and one seed in each row; only the strength of the LoRA grows. At 0 it is the base."
    content = [
        section("What it was shown", report.taught.prompt, _clips(report.taught, 6)),
        section("When to stop", report.stopping, _validation(report)),
        _folded("More samples", f'<p class="note">{same_noise}</p>{_rows(report.samples)}'),
        _folded("Less of the LoRA, or all of it", f'<p class="note">{strengths}</p>{_rows(report.strengths)}'),
        _folded("Curves and figures", _curves(report) + figures_list(report.figures)),
        _folded("Commands", f"<pre>{escape(report.commands.strip())}</pre>"),
        _folded("Settings", f'<pre class="settings">{escape(report.settings.strip())}</pre>'),
    ]
    head = Head(report.title, report.summary, report.results, _pair(report.pair))
    return document(head, charts.STYLE + STYLE, "\n".join(content) + f"\n<script>{SCRIPT}</script>")


def _folded(heading: str, content: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{content}</details>"


def _pair(row: Row) -> str:
    figures = ""
    for label, frames in row.clips.items():
        when, colon, what = label.partition(":")
        words = f"<b>{escape(when)}</b>{colon}{escape(what)}"
        figures += f"<figure>{_clip(frames, label)}<figcaption>{words}</figcaption></figure>"
    return (
        f'<p class="prompt">{escape(row.prompt)}</p><div class="pair">{figures}</div>'
        '<button type="button" hidden>Pause</button>'
    )


def _rows(rows: Sequence[Row]) -> str:
    """Prompts with their clips below, two prompts side by side if each has at most two clips."""
    arrangement = "rows pairs" if all(len(row.clips) <= 2 for row in rows) else "rows"
    articles = "".join(f"<article><h3>{escape(row.prompt)}</h3>{_clips(row, len(row.clips))}</article>" for row in rows)
    return f'<div class="{arrangement}">{articles}</div>'


def _clips(row: Row, columns: int) -> str:
    figures = "".join(
        f"<figure>{_clip(frames, label)}<figcaption>{escape(label)}</figcaption></figure>"
        for label, frames in row.clips.items()
    )
    return f'<div class="clips" style="--n:{columns}">{figures}</div>'


def _clip(frames: Tensor, label: str) -> str:
    """A clip as one picture with all frames below each other, and the trail of its shape on top."""
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(frames.flatten(0, 1).numpy()).save(picture, "WEBP", lossless=True, quality=50)
    source = data_uri("image/webp", picture.getvalue())
    image = f'<img src="{source}" alt="{escape(label)}" data-frames="{len(frames)}">'
    return f'<div class="clip">{image}{trail_svg(frames)}</div>'


def _validation(report: Report) -> str:
    losses = dict(report.validation)
    mark = (
        Mark(f"lowest: step {report.lowest}", (report.lowest, losses[report.lowest]))
        if report.lowest in losses
        else None
    )
    line = Line("clips that it was not trained on", "accent", report.validation)
    chart = line_chart("Validation loss", [line], "step", "mean squared error", mark=mark)
    return f'<div class="alone">{chart}</div>'


def _curves(report: Report) -> str:
    window = max(1, len(report.losses) // 20)
    mean = running_mean(report.losses, window)
    shows = [(strength, 100 * new) for strength, new, _ in report.success_by_strength]
    obeys = [(strength, 100 * base) for strength, _, base in report.success_by_strength]
    each, smooth = Line("each step", "thin", report.losses), Line(f"mean of {window} steps", "accent", mean)
    success = [Line("shows the new thing", "accent", shows), Line("base captions obeyed", "plain", obeys)]
    drawn = [
        line_chart("Training loss", [each, smooth], "step", "mean squared error"),
        line_chart("Success by strength", success, "strength of the LoRA", "% of samples", y_range=(0, 100)),
    ]
    return f'<div class="charts">{"".join(drawn)}</div>'
