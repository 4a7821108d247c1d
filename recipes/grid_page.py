"""Writes the page of a grid: videos in labelled rows and columns, playable from a folder without a network."""

import io
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import islice
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from mochi_tune.errors import DataError
from mochi_tune.files import write_atomic
from mochi_tune.pages import video_tables
from mochi_tune.pages.html_page import Head, data_uri, document, scrollable
from mochi_tune.sampling.grid_video import frames_of

POSTER_SIZE = 320
# Seconds until the progress bar appears.
BAR_DELAY = 1
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
    """A video, its place (the table of its prompt, and the labels of its row and column) and its number of frames."""

    prompt: str
    row: str
    column: str
    video: Path
    num_frames: int


@dataclass(frozen=True)
class _Poster:
    """The size of a video or an image in pixels, and the middle frame of a video as a data: URI."""

    width: int
    height: int
    uri: str = ""


def write_grid_page(folder: Path, cells: Sequence[GridCell], columns: Sequence[str]) -> Path:
    """Writes index.html, which refers to the videos by relative names; replaces an existing page.

    Args:
        folder: folder of the page; the videos are in it.
        cells: the cells in order, grouped by prompt.
        columns: labels of the columns from left to right.
    """
    by_prompt: dict[str, list[GridCell]] = {}
    for cell in cells:
        by_prompt.setdefault(cell.prompt, []).append(cell)
    num_frames = {cell.video: cell.num_frames for cell in cells}
    bar = tqdm(num_frames.items(), "page", unit="video", leave=False, delay=BAR_DELAY)
    posters = {video: _poster(video, count) for video, count in bar}
    sections = [_section(folder, each, columns, posters) for each in by_prompt.values()]
    rows = len({cell.row for cell in cells})
    head = Head(
        "Grid",
        "Every prompt with every seed, checkpoint and strength. All videos of a seed start from the same noise.",
        {
            "videos": (str(len(posters)), "each with its settings in a .json next to it"),
            "prompts": (str(len(by_prompt)), "one table each"),
            "rows": (str(rows), _from_to(list(dict.fromkeys(cell.row for cell in cells)))),
            "columns": (str(len(columns)), _from_to(columns)),
        },
    )
    path = folder / "index.html"
    write_atomic(path, document(head, video_tables.STYLE + STYLE, "\n".join(sections) + video_tables.SCRIPT).encode())
    return path


def _from_to(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"from {labels[0]} to {labels[-1]}"


def _section(folder: Path, cells: Sequence[GridCell], columns: Sequence[str], posters: Mapping[Path, _Poster]) -> str:
    """Returns the table of one prompt."""
    by_place = {(cell.row, cell.column): cell.video for cell in cells}
    rows = list(dict.fromkeys(cell.row for cell in cells))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = ""
    for row in rows:
        body += f'<tr><th scope="row">{escape(row)}</th>'
        for column in columns:
            video, label = by_place.get((row, column)), ", ".join(filter(None, (row, column)))
            body += f"<td>{_video(folder, video, posters[video], label) if video else ''}</td>"
        body += "</tr>"
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    table = f'<table style="--n:{len(columns)}">{head}<tbody>{body}</tbody></table>'
    return f"<section><h2>{escape(cells[0].prompt)}</h2>{scrollable(cells[0].prompt, table)}</section>"


def _poster(video: Path, num_frames: int) -> _Poster:
    """Reads the poster of a video; only its middle frame is converted to RGB, which takes longer than decoding.

    Raises:
        DataError: the video is damaged.
    """
    if video.suffix == ".png":
        [image] = frames_of(video)
        return _Poster(*image.size)
    import av
    from av.error import FFmpegError

    try:
        with av.open(f"file:{video}") as container:
            [middle] = deque(islice(container.decode(video=0), num_frames // 2 + 1), maxlen=1)
            frame = middle.to_image()
    except (FFmpegError, ValueError):  # Without any frame, there is no middle one.
        raise DataError(f"{video} is damaged: remove it, and the same command renders it again.") from None
    width, height = frame.size
    frame.thumbnail((POSTER_SIZE, POSTER_SIZE))
    content = io.BytesIO()
    frame.save(content, "JPEG", quality=80)
    return _Poster(width, height, data_uri("image/jpeg", content.getvalue()))


def _video(folder: Path, video: Path, poster: _Poster, label: str) -> str:
    """Returns the HTML of a video or an image; the poster of a video is also shown in print."""
    source, label = quote(os.path.relpath(video, folder).replace(os.sep, "/")), escape(label, quote=True)
    size = f'width="{poster.width}" height="{poster.height}"'
    if not poster.uri:
        return f'<img src="{source}" {size} alt="{label}">'
    return (
        f'<video loop muted playsinline preload="metadata" {size} aria-label="{label}" '
        f'poster="{poster.uri}" src="{source}"></video>'
    )
