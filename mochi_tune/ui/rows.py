"""The rows of metrics.jsonl and validation.jsonl that the page shows: of a file that grows, only new ones are read."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from mochi_tune.files import parse_object

# The keys of metrics.jsonl that charts show, and their titles.
NUMBERS = {"loss": "loss", "lr": "learning rate", "seconds": "seconds a step", "memory_gib": "GPU memory, GiB"}
# What is drawn or shown of a row as a number.
DRAWN = {*NUMBERS, "validation_loss"}
# Two of each run that is shown, and some more.
MAX_FILES = 64
# At the start and at the end of what was read: they tell another file from one that has grown.
MARK_BYTES = 512


@dataclass
class _File:
    """A file as far as it was read.

    Attributes:
        facts: device, inode, time of change and size when it was read last.
        marks: its first bytes, and the last ones before `num_bytes`.
        num_bytes: of its complete lines.
        rows: of these.
        last: of a last line that has no end yet; none where it holds no row.
    """

    facts: tuple[int, int, int, int] = (0, 0, 0, 0)
    marks: tuple[bytes, bytes] = (b"", b"")
    num_bytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    last: list[dict[str, Any]] = field(default_factory=list)


class RowReader:
    """Reads the rows of files, and keeps those of the ones that were asked for last; threads may share it."""

    def __init__(self, max_files: int = MAX_FILES) -> None:
        self._max_files = max_files
        self._lock = threading.Lock()
        # The one that was asked for last comes last.
        self._files: dict[str, _File] = {}

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Returns the rows of a file, each with its step and the numbers that are shown; [] where there is none."""
        with self._lock:
            known = self._files.pop(os.fspath(path), _File())
            try:
                with open(path, "rb") as file:
                    known = _read_on(file, known)
            except (FileNotFoundError, NotADirectoryError):
                return []
            self._files[os.fspath(path)] = known
            if len(self._files) > self._max_files:
                del self._files[next(iter(self._files))]
            # Another thread may read on while the caller goes through them.
            return known.rows + known.last


def _read_on(file: IO[bytes], known: _File) -> _File:
    """Returns a file with what was appended since; read anew where it was written anew, as by a run that goes back."""
    found = os.fstat(file.fileno())
    facts = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
    if facts == known.facts:
        return known
    has_grown = facts[:2] == known.facts[:2] and facts[3] > known.facts[3]
    if not has_grown or _marks(file, known.num_bytes) != known.marks:
        known = _File()
    known.facts, known.last = facts, []
    file.seek(known.num_bytes)
    for line in file:
        row = _shown(line)
        if not line.endswith(b"\n"):
            known.last = row
            break
        known.rows += row
        known.num_bytes += len(line)
    known.marks = _marks(file, known.num_bytes)
    return known


def _marks(file: IO[bytes], num_bytes: int) -> tuple[bytes, bytes]:
    file.seek(0)
    start = file.read(min(MARK_BYTES, num_bytes))
    file.seek(max(num_bytes - MARK_BYTES, 0))
    return start, file.read(min(MARK_BYTES, num_bytes))


def _shown(line: bytes) -> list[dict[str, Any]]:
    """Returns what is shown of a line's row, without what is no number; [] where the line holds none.

    A killed process may have left a part of a row, and somebody may have edited the file.
    """
    row = parse_object(line)
    if row is None or not isinstance(row.get("step"), int):
        return []
    # By keys of ours: those of the row are texts of their own in every row.
    shown = {"step": row["step"]}
    shown |= {key: row[key] for key in DRAWN if isinstance(row.get(key), int | float)}
    shown |= {key: row[key] for key in ("measured_on", "measures_anew") if key in row}
    if isinstance(bins := row.get("bins"), dict):
        shown["bins"] = {name: value for name, value in bins.items() if isinstance(value, int | float)}
    return [shown]
