"""The metrics of a run: metrics.jsonl and validation.jsonl. Trackers read these files; they hold no other metrics."""

import contextlib
import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from tqdm import tqdm

from mochi_tune.errors import TrainingError
from mochi_tune.files import fsync, naming, parse_object, write_atomic

FILES: tuple[str, ...] = ("metrics", "validation")
# The keys of validation.jsonl that the best step depends on.
KEPT_KEYS = ("step", "validation_loss", "measured_on", "measures_anew")


def comparable(validations: Sequence[Mapping]) -> list[Mapping]:
    """Returns the rows of validation.jsonl that measured the same clips with the same noise as the last row.

    The losses of a run that resumed with other clips, or with clips in another order, cannot be compared with its
    earlier ones. Rows of versions before 0.2 do not say what they measured. They count as measuring the same as the
    first row that does, unless that row is marked as `measures_anew`.
    """
    known = [row for row in validations if row.get("measured_on")]
    if not known:
        return list(validations)
    unknown = None if known[0].get("measures_anew") else known[0]["measured_on"]
    return [row for row in validations if (row.get("measured_on") or unknown) == known[-1]["measured_on"]]


def best_validation(validations: Sequence[Mapping]) -> tuple[int, float] | None:
    """Returns the step of the lowest finite validation loss among the comparable rows, and that loss."""
    return _lowest(comparable(validations))


def _lowest(rows: Sequence[Mapping]) -> tuple[int, float] | None:
    losses = [(row["step"], row.get("validation_loss")) for row in rows]
    finite = [(step, loss) for step, loss in losses if loss is not None and math.isfinite(loss)]
    return min(finite, key=lambda pair: pair[1], default=None)


