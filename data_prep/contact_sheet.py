"""Contact sheets: pictures of many clips with their names."""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mochi_tune.data_prep.colour import RgbConverter
from mochi_tune.data_prep.frames import image_matrix, read_pictures
from mochi_tune.data_prep.orientation import turn_upright
from mochi_tune.data_prep.probe import read_index
from mochi_tune.files import write_atomic

# Maximum size of a picture in pixels; pictures per clip; clips per row and per sheet.
BOX_WIDTH, BOX_HEIGHT, NUM_PICTURES = 152, 86, 3
NUM_COLUMNS, CLIPS_PER_SHEET = 3, 120
LABEL_HEIGHT, GAP, EDGE = 34, 14, 2
PAPER, INK, SOFT, REST = "#fcfcfa", "#1c2127", "#626a75", "#e3e4de"


@dataclass(frozen=True)
class SheetClip:
    """A clip on a sheet: its name, a line of text, and JPEG pictures."""

    name: str
    note: str
    pictures: Sequence[bytes]


def read_thumbnails(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Reads evenly spaced pictures of a clip, first and last included; a job of `WatchedProcess`.

    Yields:
        {} regularly, to show progress, and finally {"jpegs": pictures in base64, at most BOX_WIDTH x BOX_HEIGHT}.

    Raises:
        DataError: the clip cannot be read.
    """
    from PIL import Image

    video = read_index(path)
    last = len(video.ticks) - 1
    wanted = {round(i * last / max(count - 1, 1)) for i in range(count)} if count > 1 else {last // 2}
    converter, jpegs = RgbConverter(path, video.scan.hdr), []
    for number, picture in enumerate(read_pictures(path, video)):
        if number in wanted:
            rgb = picture.image
            if not isinstance(rgb, np.ndarray):
                rgb = turn_upright(converter.convert(rgb), image_matrix(picture))
            scale = min(BOX_WIDTH / video.scan.width, BOX_HEIGHT / video.scan.height)
            size = max(round(video.scan.width * scale), 1), max(round(video.scan.height * scale), 1)
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(rgb)).resize(size, Image.Resampling.BOX).save(file, "JPEG", quality=85)
            jpegs.append(base64.b64encode(file.getvalue()).decode())
        if number % 50 == 0:
            yield {}
    yield {"jpegs": jpegs}


def write_sheets(path: Path, clips: Sequence[SheetClip]) -> list[Path]:
    """Writes the sheet PATH, and more sheets with _2, _3 and so on if there are many clips; returns the files.

    Raises:
        OSError: writing failed.
    """
    written = []
    for number, begin in enumerate(range(0, len(clips), CLIPS_PER_SHEET), start=1):
        sheet = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        file = io.BytesIO()
        _draw(clips[begin : begin + CLIPS_PER_SHEET]).save(file, "PNG")
        write_atomic(sheet, file.getvalue())
        written.append(sheet)
    number = len(written) + 1
    while (old := path.with_stem(f"{path.stem}_{number}")).exists():
        # Left from an earlier run with more clips.
        old.unlink()
        number += 1
    return written


def _draw(clips: Sequence[SheetClip]) -> Any:
    from PIL import Image, ImageDraw, ImageFont

    cell_width = NUM_PICTURES * (BOX_WIDTH + EDGE) - EDGE
    cell_height = BOX_HEIGHT + LABEL_HEIGHT
    columns = min(NUM_COLUMNS, len(clips))
    rows = -(-len(clips) // columns)
    size = columns * (cell_width + GAP) + GAP, rows * (cell_height + GAP) + GAP
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, clip in enumerate(clips):
        left = GAP + number % columns * (cell_width + GAP)
        top = GAP + number // columns * (cell_height + GAP)
        for place, jpeg in enumerate(clip.pictures):
            x = left + place * (BOX_WIDTH + EDGE)
            draw.rectangle((x, top, x + BOX_WIDTH - 1, top + BOX_HEIGHT - 1), fill=REST)
            with Image.open(io.BytesIO(jpeg)) as picture:
                sheet.paste(picture, (x + (BOX_WIDTH - picture.width) // 2, top + (BOX_HEIGHT - picture.height) // 2))
        for line, (text, colour) in enumerate(((clip.name, INK), (clip.note, SOFT))):
            fitted = _fit(draw, text, font, cell_width)
            draw.text((left, top + BOX_HEIGHT + 3 + 15 * line), fitted, fill=colour, font=font)
    return sheet


def _fit(draw: Any, text: str, font: Any, width: int) -> str:
    """Shortens a text at its beginning to fit a width in pixels."""
    text = text.encode(errors="backslashreplace").decode()
    if draw.textlength(text, font=font) <= width:
        return text
    while draw.textlength("…" + text, font=font) > width:
        text = text[1:]
    return "…" + text
