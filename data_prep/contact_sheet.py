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
_BOX_WIDTH, _BOX_HEIGHT, NUM_PICTURES = 152, 86, 3
_NUM_COLUMNS, _CLIPS_PER_SHEET = 3, 120
_LABEL_HEIGHT, _GAP, _EDGE = 34, 14, 2
_PAPER, _INK, _SOFT, _REST = "#fcfcfa", "#1c2127", "#626a75", "#e3e4de"


@dataclass(frozen=True)
class SheetClip:
    """A clip on a sheet: its name, a line of text, and JPEG pictures."""

    name: str
    note: str
    pictures: Sequence[bytes]


def read_thumbnails(path: Path, count: int) -> Iterator[dict[str, Any]]:
    """Reads evenly spaced pictures of a clip, first and last included; a job of `WatchedProcess`.

    Yields:
        {} regularly, to show progress, and finally {"jpegs": pictures in base64, at most _BOX_WIDTH x _BOX_HEIGHT}.

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
            scale = min(_BOX_WIDTH / video.scan.width, _BOX_HEIGHT / video.scan.height)
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
    for number, begin in enumerate(range(0, len(clips), _CLIPS_PER_SHEET), start=1):
        sheet = path if number == 1 else path.with_stem(f"{path.stem}_{number}")
        file = io.BytesIO()
        _draw(clips[begin : begin + _CLIPS_PER_SHEET]).save(file, "PNG")
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

    cell_width = NUM_PICTURES * (_BOX_WIDTH + _EDGE) - _EDGE
    cell_height = _BOX_HEIGHT + _LABEL_HEIGHT
    columns = min(_NUM_COLUMNS, len(clips))
    rows = -(-len(clips) // columns)
    size = columns * (cell_width + _GAP) + _GAP, rows * (cell_height + _GAP) + _GAP
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, clip in enumerate(clips):
        left = _GAP + number % columns * (cell_width + _GAP)
        top = _GAP + number // columns * (cell_height + _GAP)
        for place, jpeg in enumerate(clip.pictures):
            x = left + place * (_BOX_WIDTH + _EDGE)
            draw.rectangle((x, top, x + _BOX_WIDTH - 1, top + _BOX_HEIGHT - 1), fill=_REST)
            with Image.open(io.BytesIO(jpeg)) as picture:
                sheet.paste(picture, (x + (_BOX_WIDTH - picture.width) // 2, top + (_BOX_HEIGHT - picture.height) // 2))
        for line, (text, colour) in enumerate(((clip.name, _INK), (clip.note, _SOFT))):
            fitted = _fit(draw, text, font, cell_width)
            draw.text((left, top + _BOX_HEIGHT + 3 + 15 * line), fitted, fill=colour, font=font)
    return sheet


def _fit(draw: Any, text: str, font: Any, width: int) -> str:
    """Shortens a text at its beginning to fit a width in pixels."""
    text = text.encode(errors="backslashreplace").decode()
    if draw.textlength(text, font=font) <= width:
        return text
    while draw.textlength("…" + text, font=font) > width:
        text = text[1:]
    return "…" + text