class Metrics:
    """Appends one JSON object per step, and drops the rows after the checkpoint that a run resumes from.

    A row that cannot be written, for example on a full disk, stays in memory and is written before the next one. An
    incomplete row is removed. Totals over all rows are kept in memory, so that the files are read only once.
    """

    def __init__(self, run_dir: Path, last_step: int, saved: Mapping[str, int] = MappingProxyType({})) -> None:
        """Opens the two files of a run.

        Args:
            run_dir: the run's folder.
            last_step: step of the checkpoint to resume from, 0 for a new run. Later rows are dropped.
            saved: the numbers of rows in the checkpoint, see `num_rows`; empty for a new run.

        Raises:
            TrainingError: a line of a file is not a row, as for `cut_after`.
        """
        self.paths = {name: run_dir / f"{name}.jsonl" for name in FILES}
        self._num_rows = dict.fromkeys(FILES, 0)
        self._validations: dict[int, Mapping] = {}
        self._sigma_counts = [0] * 10
        for name, path in self.paths.items():
            for row in cut_after(path, last_step, saved.get(name, 1)):
                self._count(name, row)
        own = self.paths["metrics"]
        self._branch = hashlib.sha256(own.read_bytes() if own.exists() else b"")
        self._files = {name: open(path, "ab", buffering=0) for name, path in self.paths.items()}  # noqa: SIM115
        fsync(run_dir)  # The entries of new files.
        self._pending: deque[tuple[str, bytes]] = deque()
        # Number of bytes in complete rows, for each file that may end with an incomplete row.
        self._torn: dict[str, int] = {}
        self._has_warned = False

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._try_to_write()
        for file in self._files.values():
            file.close()

    def log(self, row: Mapping) -> None:
        """Writes the row of a training step: step, loss, grad_norm, lr, seconds, clips and sigmas."""
        self._write("metrics", row)

    def log_validation(self, row: Mapping) -> None:
        """Writes the row of a validation: step and losses."""
        self._write("validation", row)

    def num_rows(self) -> dict[str, int]:
        """Returns the numbers of rows of "metrics" and "validation", including rows that are not written yet."""
        return dict(self._num_rows)

    def state(self) -> dict[str, object]:
        """Returns what a checkpoint stores: the numbers of rows, and a hash of the rows of "metrics" as its branch."""
        return {"rows": self.num_rows(), "branch": self._branch.hexdigest()}

    def is_validated(self, step: int) -> bool:
        """Whether a step has been validated."""
        return step in self._validations

    def best_validated(self, steps: Collection[int]) -> int | None:
        """Returns which of these steps has the lowest validation loss; None if none was validated."""
        best = _lowest([row for row in comparable(self._rows()) if row["step"] in steps])
        return None if best is None else best[0]

    def best_validation(self) -> tuple[int, float] | None:
        """Returns the step of the lowest validation loss and that loss; None without a validation."""
        return best_validation(self._rows())

    def compares_with_none(self) -> bool:
        """Whether the last validation measured other clips or other noise than all before it."""
        rows = self._rows()
        return len(rows) > 1 and len(comparable(rows)) == 1

    def _rows(self) -> list[Mapping]:
        return list(self._validations.values())

    def sigma_histogram(self) -> list[int]:
        """Returns the number of samples so far in each of ten equal bins of noise levels."""
        return list(self._sigma_counts)

    def flush_to_disk(self) -> None:
        """Waits until every row is on disk. Called before a checkpoint is committed, so that its rows exist.

        Raises:
            OSError: a row cannot be written.
        """
        self._write_pending()
        for name, file in self._files.items():
            with naming(self.paths[name]):
                os.fsync(file.fileno())

    def _count(self, name: str, row: Mapping) -> None:
        self._num_rows[name] += 1
        if name == "validation":
            self._validations[row["step"]] = {key: row.get(key) for key in KEPT_KEYS}
        for sigma in row.get("sigmas", ()):
            self._sigma_counts[min(int(10 * sigma), 9)] += 1

    def _write(self, name: str, row: Mapping) -> None:
        self._count(name, row)
        self._pending.append((name, line := json.dumps(row).encode() + b"\n"))
        self._branch.update(line if name == "metrics" else b"")
        self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write_pending()
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                path = self.paths[self._pending[0][0]]
                write_line(f"{path} cannot be written ({error.strerror}): its rows are kept and tried again every step")
            self._has_warned = True

    def _write_pending(self) -> None:
        # In the order of the calls across both files, because the trackers rely on it.
        while self._pending:
            name, line = self._pending[0]
            file = self._files[name].fileno()
            complete_bytes = self._torn.get(name, os.fstat(file).st_size)
            try:
                if name in self._torn:
                    os.truncate(file, complete_bytes)
                    del self._torn[name]
                rest = line
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                self._torn[name] = complete_bytes
                with contextlib.suppress(OSError):  # The next write tries again.
                    os.truncate(file, complete_bytes)
                raise
            self._pending.popleft()


def read_new_rows(file: BinaryIO) -> list[dict]:
    """Reads the rows from the position of a file up to the last complete line, and moves the position behind it."""
    start, added = file.tell(), file.read()
    num_bytes = added.rfind(b"\n") + 1
    file.seek(start + num_bytes)
    return [row for line in added[:num_bytes].split(b"\n") if (row := parse_object(line)) is not None]


def write_line(text: str) -> None:
    """Writes a line to stderr, above the progress bar."""
    tqdm.write(f"mochi-tune: {text}", file=sys.stderr)


def cut_after(path: Path, last_step: int, num_saved: int = 1) -> list[dict]:
    """Removes the rows after a step, an incomplete last line and a damaged end from a file; returns the rows that stay.

    Args:
        path: the file.
        last_step: the last step whose rows stay.
        num_saved: number of lines that were synced to disk. A crash of the machine may damage those after them. The
            default requires one row, so that a file of something else is not emptied.

    Raises:
        TrainingError: one of the first `num_saved` lines is not a row.
    """
    if not path.exists():
        return []
    lines, rows = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        row = parse_object(line) or {}
        if not isinstance(step := row.get("step"), int):
            if number > num_saved:
                break
            raise TrainingError(f"{path}: line {number} is no row of a run: repair it, or use another run_dir.")
        if step <= last_step:
            lines.append(line + b"\n")
            rows.append(row)
    write_atomic(path, b"".join(lines), durable=True)
    return rows
