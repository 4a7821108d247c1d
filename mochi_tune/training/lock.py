"""One trainer a run folder."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

from mochi_tune.errors import TrainingError


class RunLock:
    """Holds a run folder for this process; it ends with the process, however that ends.

    The file tells who has it. The lock is the system's, so that nothing of a dead process has to be cleared away.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / ".lock"

    def __enter__(self) -> "RunLock":
        self._file = open(self.path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            owner = self._file.read().strip()
            self._file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise TrainingError(
                    f"{self.path.parent} is on a file system without locks ({error.strerror}), and two trainers in one "
                    "run folder would ruin each other's run: use a run_dir on another one."
                ) from None
            raise TrainingError(
                f"{self.path.parent} is being trained by {_described(owner)}: wait for it, or use another run_dir."
            ) from None
        self._file.truncate(0)
        self._file.write(json.dumps(this_process()))
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def this_process() -> dict[str, object]:
    """Returns what tells this process from all others: its host, its number and when it was started (UTC)."""
    import datetime

    import psutil

    started = datetime.datetime.fromtimestamp(psutil.Process().create_time(), datetime.UTC)
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started.isoformat(timespec="seconds")}


def _described(owner: str) -> str:
    try:
        who = json.loads(owner)
        return f"process {who['pid']} of host {who['host']}, started {who['started']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
