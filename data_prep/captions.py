"""A clip's caption comes from the text file beside it, else from the folder's metadata.csv or metadata.jsonl."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

from mochi_tune.errors import DataError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
# What people call the caption; the first one that is there counts.
CAPTION_KEYS = ("caption", "text", "prompt")
# Many times what 256 tokens hold; more is another file under a caption's name.
MAX_CAPTION_CHARACTERS = 50_000


def load_captions(folder: Path, videos: list[Path]) -> dict[Path, str]:
    """Reads the caption of each video; one without a caption, or with an empty one, is absent from the result.

    NAME.txt beside NAME.mp4 wins over a row of the metadata file, whose file_name is relative to `folder`.

    Args:
        folder: where metadata.csv or metadata.jsonl may lie.
        videos: paths in or below `folder`.

    Raises:
        DataError: a file is not UTF-8; a caption is far too long; a metadata row is malformed, a duplicate, or names
            a video that is not there.
    """
    captions = _read_metadata(folder, videos)
    for video in videos:
        sidecar = video.with_suffix(".txt")
        if sidecar.is_file():
            captions[video] = _one_line(_read_text(sidecar)) or captions.get(video, "")
        if len(captions.get(video, "")) > MAX_CAPTION_CHARACTERS:
            raise DataError(
                f"{video}: has a caption of {len(captions[video])} characters, {MAX_CAPTION_CHARACTERS} are the most, "
                "and 256 tokens are used: shorten it."
            )
    return {video: captions[video] for video in videos if captions.get(video)}


def find_orphans(folder: Path, videos: list[Path]) -> list[str]:
    """Lists the text files in `folder` and below it that have no video of their name, as paths in it, sorted."""
    sidecars = {video.with_suffix(".txt") for video in videos}
    orphans = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() == ".txt" and not path.name.startswith(".") and path not in sidecars and path.is_file()
    )
    # They are printed, which a name that is not UTF-8 would refuse.
    return [path.relative_to(folder).as_posix().encode(errors="backslashreplace").decode() for path in orphans]


def _read_metadata(folder: Path, videos: list[Path]) -> dict[Path, str]:
    found = [folder / name for name in METADATA_NAMES if (folder / name).exists()]
    if len(found) > 1:
        raise DataError(f"{folder} holds both {' and '.join(METADATA_NAMES)}: keep one of them.")
    captions, known = {}, set(videos)
    for path in found:
        rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
        for number, file_name, caption in rows:
            video = folder / file_name
            if video not in known:
                raise DataError(f"{path} row {number}: {file_name} is not among the videos: correct the row.")
            if video in captions:
                raise DataError(f"{path} row {number}: {file_name} has a row already: keep one of them.")
            captions[video] = _one_line(caption)
    return captions


def _csv_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line number (the header is row 1), file_name and caption of each row."""
    reader = csv.reader(io.StringIO(_read_text(path)), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        caption_key = _caption_key(header)
        if "file_name" not in header or caption_key is None or len(set(header)) < len(header):
            raise DataError(
                f"{path}: its columns are {', '.join(header) or 'none'}, each to be named once: "
                f"file_name and one of {', '.join(CAPTION_KEYS)} are needed."
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path} row {reader.line_num}: has {len(row)} fields where the header has {len(header)}: "
                    'put a caption with commas into "double quotes".'
                )
            fields = dict(zip(header, row, strict=True))
            yield reader.line_num, _file_name(path, reader.line_num, fields), fields[caption_key]
    except csv.Error as error:
        raise DataError(f"{path} row {reader.line_num}: is not CSV ({error}): correct the row.") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yields line number, file_name and caption of each row."""
    # Not splitlines(), which also breaks at characters that JSON allows inside a string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} row {number}: is not JSON ({error}): write one object a line.") from error
        caption_key = _caption_key(fields) if isinstance(fields, dict) else None
        if caption_key is None or not isinstance(fields[caption_key], str):
            raise DataError(
                f"{path} row {number}: must be an object with file_name and one of {', '.join(CAPTION_KEYS)} as text."
            )
        yield number, _file_name(path, number, fields), fields[caption_key]


def _caption_key(names) -> str | None:
    return next((key for key in CAPTION_KEYS if key in names), None)


def _file_name(path: Path, number: int, fields: dict) -> str:
    name = fields.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{path} row {number}: has no file_name: name the video, relative to {path.parent}.")
    return name.strip()


def _read_text(path: Path) -> str:
    """Reads UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
