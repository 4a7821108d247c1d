"""One trainer a run folder."""

import fcntl
import os
from pathlib import Path

from mochi_tune.errors import TrainingError


class RunLock:
    """Holds a run folder for this process; it ends with the process, however that ends."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"

    def __enter__(self) -> "RunLock":
        self._file = open(self.path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            raise TrainingError(
                f"{self.path.parent} is being trained by process {owner}: wait for it, or use another run_dir."
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
