"""Writes the page of a grid: videos in labelled rows and columns, playable from a folder without a network."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from mochi_tune.files import write_atomic
from mochi_tune.pages import video_tables
from mochi_tune.pages.html_page import Head, data_uri, document
from mochi_tune.sampling.grid_video import frames_of

POSTER_SIZE = 320
STYLE = """
body{max-width:none;width:fit-content;min-width:min(100%,1148px)}
header,.figures{max-width:1100px}
section{margin-top:2.6rem}section>h2{max-width:70ch;font-size:1.1rem;overflow-wrap:anywhere}
tbody th{position:sticky;left:0;z-index:1;min-width:5rem;max-width:9rem;padding:.2rem .8rem .2rem 0;
background:var(--back);font-variant-numeric:tabular-nums}
video,td img{width:clamp(min(11rem,58vw),(min(100vw,1500px) - 16rem)/var(--n) - .6rem,22rem)}
@media(max-width:600px){tbody th{min-width:3.6rem;max-width:4.6rem}}
"""


@dataclass(frozen=True)
class GridCell:
    """A video and its place: the table of its prompt, and the labels of its row and column."""

    prompt: str
    row: str
    column: str
    video: Path


def write_grid_page(folder: Path, cells: Sequence[GridCell], columns: Sequence[str]) -> Path:
    """Writes index.html, which refers to the videos by relative names; replaces an existing page.

    Args:
        folder: folder of the page; the videos are in it.
        cells: the cells in order, grouped by prompt.
        columns: labels of the columns from left to right.
    """
    prompts = list(dict.fromkeys(cell.prompt for cell in cells))
    sections = [_section(folder, [cell for cell in cells if cell.prompt == prompt], columns) for prompt in prompts]
    videos = len({cell.video for cell in cells})
    rows = len({cell.row for cell in cells})
    head = Head(
        "Grid",
        "Every prompt with every seed, checkpoint and strength. All videos of a seed start from the same noise.",
        {
            "videos": (str(videos), "each with its settings in a .json next to it"),
            "prompts": (str(len(prompts)), "one table each"),
            "rows": (str(rows), _from_to(list(dict.fromkeys(cell.row for cell in cells)))),
            "columns": (str(len(columns)), _from_to(columns)),
        },
    )
    path = folder / "index.html"
    write_atomic(path, document(head, video_tables.STYLE + STYLE, "\n".join(sections) + video_tables.SCRIPT).encode())
    return path


def _from_to(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"from {labels[0]} to {labels[-1]}"


def _section(folder: Path, cells: Sequence[GridCell], columns: Sequence[str]) -> str:
    """Returns the table of one prompt."""
    by_place = {(cell.row, cell.column): cell.video for cell in cells}
    rows = list(dict.fromkeys(cell.row for cell in cells))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = ""
    for row in rows:
        videos = "".join(f"<td>{_video(folder, by_place.get((row, column)), row, column)}</td>" for column in columns)
        body += f'<tr><th scope="row">{escape(row)}</th>{videos}</tr>'
    head = f"<thead><tr><th></th>{head}</tr></thead>"
    table = f'<table style="--n:{len(columns)}">{head}<tbody>{body}</tbody></table>'
    return f'<section><h2>{escape(cells[0].prompt)}</h2><div class="scroll" tabindex="0">{table}</div></section>'


def _video(folder: Path, video: Path | None, row: str, column: str) -> str:
    """Returns the HTML of a video or an image; the middle frame of a video is its poster, also in print."""
    if video is None:
        return ""
    source = quote(os.path.relpath(video, folder).replace(os.sep, "/"))
    label = escape(", ".join(filter(None, (row, column))), quote=True)
    small, (width, height) = [], (0, 0)
    for frame in frames_of(video):
        width, height = frame.size
        frame.thumbnail((POSTER_SIZE, POSTER_SIZE))
        small.append(frame)
    if video.suffix == ".png":
        return f'<img src="{source}" width="{width}" height="{height}" alt="{label}">'
    content = io.BytesIO()
    small[len(small) // 2].save(content, "JPEG", quality=80)
    return (
        f'<video loop muted playsinline preload="metadata" width="{width}" height="{height}" aria-label="{label}" '
        f'poster="{data_uri("image/jpeg", content.getvalue())}" src="{source}"></video>'
    )
