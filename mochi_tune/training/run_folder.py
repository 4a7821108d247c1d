"""The run folder: its lock and the history of its starts."""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import torch

from mochi_tune.errors import TrainingError
from mochi_tune.files import append_line, naming, read_json_lines
from mochi_tune.training import checkpoint

# File in the run folder with a row for each start.
HISTORY_FILE = "history.jsonl"


class RunLock:
    """Locks a run folder for this process.

    The operating system releases the lock when the process ends, even after SIGKILL. The lock file names the owner.
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
        with naming(self.path):
            self._file.truncate(0)
            self._file.write(json.dumps(this_process()))
            self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def find_folder(self) -> Path | None:
        """Returns the folder that holds this lock now, which differs from the run folder once someone moved it.

        Returns None if the folder cannot be found, or if the lock file was removed or replaced.
        """
        descriptor = self._file.fileno()
        for find in (lambda: self.path, lambda: Path(os.readlink(f"/proc/self/fd/{descriptor}"))):
            # Either path may be missing, and not every system has /proc.
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(descriptor), (path := find()).stat()):
                    return path.parent
        return None

    def is_in_place(self) -> bool:
        """Whether the run folder is still at its path."""
        return self.find_folder() == self.path.parent

    def check_in_place(self) -> None:
        """Checks that the run folder is still at its path; otherwise another run may have begun there.

        Raises:
            TrainingError: it was moved or removed, or its lock file was.
        """
        run_dir, folder = self.path.parent, self.find_folder()
        if folder is None:
            raise TrainingError(
                f"{run_dir} was moved or removed while this run trained in it, or its file {self.path.name} was: put "
                "the folder back, and the same command resumes from its last checkpoint."
            )
        if folder != run_dir:
            last = checkpoint.last_checkpoint(folder / "checkpoints")
            raise TrainingError(
                f"{run_dir} was moved to {folder} while this run trained in it; {last}: move the folder back and the "
                f"same command resumes from there, or use run_dir={folder}."
            )


def this_process() -> dict[str, object]:
    """Returns the host, the process ID and the start time (UTC) of this process, which together identify it."""
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


def describe_environment(strategy: str, device: torch.device, num_processes: int) -> dict[str, object]:
    """Returns what the numbers of a run depend on in addition to its settings."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    environment = {"torch": str(torch.__version__), "processes": num_processes, "strategy": strategy, "device": name}
    if device.type == "cuda":
        cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
        environment["flags"] = (
            f"tf32 {products.allow_tf32}, cudnn tf32 {cudnn.allow_tf32}, benchmark {cudnn.benchmark}, "
            f"deterministic {cudnn.deterministic}"
        )
    return environment


def record_start(run_dir: Path, facts: dict) -> None:
    """Appends a start of the run to run_dir/history.jsonl, and waits until it is on disk."""
    with open(run_dir / HISTORY_FILE, "a+b", buffering=0) as file:
        append_line(file, json.dumps(facts).encode(), durable=True)


def read_history(run_dir: Path) -> list[dict]:
    """Returns all rows that `record_start` wrote, without an incomplete line of a killed process."""
    return read_json_lines(run_dir / HISTORY_FILE)
