"""Jobs: verbs that the page has started or will start. Each is a small JSON record and a log; the files are the state.

`runner` works them off, one at a time, as a process of its own, so that neither a page nor its server is needed.
"""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import psutil

from mochi_tune.errors import DataError
from mochi_tune.files import parse_object, write_atomic
from mochi_tune.ui.folder import OWN_FOLDER, lock

State = Literal["waiting", "running", "done", "partly", "stopped", "failed"]
# Bytes at the end of a log that are looked at.
TAIL_BYTES = 64 * 1024
# Process times are kept in hundredths of a second.
SAME_START_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """A verb with its settings.

    Attributes:
        number: from 1, in the order in which jobs run.
        verb: of the command line.
        arguments: behind it.
        title: for the reader.
        state: "partly" is done but for some clips.
        pid: of its process, 0 before it has one.
        pid_started: start of that process in seconds since 1970, as psutil computes it.
        pid_start: start of that process as `process_start` returns it; "" where that is unknown, and in old records.
        began: seconds since 1970; 0 before it has begun.
        ended: the same.
        code: its exit code; None where nobody saw it end.
        is_asked_to_stop: whether somebody has stopped it.
    """

    number: int
    verb: str
    arguments: list[str] = field(default_factory=list)
    title: str = ""
    state: State = "waiting"
    pid: int = 0
    pid_started: float = 0.0
    began: float = 0.0
    ended: float = 0.0
    code: int | None = None
    is_asked_to_stop: bool = False
    pid_start: str = ""

    @property
    def command(self) -> str:
        """The command line that does the same."""
        return " ".join(["mochi-tune", self.verb, *(a if a.isalnum() else _quoted(a) for a in self.arguments)])


def _quoted(argument: str) -> str:
    import shlex

    return shlex.quote(argument)


def jobs_folder(folder: Path) -> Path:
    """Returns where the jobs of a page's folder are."""
    return folder / OWN_FOLDER / "jobs"


def log_path(folder: Path, number: int) -> Path:
    """Returns the log of a job."""
    return jobs_folder(folder) / f"{number:05d}.log"


def list_jobs(folder: Path) -> list[Job]:
    """Returns all jobs in their order; a record that cannot be read is left out."""
    found = []
    for path in sorted(jobs_folder(folder).glob("[0-9]*.json")):
        # Removed meanwhile, or of another version.
        with contextlib.suppress(OSError, TypeError):
            found.append(Job(**(parse_object(path.read_bytes()) or {})))
    return found


def ended_jobs(folder: Path) -> list[int]:
    """Returns the numbers of the jobs that have ended, which tells whether there may be other files than before."""
    return [job.number for job in list_jobs(folder) if job.ended]


def find_job(folder: Path, number: int) -> Job:
    """Returns a job.

    Raises:
        DataError: it is gone.
    """
    for job in list_jobs(folder):
        if job.number == number:
            return job
    raise DataError(f"job {number} is gone: look at the list of jobs again.")


def add_job(folder: Path, verb: str, arguments: list[str], title: str = "") -> Job:
    """Puts a job at the end of the queue and sees to it that somebody works it off."""
    with changing(folder):
        # Of logs too, so that a record that somebody removed gives its log to no other job.
        numbers = [int(path.stem) for path in jobs_folder(folder).glob("[0-9]*.*") if path.stem.isdecimal()]
        job = Job(max(numbers, default=0) + 1, verb, arguments, title or f"{verb} {' '.join(arguments)}")
        save_job(folder, job)
    start_runner(folder)
    return job


def stop_job(folder: Path, number: int) -> Job:
    """Asks a running job to save and end, by SIGTERM; a waiting one leaves the queue.

    Raises:
        DataError: it is neither.
    """
    with changing(folder):
        job = find_job(folder, number)
        if job.state == "waiting":
            job = replace(job, state="stopped", ended=time.time())
        elif job.state == "running" and is_alive(job):
            job = replace(job, is_asked_to_stop=True)
        else:
            raise DataError(f"job {number} has ended already: nothing is left to stop.")
        save_job(folder, job)
        if job.state == "running":
            os.kill(job.pid, signal.SIGTERM)
    return job


def save_job(folder: Path, job: Job) -> None:
    """Writes a job's record."""
    write_atomic(jobs_folder(folder) / f"{job.number:05d}.json", json.dumps(asdict(job), indent=1).encode())


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keeps every other process from changing the jobs of this folder meanwhile."""
    jobs_folder(folder).mkdir(parents=True, exist_ok=True)
    with open(jobs_folder(folder) / ".lock", "a") as file:
        lock(file, fcntl.LOCK_EX)
        yield


def start_runner(folder: Path) -> None:
    """Starts the process that works the queue off, where jobs wait; a second one ends at once."""
    if any(job.state in ("waiting", "running") for job in list_jobs(folder)):
        with open(jobs_folder(folder) / "runner.log", "ab") as log:
            command = [sys.executable, "-m", "mochi_tune.ui.runner", os.fspath(folder.resolve())]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        _reap_later(process)


def revive_runner(folder: Path) -> None:
    """Starts a runner where jobs wait or run and none is at work any more, as after it was killed."""
    if not any(job.state in ("waiting", "running") for job in list_jobs(folder)):
        return
    with open(jobs_folder(folder) / ".runner", "a") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    start_runner(folder)


def _reap_later(process: subprocess.Popen) -> None:
    """Reads the exit code of a process when it ends, which else stays in the table of processes."""
    import threading

    threading.Thread(target=process.wait, daemon=True).start()


def process_start(pid: int) -> str:
    """Returns the boot and the clock ticks from it to the start of a process; "" without /proc.

    Together with its number this identifies a process for good. Its start in seconds since 1970 does not: it changes
    when the system clock is set.

    Source: proc_pid_stat(5), field 22.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The name of the program, in parentheses, may contain anything.
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{boot} {ticks}"


def is_alive(job: Job) -> bool:
    """Whether the process of a job runs, and is not a later one of the same number."""
    try:
        process = psutil.Process(job.pid)
        if job.pid_start:
            is_same = process_start(job.pid) == job.pid_start
        else:
            is_same = abs(process.create_time() - job.pid_started) < SAME_START_SECONDS
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def read_tail(path: Path, num_lines: int = 40) -> list[str]:
    """Returns the last lines of a log; of a progress bar that was drawn over and over, the last state."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].replace("\x1b[A", "").rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-num_lines:]


def message_of(lines: list[str]) -> str:
    """Returns the one line with which a verb has refused; "" where there is none in the log's last lines."""
    return next((line.partition(": ")[2] for line in reversed(lines) if line.startswith("mochi-tune: ")), "")
