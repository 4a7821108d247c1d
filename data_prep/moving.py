"""Moves clips with their captions to another folder and back, so that a stop in the middle loses nothing."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mochi_tune.data_prep.captions import SIDECAR_SUFFIXES, stem_of
from mochi_tune.data_prep.finding import MEDIA_SUFFIXES
from mochi_tune.errors import DataError
from mochi_tune.files import copy_atomic, file_sha256, fsync, read_text, write_atomic


@dataclass(frozen=True)
class Moved:
    """A row of the table of what was moved: a file, where it lies now, and why.

    The paths are absolute here, and in the table relative to its folder where that is beside them: a project that is
    moved or copied takes its table along.
    """

    original: str
    moved: str
    reason: str


PENDING = "moving.json"
COLUMNS = [field.name for field in fields(Moved)]


def read_moved(path: Path) -> list[Moved]:
    """Reads the table; [] where there is none.

    Raises:
        DataError: it is no such table.
    """
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path)[0], newline=""), strict=True))
        return [_read(path, {name: row[name] for name in COLUMNS}) for row in rows if None not in row.values()]
    except (csv.Error, KeyError, UnicodeDecodeError):
        raise DataError(f"{path}: is not the table of moved files: restore it, or move it away.") from None


def _read(table: Path, row: dict[str, str]) -> Moved:
    original, moved = (os.path.normpath(table.absolute().parent / row[name]) for name in ("original", "moved"))
    return Moved(original, moved, row["reason"])


def _written(table: Path, row: Moved) -> dict[str, str]:
    folder = table.absolute().parent
    original, moved = (
        os.path.relpath(path, folder) if Path(path).is_relative_to(folder.parent) else path
        for path in (row.original, row.moved)
    )
    return asdict(Moved(original, moved, row.reason))


def _append(table: Path, rows: Sequence[Moved]) -> None:
    """Adds the rows that the table lacks, on disk when it returns."""
    known = set(read_moved(table))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    if not table.exists():
        writer.writeheader()
    writer.writerows(_written(table, row) for row in rows if row not in known)
    with open(table, "ab") as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
    fsync(table)
    fsync(table.parent)


def files_of_clip(clip: Path) -> list[Path]:
    """Returns a clip's captions and the clip itself, which comes last; captions that another clip has too stay."""
    beside = [path for path in clip.parent.iterdir() if stem_of(path) == stem_of(clip) and path != clip]
    others = [path.stem for path in beside if path.suffix.lower() in MEDIA_SUFFIXES]
    captions = [
        path
        for path in beside
        # What is spelt as the clip goes with it, and what an accent alone tells from it where no other clip is.
        if path.suffix.lower() in SIDECAR_SUFFIXES
        and path.is_file()
        and (clip.stem not in others if path.stem == clip.stem else not others)
    ]
    return [*sorted(captions), clip]


def move_clip(table: Path, moves: Sequence[tuple[Path, Path]], reason: str) -> None:
    """Moves a clip's files and adds them to the table; a file beside it says what is being moved until that is done.

    Args:
        table: of what was moved.
        moves: from where to where, of each file.
        reason: for the table.

    Raises:
        DataError: another file is at the new place; nothing is moved then.
        OSError: the disk is full, or refuses.
    """
    for source, target in moves:
        if target.exists():
            raise DataError(f"{target}: is there already, so that {source} stays: move it away, or use another move=.")
    rows = [Moved(str(source), str(target), reason) for source, target in moves]
    write_atomic(_pending(table), json.dumps([_written(table, row) for row in rows]).encode(), durable=True)
    finish_moves(table)


def finish_moves(table: Path) -> None:
    """Moves what is being moved: of the clip at hand, or of the one that a stopped run has left.

    Raises:
        DataError: another file is at the new place.
        OSError: the disk is full, or refuses.
    """
    pending = _pending(table)
    if not pending.exists():
        return
    try:
        rows = [_read(table, values) for values in json.loads(pending.read_bytes())]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{pending}: is damaged: compare {table} with the folders, and remove it.") from None
    for row in rows:
        if Path(row.original).exists():
            move_file(Path(row.original), Path(row.moved))
    _append(table, rows)
    pending.unlink()


def _pending(table: Path) -> Path:
    return table.with_name(PENDING)


def undo_moves(table: Path, rows: Sequence[Moved]) -> tuple[int, list[str]]:
    """Moves all files of the table back, clips first.

    The table keeps the rows of files that are neither at their new place nor at the old one, as of a disk that is not
    mounted. It stays when it has no more, and tells that all is undone.

    Returns:
        How many files it moved, and where those should be that it has not found.

    Raises:
        DataError: another file is at the old place; the table is left.
        OSError: the disk is full, or refuses.
    """
    count, absent = 0, []
    for row in reversed(rows):
        if Path(row.moved).exists():
            move_file(Path(row.moved), Path(row.original))
            count += 1
        elif not Path(row.original).exists():
            absent.insert(0, row)
    if len(absent) < len(rows):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(_written(table, row) for row in absent)
        write_atomic(table, text.getvalue().encode(errors="surrogateescape"), durable=True)
    return count, [row.moved for row in absent]


def move_file(source: Path, target: Path) -> None:
    """Moves a file to a name that is free, to another file system too.

    Raises:
        DataError: another file has the name.
        OSError: the disk is full, or refuses.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Unlike a rename, a link never replaces what another process has put there.
        os.link(source, target)
    except FileExistsError:
        # A run was stopped between the two steps.
        if not os.path.samefile(source, target) and file_sha256(source) != file_sha256(target):
            raise DataError(f"{target}: is there already, so that {source} stays: move one of them away.") from None
    except OSError as error:
        if target.exists():
            raise
        if error.errno == errno.EXDEV:
            copy_atomic(source, target)
            with contextlib.suppress(OSError):
                os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
        else:
            # A file system without hard links.
            os.rename(source, target)
            return
    fsync(target.parent)
    source.unlink()
