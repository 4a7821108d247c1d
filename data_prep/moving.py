"""Moves clips with their captions to another folder and back; an interruption loses nothing."""

import contextlib
import csv
import errno
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mochi_tune.data.text_files import read_text
from mochi_tune.data_prep.captions import SIDECAR_SUFFIXES, stem_of
from mochi_tune.data_prep.finding import MEDIA_SUFFIXES
from mochi_tune.errors import DataError
from mochi_tune.files import append_line, copy_atomic, file_sha256, fsync, write_atomic


@dataclass(frozen=True)
class Moved:
    """A row of the table of moved files: original and new path, and the reason.

    The paths are absolute here. In the table they are relative if they are in the parent of its folder, so that a
    project may be moved or copied with its table.
    """

    original: str
    moved: str
    reason: str


_PENDING = "moving.json"
COLUMNS = [field.name for field in fields(Moved)]


def read_moved(path: Path) -> list[Moved]:
    """Reads the table; [] if it does not exist.

    Raises:
        DataError: the file is not such a table.
    """
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path)[0], newline=""), strict=True))
        values = [{name: row[name] for name in COLUMNS} for row in rows if None not in row.values()]
    except (csv.Error, KeyError, UnicodeDecodeError):
        raise DataError(f"{path}: is not the table of moved files: restore it, or move it away.") from None
    # A disk that lost power may leave zeros, and no path has one. A kill may leave a clip's rows twice.
    whole = (_read(path, row) for row in values if not any("\0" in value for value in row.values()))
    return list(dict.fromkeys(whole))


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


def _write_table(table: Path, rows: Sequence[Moved]) -> None:
    header = ",".join(COLUMNS).encode() + b"\r\n"
    write_atomic(table, header + _csv_lines(table, rows), durable=True)
    fsync(table.parent)


def _append(table: Path, rows: Sequence[Moved]) -> None:
    """Adds rows to the table durably. A table that a kill or a full disk left with half a row is written anew."""
    if table.exists() and table.read_bytes().endswith(b"\n"):
        with open(table, "a+b", buffering=0) as file:
            append_line(file, _csv_lines(table, rows).removesuffix(b"\n"), durable=True)
    else:
        _write_table(table, [*read_moved(table), *rows])


def _csv_lines(table: Path, rows: Sequence[Moved]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, COLUMNS).writerows(_written(table, row) for row in rows)
    return text.getvalue().encode(errors="surrogateescape")


def files_of_clip(clip: Path) -> list[Path]:
    """Returns a clip's caption files, except those shared with another clip, and the clip itself as the last."""
    beside = [path for path in clip.parent.iterdir() if stem_of(path) == stem_of(clip) and path != clip]
    others = [path.stem for path in beside if path.suffix.lower() in MEDIA_SUFFIXES]
    captions = [
        path
        for path in beside
        # A file with exactly the clip's name belongs to it; one that spells accents differently belongs to it if no
        # other clip has that name.
        if path.suffix.lower() in SIDECAR_SUFFIXES
        and path.is_file()
        and (clip.stem not in others if path.stem == clip.stem else not others)
    ]
    return [*sorted(captions), clip]


def move_clip(table: Path, moves: Sequence[tuple[Path, Path]], reason: str) -> None:
    """Moves a clip's files and adds them to the table; a journal next to it lists the moves until they are done.

    Args:
        table: of moved files.
        moves: original and new path of each file.
        reason: for the table.

    Raises:
        DataError: another file is at a new path; then nothing is moved.
        OSError: writing failed.
    """
    for source, target in moves:
        # An undo that was stopped before it removed the moved file has left the source there.
        if _is_taken(source, target):
            raise DataError(f"{target}: exists already, so {source} was not moved: move it away, or use another move=.")
    rows = [Moved(str(source), str(target), reason) for source, target in moves]
    write_atomic(_pending(table), json.dumps([_written(table, row) for row in rows]).encode(), durable=True)
    finish_moves(table)


def finish_moves(table: Path) -> list[Moved]:
    """Finishes the moves in the journal, of the current clip or of a run that was stopped.

    Returns:
        The rows of the clip's files, the clip itself as the last; [] without a journal.

    Raises:
        DataError: another file is at a new path, or the journal is damaged.
        OSError: writing failed.
    """
    pending = _pending(table)
    if not pending.exists():
        return []
    try:
        rows = [_read(table, values) for values in json.loads(pending.read_bytes())]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{pending}: is damaged: compare {table} with the folders, and remove it.") from None
    for row in rows:
        if Path(row.original).exists():
            move_file(Path(row.original), Path(row.moved))
    _append(table, rows)
    pending.unlink()
    return rows


def _pending(table: Path) -> Path:
    return table.with_name(_PENDING)


def undo_moves(table: Path, rows: Sequence[Moved]) -> tuple[int, list[str], list[str]]:
    """Moves the files of the table back, clips first.

    A clip and its captions stay where they are if another file is at the original path of one of them. The table keeps
    their rows, and those of files that are neither at the new nor at the original path, for example on a disk that is
    not mounted. An empty table is kept, and shows that everything was undone.

    Returns:
        The number of moved files, the new paths at which files were not found, and the reason for each file that stays.

    Raises:
        OSError: writing failed.
    """
    clips: dict[tuple[Path, Path, str], list[Moved]] = {}
    for row in reversed(rows):
        # The same clip may have been moved twice, to different folders.
        folder, moved = Path(row.original).parent, Path(row.moved)
        clips.setdefault((folder, moved.parent, stem_of(moved.name)), []).append(row)
    count, absent, stayed = 0, set[Moved](), dict[Moved, str]()
    for files in clips.values():
        taken = [row for row in files if Path(row.moved).exists() and _is_taken(Path(row.moved), Path(row.original))]
        for row in files:
            if not Path(row.moved).exists():
                if not Path(row.original).exists():
                    absent.add(row)
            elif taken:
                is_this = row in taken
                why = f"{row.original} exists already" if is_this else f"{taken[0].moved} stays, which belongs to it"
                stayed[row] = f"{row.moved}: was not moved back, as {why}"
            else:
                move_file(Path(row.moved), Path(row.original))
                count += 1
    kept = [row for row in rows if row in absent or row in stayed]
    if len(kept) < len(rows):
        _write_table(table, kept)
    return count, [row.moved for row in rows if row in absent], [stayed[row] for row in rows if row in stayed]


def _is_taken(source: Path, target: Path) -> bool:
    """Whether something other than the source or a copy of it is at the target."""
    if not os.path.lexists(target):
        return False
    # A copy of the source: an earlier run was stopped before it removed the source.
    return not target.is_file() or not (os.path.samefile(source, target) or file_sha256(source) == file_sha256(target))


def move_file(source: Path, target: Path) -> None:
    """Moves a file to a new path, also on another file system, and never replaces a file.

    Raises:
        DataError: another file is at the new path.
        OSError: writing failed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Unlike a rename, a link never replaces an existing file.
        os.link(source, target)
    except FileExistsError:
        if _is_taken(source, target):
            raise DataError(f"{target}: exists already, so {source} was not moved: move one of them away.") from None
    except OSError as error:
        if target.exists():
            raise
        if error.errno == errno.EXDEV:
            copy_atomic(source, target)
            with contextlib.suppress(OSError):
                os.utime(target, ns=(source.stat().st_atime_ns, source.stat().st_mtime_ns))
        else:
            # The file system has no hard links.
            os.rename(source, target)
            return
    fsync(target.parent)
    source.unlink()
