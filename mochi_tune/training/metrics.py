"""A run's numbers: metrics.jsonl and validation.jsonl, which are the record; trackers only follow them."""

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Collection, Mapping
from pathlib import Path

from tqdm import tqdm

from mochi_tune.errors import TrainingError
from mochi_tune.files import fsync, write_atomic


class Metrics:
    """Appends one JSON object a step, and takes back the ones after the checkpoint that a run resumes from.

    A row that cannot be written, for want of space for example, is kept and goes before the next one; a file never
    ends with a part of a row because of that.
    """

    def __init__(self, run_dir: Path, last_step: int) -> None:
        """Opens the two files of a run.

        Args:
            run_dir: the run's folder.
            last_step: of the checkpoint to go on from, 0 for a new run; rows after it are dropped.

        Raises:
            TrainingError: a file holds something else than rows.
        """
        self.paths = {name: run_dir / f"{name}.jsonl" for name in ("metrics", "validation")}
        for path in self.paths.values():
            _cut_after(path, last_step)
        self._files = {name: open(path, "ab", buffering=0) for name, path in self.paths.items()}  # noqa: SIM115
        self._pending: deque[tuple[str, bytes]] = deque()
        # Sizes of files that may end with a part of a row.
        self._torn: dict[str, int] = {}
        self._has_told = False

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._write_what_can_be()
        for file in self._files.values():
            file.close()

    def log(self, row: Mapping) -> None:
        """Writes a training step's row: step, loss, grad_norm, lr, seconds and what it was made of."""
        self._write("metrics", row)

    def is_validated(self, step: int) -> bool:
        """Whether there is a row of a step's validation already."""
        return any(row["step"] == step for row in self.rows("validation"))

    def log_validation(self, row: Mapping) -> None:
        """Writes a validation's row: step and losses."""
        self._write("validation", row)

    def rows(self, name: str) -> list[dict]:
        """Returns all rows of "metrics" or "validation", also those that could not be written yet."""
        # A part of a row that could not be cut off ends without a line feed.
        *lines, _ = self.paths[name].read_bytes().split(b"\n")
        return [json.loads(line) for line in [*lines, *(line for n, line in self._pending if n == name)]]

    def num_rows(self) -> dict[str, int]:
        """Returns how many rows there are of each kind."""
        return {name: len(self.rows(name)) for name in self.paths}

    def best_validated(self, steps: Collection[int]) -> int | None:
        """Returns the one of these steps that has the lowest validation loss, None if none was validated."""
        losses = {row["step"]: row["validation_loss"] for row in self.rows("validation") if row["step"] in steps}
        return min(losses, key=losses.get, default=None)

    def sigma_histogram(self) -> list[int]:
        """Returns how many samples so far were drawn in each tenth of the noise levels."""
        counts = [0] * 10
        for row in self.rows("metrics"):
            for sigma in row["sigmas"]:
                counts[min(int(10 * sigma), 9)] += 1
        return counts

    def flush_to_disk(self) -> None:
        """Waits until every row is on disk; called before a checkpoint is committed, which then always has its rows.

        Raises:
            OSError: a row cannot be written.
        """
        self._write_pending()
        for path in [*self.paths.values(), self.paths["metrics"].parent]:
            fsync(path)

    def _write(self, name: str, row: Mapping) -> None:
        self._pending.append((name, json.dumps(row).encode() + b"\n"))
        self._write_what_can_be()

    def _write_what_can_be(self) -> None:
        try:
            self._write_pending()
            self._has_told = False
        except OSError as error:
            if not self._has_told:
                waiting = self.paths[self._pending[0][0]]
                tell(f"{waiting} cannot be written ({error.strerror}): its rows are kept and tried again at every step")
            self._has_told = True

    def _write_pending(self) -> None:
        # In the order in which they came, over both files: who follows them relies on it.
        while self._pending:
            name, line = self._pending[0]
            file = self._files[name].fileno()
            whole = self._torn.get(name, os.fstat(file).st_size)
            try:
                if name in self._torn:
                    os.truncate(file, whole)
                    del self._torn[name]
                rest = line
                while rest:
                    rest = rest[os.write(file, rest) :]
            except OSError:
                self._torn[name] = whole
                with contextlib.suppress(OSError):  # It is done before the next write in any case.
                    os.truncate(file, whole)
                raise
            self._pending.popleft()


def tell(text: str) -> None:
    """Writes a line to stderr, beside the progress bar."""
    tqdm.write(f"mochi-tune: {text}", file=sys.stderr)


def _cut_after(path: Path, last_step: int) -> None:
    """Drops the rows after a step, and a last line that a killed run left unfinished.

    Raises:
        TrainingError: another line is no row.
    """
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            raise TrainingError(
                f"{path}: line {number} is no row of a run: repair it, or use another run_dir."
            ) from None
        if step <= last_step:
            kept.append(line)
    write_atomic(path, "".join(kept).encode(), durable=True)
