"""Reads tables of captions: metadata.csv and similar files, or videos.txt with prompts.txt.

File names in a table are only compared with known videos; they are never opened.
"""

import csv
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mochi_tune.data.text_files import read_text
from mochi_tune.data_prep.finding import MEDIA_SUFFIXES, walk
from mochi_tune.errors import DataError, some

# Names of tables in Hugging Face folders, finetrainers, DiffSynth, LTX-Video-Trainer and FastVideo.
_TABLE_STEMS = ("metadata", "captions", "dataset", "videos2caption")
_TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")
# Common names of the two columns; the first that exists is used.
_FILE_KEYS = (
    "file_name", "video", "path", "media_path", "video_path", "file", "filename", "file_path", "filepath", "video_name",
    "file name",
)  # fmt: skip
CAPTION_KEYS = ("caption", "text", "prompt", "captions", "cap")
# Two lists of the same length, as in finetrainers and the CogVideoX scripts.
VIDEO_LISTS = ("videos.txt", "video.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
_DELIMITERS = (",", ";", "\t")
# Maximum characters of a name or a header in an error.
_MAX_SHOWN = 200
_SEPARATOR = re.compile(r'"?sep=([,;\t|])"?\s*', re.IGNORECASE)
_BARE_UTF16 = "contains NUL characters, like UTF-16 without a byte order mark: save it as UTF-8."


@dataclass(frozen=True)
class TableRow:
    """One row: its place, for errors; the video that it names; its captions, or the problem with them."""

    where: str
    file_name: str
    captions: tuple[str, ...]
    problem: str = ""


@dataclass(frozen=True)
class TableCaptions:
    """The rows of each video, in order, and lines for the user."""

    rows: dict[Path, list[TableRow]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_tables(folder: Path, videos: list[Path]) -> TableCaptions:
    """Reads all tables in `folder` and below it.

    Raises:
        DataError: a folder has two tables; a table is malformed, or none of its rows names one of `videos`.
    """
    found, tables, lists = TableCaptions(), _find_tables(folder), find_lists(folder)
    if not tables and not lists:
        return found
    names, there = _VideoNames(folder, videos), set(folder.rglob("*"))
    for table in sorted({*tables, *lists}):
        if table in tables:
            path = tables[table]
            rows, encoding = _read_table(path)
        else:
            path = lists[table][0]
            rows, encoding = _read_lists(*lists[table])
        if encoding == "cp1252":
            found.notes.append(f"{path}: is not UTF-8 and was read as cp1252; save it as UTF-8 if letters are wrong")
        unknown = []
        for row, video in zip(rows, names.find(path, [row.file_name for row in rows]), strict=True):
            if video is None:
                # An unused still exists, and is not an unknown video.
                if path.parent / row.file_name not in there:
                    unknown.append(row)
            else:
                found.rows.setdefault(video, []).append(row)
        if rows and len(unknown) == len(rows):
            where, example = rows[0].where.removeprefix(f"{path} "), os.path.relpath(videos[0], path.parent)
            raise DataError(
                f"{path}: none of its {len(rows)} rows names a video in {folder}: {where} names "
                f"{rows[0].file_name[:_MAX_SHOWN]}, a video is {example[:_MAX_SHOWN]}: write the names relative to "
                f"{path.parent}."
            )
        if unknown:
            found.notes.append(f"{path}: {_count_unknown(unknown)}")
    return found


def find_lists(folder: Path) -> dict[Path, tuple[Path, Path]]:
    """Returns the list of videos and the list of captions of each folder in `folder` that has both."""
    lists = {}
    for parent, names in _find_named(folder, {*VIDEO_LISTS, *CAPTION_LISTS}).items():
        pair = [next((names[name] for name in known if name in names), None) for known in (VIDEO_LISTS, CAPTION_LISTS)]
        if pair[0] is not None and pair[1] is not None:
            lists[parent] = (pair[0], pair[1])
    return lists


def _find_named(folder: Path, wanted: set[str]) -> dict[Path, dict[str, Path]]:
    """Returns the files with wanted names, by folder and name in lower case."""
    found: dict[Path, dict[str, Path]] = {}
    named = (Path(path) for path, name in walk(folder) if name.lower() in wanted)
    for path in sorted(path for path in named if path.is_file()):
        found.setdefault(path.parent, {}).setdefault(path.name.lower(), path)
    return found


def is_table_name(name: str) -> bool:
    """Whether a file of this name is read as a table, or as a part of one."""
    path = Path(name.lower())
    is_table = path.stem in _TABLE_STEMS and path.suffix in _TABLE_SUFFIXES
    return is_table or path.name in (*VIDEO_LISTS, *CAPTION_LISTS)


def find_other_tables(folder: Path, videos: Iterable[Path]) -> list[Path]:
    """Returns the files of a folder that may be tables but are not read, as their names are not those of tables."""
    stems = {*_TABLE_STEMS, *(video.stem for video in videos)}
    return sorted(p for p in folder.glob("*") if p.suffix.lower() in _TABLE_SUFFIXES and p.stem not in stems)


def _find_tables(folder: Path) -> dict[Path, Path]:
    tables = {}
    for parent, names in _find_named(
        folder, {stem + suffix for stem in _TABLE_STEMS for suffix in _TABLE_SUFFIXES}
    ).items():
        paths = list(names.values())
        if len(paths) > 1:
            raise DataError(f"{parent} has {' and '.join(path.name for path in paths)}: keep one of them.")
        if paths:
            tables[parent] = paths[0]
    return tables


class _VideoNames:
    """Finds the videos that rows name."""

    def __init__(self, folder: Path, videos: list[Path]) -> None:
        self._folder = folder
        self._videos = {}
        real = folder.resolve()
        for video in videos:
            self._videos[os.path.abspath(video)] = video
            self._videos[os.path.abspath(real / video.relative_to(folder))] = video
        # macOS stores accents decomposed, other systems composed: both are the same name.
        self._composed = {unicodedata.normalize("NFC", path): video for path, video in self._videos.items()}

    def find(self, table: Path, names: list[str]) -> list[Path | None]:
        """Returns the video of each name; all names of a table are relative to the same folder.

        This is the first of these folders with any of the videos: the table's folder, the one above it ("videos/a.mp4"
        in videos/metadata.csv), the folder of all videos, the working directory, or videos/ next to the table.
        """
        own = Path(os.path.abspath(table)).parent
        for base in (own, own.parent, self._folder, Path.cwd(), own / "videos"):
            found = [self._lookup(base, name) for name in names]
            if any(found):
                return found
        return [None] * len(names)

    def _lookup(self, base: Path, name: str) -> Path | None:
        if "\0" in name:
            return None
        # The second spelling is for Windows paths.
        paths = [os.path.abspath(os.path.join(base, spelling)) for spelling in (name, name.replace("\\", "/"))]
        exact = next((self._videos[path] for path in paths if path in self._videos), None)
        composed = (self._composed.get(unicodedata.normalize("NFC", path)) for path in paths)
        return exact or next(filter(None, composed), None)


def _count_unknown(rows: list[TableRow]) -> str:
    names = list(dict.fromkeys(row.file_name[:_MAX_SHOWN] for row in rows))
    number = "1 row names a video that is" if len(rows) == 1 else f"{len(rows)} rows name videos that are"
    return f"{number} not there: {some(names)}"


def _read_table(path: Path) -> tuple[list[TableRow], str]:
    text, encoding = _read(path)
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        rows = (_object_row(path, number, fields) for number, fields in _json_lines(path, text))
    elif suffix == ".json":
        rows = (_object_row(path, number, fields) for number, fields in enumerate(_json_list(path, text), start=1))
    else:
        rows = _csv_rows(path, text, _DELIMITERS if suffix == ".csv" else ("\t",))
    return list(rows), encoding


def _read(path: Path) -> tuple[str, str]:
    try:
        text, encoding = read_text(path, fallback="cp1252")
        # A NUL further down affects a single row only.
        if "\0" in text[:4]:
            raise DataError(f"{path}: {_BARE_UTF16}")
        return text, encoding
    except UnicodeDecodeError as error:
        if b"\0" in error.object[:4] and error.object[:1].isascii():
            raise DataError(f"{path}: {_BARE_UTF16}") from None
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None


def _read_lists(video_list: Path, caption_list: Path) -> tuple[list[TableRow], str]:
    encodings, lines = [], []
    for path in (video_list, caption_list):
        text, encoding = _read(path)
        encodings.append(encoding)
        lines.append([line.strip() for line in text.removesuffix("\n").split("\n")])
    names, captions = lines
    # Ignore blank lines at the end of either file.
    while len(captions) > len(names) and not captions[-1]:
        captions.pop()
    while len(names) > len(captions) and not names[-1]:
        names.pop()
    if len(names) != len(captions):
        raise DataError(
            f"{video_list} has {len(names)} lines and {caption_list.name} has {len(captions)}: write one video, and "
            "one caption, per line."
        )
    rows = [
        TableRow(f"{video_list} row {number}", name, (caption,))
        for number, (name, caption) in enumerate(zip(names, captions, strict=True), start=1)
        if name or caption
    ]
    for row in rows:
        if not row.file_name:
            raise DataError(f"{row.where}: is blank, and {caption_list.name} has a caption there: name the video.")
    return rows, "cp1252" if "cp1252" in encodings else "utf-8"


def _csv_rows(path: Path, text: str, delimiters: tuple[str, ...]) -> Iterator[TableRow]:
    """Yields the rows of a CSV file, numbered by their last line."""
    text, num_skipped, delimiters = _skip_to_header(text, delimiters)
    delimiter = _sniff_delimiter(text, delimiters)
    # Some files have a space after the separator, also before a quote. After a tab, a space belongs to the value.
    is_spaced = delimiter != "\t"
    reader = csv.reader(io.StringIO(text), strict=True, delimiter=delimiter, skipinitialspace=is_spaced)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        file_key, caption_key = _first_of(_FILE_KEYS, header), _first_of(CAPTION_KEYS, header)
        if file_key is None or caption_key is None or len(set(header)) < len(header):
            raise DataError(
                f"{path}: its columns are {', '.join(header)[:_MAX_SHOWN] or 'none'}, without duplicates: one of "
                f"{', '.join(_FILE_KEYS)} and one of {', '.join(CAPTION_KEYS)} are needed."
            )
        for row in reader:
            if not any(value.strip() for value in row):
                continue
            where = f"{path} row {num_skipped + reader.line_num}"
            if len(row) != len(header):
                raise DataError(
                    f"{where}: has {len(row)} fields where the header has {len(header)}: "
                    'put a caption that holds the separator into "double quotes".'
                )
            fields = dict(zip(header, row, strict=True))
            yield TableRow(where, _file_name(path, where, fields[file_key]), (fields[caption_key],))
    except csv.Error as error:
        raise DataError(f"{path} row {num_skipped + reader.line_num}: is not CSV ({error}): correct the row.") from None


def _skip_to_header(text: str, delimiters: tuple[str, ...]) -> tuple[str, int, tuple[str, ...]]:
    """Returns a CSV text from its header on, the number of lines before it, and the possible separators.

    Excel writes and reads a first line such as `sep=;` that sets the separator.
    """
    start = number = 0
    while start < len(text):
        end = found if (found := text.find("\n", start)) >= 0 else len(text)
        line = text[start:end]
        named = _SEPARATOR.fullmatch(line)
        if line.strip(" \t,;") and not named:
            break
        delimiters = (named[1],) if named else delimiters
        start, number = end + 1, number + 1
    return text[start:], number, delimiters


def _sniff_delimiter(text: str, delimiters: tuple[str, ...]) -> str:
    """Returns the separator with which the header has both columns, else the most frequent one in it."""
    line = text.partition("\n")[0]
    for delimiter in delimiters:
        names = [name.strip(' "').lower() for name in line.split(delimiter)]
        if _first_of(_FILE_KEYS, names) and _first_of(CAPTION_KEYS, names):
            return delimiter
    return max(delimiters, key=line.count)


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(), which also splits at characters that JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} row {number}: is not JSON ({error}): write one object per line.") from None


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error}): correct it.") from None
    if isinstance(value, dict) and any(key.lower().endswith(MEDIA_SUFFIXES) for key in value):
        # diffusion-pipe's captions.json maps names to captions.
        value = [{_FILE_KEYS[0]: name, CAPTION_KEYS[0]: captions} for name, captions in value.items()]
    if not isinstance(value, list):
        raise DataError(
            f"{path}: is not a list of objects, each with one of {', '.join(_FILE_KEYS)} and one of "
            f"{', '.join(CAPTION_KEYS)}: write such a list, or rename the file."
        )
    return value


