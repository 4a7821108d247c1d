"""The table of scenes, which `split` writes and the user may edit."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath

from mochi_tune.data.text_files import read_text
from mochi_tune.errors import DataError
from mochi_tune.files import write_atomic

# Status of a row: not cut yet, cut, cut and removed by the user since, too short for a clip, or refused with an error.
PLANNED, CUT, REMOVED, SHORT, REFUSED = "", "cut", "removed", "short", "refused"
SUFFIX = ".mp4"


@dataclass(frozen=True)
class SceneRow:
    """A row of the table.

    Attributes:
        source: the film's path in the folder of footage.
        scene: number of the scene in its film, with its part: "3", "4.1"; "" for a film that cannot be used.
        start_seconds: from the film's first picture.
        end_seconds: as `start_seconds`.
        frames: number of pictures of the clip.
        file: the clip's path in the output folder; "" if it is not to be cut.
        status: PLANNED, CUT, REMOVED, SHORT or REFUSED.
        reason: why the row is REFUSED.
        source_bytes: size of the film in which the scene was found.
    """

    source: str
    scene: str = ""
    start_seconds: float = 0.0
    end_seconds: float = 0.0
    frames: int = 0
    file: str = ""
    status: str = PLANNED
    reason: str = ""
    source_bytes: int = 0


_COLUMNS = [field.name for field in fields(SceneRow)]


def read_scenes(path: Path) -> list[SceneRow]:
    """Reads the table; [] if it does not exist.

    Raises:
        DataError: the file is not such a table, a number is malformed, a scene ends before it begins, or two rows have
            the same file.
    """
    rows, files = _read_rows(path), {}
    for number, row in enumerate(rows, start=2):
        if row.file and row.file in files:
            raise DataError(f"{path} row {number}: names {row.file}, as row {files[row.file]} does: change one.")
        files[row.file] = number
    return rows


def read_written(path: Path) -> set[SceneRow]:
    """Reads the rows of a table as it was last written, from its copy; an empty set if there is no copy.

    Raises:
        DataError: the copy is damaged.
    """
    return set(_read_rows(_copy_of(path)))


def _read_rows(path: Path) -> list[SceneRow]:
    if not path.exists():
        return []
    try:
        # Spreadsheet programs write UTF-16, semicolons and tabs.
        text, _ = read_text(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8: save it as CSV in UTF-8.") from None
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        if missing := [name for name in _COLUMNS if name not in (reader.fieldnames or ())]:
            raise DataError(
                f"{path}: lacks the column {missing[0]}: restore it, or delete the table to find scenes again."
            )
        return [_read_row(f"{path} row {number}", values) for number, values in enumerate(reader, start=2)]
    except csv.Error as error:
        raise DataError(f"{path}: is not CSV ({error}): restore it, or delete it to find the scenes again.") from None


def _read_row(where: str, values: dict[str, str | None]) -> SceneRow:
    texts = {name: (values[name] or "").strip() for name in _COLUMNS}
    numbers = {}
    for name in ("start_seconds", "end_seconds", "frames", "source_bytes"):
        try:
            numbers[name] = float((texts[name] or "0").replace(",", "."))
        except ValueError:
            numbers[name] = math.nan
        if not 0 <= numbers[name] < math.inf:
            raise DataError(f"{where}: {name}={texts[name]} is not a number of at least 0: correct it.")
    file = texts["file"]
    if file:
        parts = PurePosixPath(file)
        if parts.is_absolute() or ".." in parts.parts or parts.suffix != SUFFIX or parts.name.startswith("."):
            raise DataError(f"{where}: file={file} is not a path in the output folder ending in {SUFFIX}: correct it.")
        if numbers["end_seconds"] <= numbers["start_seconds"]:
            raise DataError(f"{where}: end_seconds={texts['end_seconds']} is not after start_seconds: correct it.")
    return SceneRow(
        texts["source"], texts["scene"], round(numbers["start_seconds"], 4), round(numbers["end_seconds"], 4),
        int(numbers["frames"]), file, texts["status"], texts["reason"], int(numbers["source_bytes"]),
    )  # fmt: skip


def write_scenes(path: Path, rows: Sequence[SceneRow]) -> None:
    """Writes the table and its copy atomically, unless the files are up to date.

    Raises:
        OSError: writing failed.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS)
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    content = text.getvalue().encode(errors="surrogateescape")
    # The copy first: rows of the table that are not in it count as edited.
    for file in (_copy_of(path), path):
        if not file.exists() or file.read_bytes() != content:
            write_atomic(file, content, durable=True)


def _copy_of(path: Path) -> Path:
    """Returns the path of the copy of a table, which shows what the user has edited."""
    return path.with_name(f".{path.name}")
