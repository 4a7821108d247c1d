"""Reads the rows of metrics.jsonl and validation.jsonl; of a growing file, only the new rows."""

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import IO, Any

from mochi_tune.files import parse_object

# Keys of metrics.jsonl that charts show -> titles.
NUMBERS = {"loss": "loss", "lr": "learning rate", "seconds": "seconds a step", "memory_gib": "GPU memory, GiB"}
# All numbers of a row that the page shows.
DRAWN = {*NUMBERS, "validation_loss"}
# Seconds after which a file that is not read again leaves the cache. A limit on the number of files would empty the
# cache at each refresh of a page that draws more.
KEEP_SECONDS = 600
# Bytes at the start and at the end of the read part, which distinguish a rewritten file from one that has grown.
MARK_BYTES = 512


@dataclass
class _File:
    """The part of a file that has been read.

    Attributes:
        facts: device, inode, modification time and size at the last read.
        marks: first bytes of the file, and last bytes before `num_bytes`.
        num_bytes: size of the complete lines.
        rows: rows of the complete lines.
        last: row of an incomplete last line; empty if the line contains none.
        used: time of the last read, in seconds.
    """

    facts: tuple[int, int, int, int] = (0, 0, 0, 0)
    marks: tuple[bytes, bytes] = (b"", b"")
    num_bytes: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    last: list[dict[str, Any]] = field(default_factory=list)
    used: float = 0.0


class RowReader:
    """Reads rows of files, and caches those of the files that are in use. Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # In the order of use, the most recent file last.
        self._files: dict[str, _File] = {}

    def read(self, path: Path) -> list[dict[str, Any]]:
        """Returns the rows of a file, each with its step and the numbers that the page shows; [] without a file."""
        with self._lock:
            known = self._files.pop(os.fspath(path), _File())
            try:
                with open(path, "rb") as file:
                    known = _read_on(file, known)
            except (FileNotFoundError, NotADirectoryError):
                return []
            known.used = monotonic()
            self._files[os.fspath(path)] = known
            while self._files[oldest := next(iter(self._files))].used < known.used - KEEP_SECONDS:
                del self._files[oldest]
            # A copy, because another thread may append rows.
            return known.rows + known.last


def _read_on(file: IO[bytes], known: _File) -> _File:
    """Reads what was appended to a file, or the whole file if it was rewritten, as by a run that has rolled back."""
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
    """Returns the row of a line, with only the keys and numbers that the page shows; [] if the line contains no row.

    A killed process may have written a part of a row, and a user may have edited the file.
    """
    row = parse_object(line)
    if row is None or not isinstance(row.get("step"), int):
        return []
    # Shares our key strings among all rows, instead of one copy of each key per row.
    shown = {"step": row["step"]}
    shown |= {key: row[key] for key in DRAWN if isinstance(row.get(key), int | float)}
    shown |= {key: row[key] for key in ("measured_on", "measures_anew") if key in row}
    if isinstance(bins := row.get("bins"), dict):
        shown["bins"] = {name: value for name, value in bins.items() if isinstance(value, int | float)}
    return [shown]