def _object_row(path: Path, number: int, fields: Any) -> TableRow:
    where = f"{path} row {number}"
    names = list(fields) if isinstance(fields, dict) else []
    fields = {name.lower(): fields[name] for name in names}
    file_key, caption_key = _first_of(_FILE_KEYS, fields), _first_of(CAPTION_KEYS, fields)
    for key in (file_key, caption_key):
        if len(spellings := [name for name in names if name.lower() == key]) > 1:
            raise DataError(f"{where}: has {key} more than once ({', '.join(spellings)}): keep one of them.")
    name = _file_name(path, where, fields.get(file_key) if file_key else None)
    if caption_key is None:
        return TableRow(where, name, (), f"{where}: has none of {', '.join(CAPTION_KEYS)}: write the caption there.")
    value = fields[caption_key]
    captions = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(caption, str) for caption in captions):
        return TableRow(where, name, (), f"{where}: {caption_key} must be a text, or a list of texts.")
    return TableRow(where, name, tuple(captions))


def _file_name(path: Path, where: str, name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"{where}: names no video: write its name, relative to {path.parent}, as one of {', '.join(_FILE_KEYS)}."
        )
    return name.strip()


def _first_of(keys: Iterable[str], names: Iterable[str]) -> str | None:
    return next((key for key in keys if key in names), None)
