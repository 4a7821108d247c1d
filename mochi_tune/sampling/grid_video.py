"""Combines many videos into one video or picture: a labelled grid whose tiles play at the same time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mochi_tune.models.latents import FPS
from mochi_tune.sampling.formats import MP4, PNG
from mochi_tune.sampling.video import write_video

# Maximum size in pixels that hardware decoders support.
MAX_WIDTH, MAX_HEIGHT = 3840, 2160
GAP, HEADER, MIN_LABEL = 8, 44, 120
# Number of pixels in height and width below which a tile shows nothing.
MIN_TILE = 30
BACK, INK, SOFT = (20, 23, 27), (230, 232, 234), (152, 160, 170)


@dataclass(frozen=True)
class Row:
    """A row of the grid.

    Attributes:
        label: text at the left of the row.
        videos: files of the videos, one for each column; None for an empty tile.
    """

    label: str
    videos: Sequence[Path | None]


def is_legible(num_rows: int, num_columns: int) -> bool:
    """Whether the tiles of a grid are large enough to see."""
    return min(_room(num_rows, num_columns)) >= MIN_TILE


def write_grid_video(folder: Path, rows: Sequence[Row], columns: Sequence[str], fps: float = FPS) -> Path:
    """Writes grid.mp4, or grid.png if no video has a second frame; an existing file is replaced.

    Shorter videos stay at their last frame. Large grids are scaled down, so that players can decode them.

    Args:
        folder: folder of the new file.
        rows: the rows from top to bottom.
        columns: texts above the columns.
        fps: frames per second.
    """
    from PIL import Image

    videos = [video for row in rows for video in row.videos if video]
    firsts = [next(frames_of(video)) for video in videos]
    tile = _tile_size(max(f.width for f in firsts), max(f.height for f in firsts), len(columns), len(rows))
    width, height = tile
    label = max(MIN_LABEL, min(280, width))
    sides = label + len(columns) * (width + GAP), HEADER + len(rows) * (height + GAP)
    background = Image.new("RGB", (sides[0] + sides[0] % 2, sides[1] + sides[1] % 2), BACK)
    for column, text in enumerate(columns):
        write_text(background, text, (label + column * (width + GAP), 8, width, HEADER - 8), INK)
    for number, row in enumerate(rows):
        write_text(background, row.label, (8, HEADER + number * (height + GAP), label - 16, height), SOFT)
    places = {
        (label + column * (width + GAP), HEADER + number * (height + GAP)): video
        for number, row in enumerate(rows)
        for column, video in enumerate(row.videos)
        if video
    }
    frames = _composed(background, places, tile)
    first = next(frames)
    second = next(frames, None)
    if second is None:
        return write_video(folder / "grid.png", [first], encoding=PNG)
    return write_video(folder / "grid.mp4", _chain([first, second], frames), fps=fps, encoding=MP4)


def frames_of(path: Path) -> Iterator[Any]:
    """Yields the frames of a video or a picture as PIL images."""
    from PIL import Image

    if path.suffix == ".png":
        with Image.open(path) as image:
            yield image.convert("RGB")
        return
    import av

    with av.open(f"file:{path}") as container:
        for frame in container.decode(video=0):
            yield frame.to_image()


def write_text(image: Any, text: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]) -> None:
    """Draws text into a box (left, top, width, height), in as many lines as fit; longer text is cut with "…".

    Pillow's default font has only Latin letters; other scripts are shown as boxes.
    """
    from PIL import ImageDraw, ImageFont

    left, top, width, height = box
    font, draw, line_height = ImageFont.load_default(15), ImageDraw.Draw(image), 19
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if not lines[-1] or draw.textlength(longer, font) <= width:
                lines[-1] = longer
            else:
                lines.append(word)
    most = max(1, height // line_height)
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]}…"]
    for number, line in enumerate(lines):
        while len(line) > 1 and draw.textlength(line, font) > width:
            line = f"{line.rstrip('…')[:-1]}…"
        draw.text((left, top + number * line_height), line, colour, font)


def _room(num_rows: int, num_columns: int) -> tuple[float, float]:
    """Returns the largest width and height of a tile."""
    return (MAX_WIDTH - MIN_LABEL) / num_columns - GAP, (MAX_HEIGHT - HEADER) / num_rows - GAP


def _tile_size(width: int, height: int, num_columns: int, num_rows: int) -> tuple[int, int]:
    """Returns the size of a tile, scaled down so that the grid has at most MAX_WIDTH x MAX_HEIGHT pixels."""
    most = _room(num_rows, num_columns)
    share = min(1.0, most[0] / width, most[1] / height)
    # The label of a row is as wide as a tile, up to 280 pixels.
    while share < 1 and min(280, width * share) + num_columns * (width * share + GAP) > MAX_WIDTH:
        share *= 0.99
    return max(2, int(width * share) // 2 * 2), max(2, int(height * share) // 2 * 2)


def _composed(background: Any, places: dict[tuple[int, int], Path], tile: tuple[int, int]) -> Iterator[Tensor]:
    """Yields the frames (1, H, W, 3) of the grid until the longest video ends."""
    import numpy as np

    running, shown = {place: frames_of(video) for place, video in places.items()}, {}
    canvas = background.copy()
    while True:
        fresh = {place: frame for place, frames in running.items() if (frame := next(frames, None)) is not None}
        if not fresh:
            return
        shown |= fresh
        for (left, top), frame in fresh.items():
            small = frame.copy()
            small.thumbnail(tile)
            canvas.paste(small, (left + (tile[0] - small.width) // 2, top + (tile[1] - small.height) // 2))
        yield torch.from_numpy(np.array(canvas))[None]


def _chain(first: Sequence[Tensor], rest: Iterator[Tensor]) -> Iterator[Tensor]:
    yield from first
    yield from rest
