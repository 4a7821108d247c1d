"""The queue of jobs: verbs that the page starts. Each job is a JSON record and a log; the files are the only state.

`runner` is a separate process that runs them one at a time, so the queue continues without a page or its server.
"""

import contextlib
import fcntl
import hmac
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import psutil
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mochi_tune.errors import DataError
from mochi_tune.files import parse_object, write_atomic
from mochi_tune.ui.folder import OWN_FOLDER, lock
from mochi_tune.ui.signing import sign

State = Literal["waiting", "running", "done", "partly", "stopped", "failed"]
# Number of bytes at the end of a log that are read.
TAIL_BYTES = 64 * 1024
# Tolerance for start times of processes, which have a resolution of 0.01 s.
SAME_START_SECONDS = 0.05


@dataclass(frozen=True)
class Job:
    """A verb with its settings.

    Attributes:
        number: counts jobs from 1, in the order in which they run.
        verb: verb of the command line.
        arguments: arguments after the verb.
        title: description for the user.
        state: state of the job; "partly" means that it is done except for some clips.
        pid: number of its process; 0 before it has started, and if its runner was killed while it started it.
        pid_started: start of that process in seconds since 1970, as psutil computes it.
        pid_start: start of that process as `process_start` returns it; "" where that is unknown, and in old records.
        began: start of the job in seconds since 1970; 0 before.
        ended: end of the job in seconds since 1970; 0 before.
        code: exit code; None if no runner saw the job end.
        is_asked_to_stop: whether the user has stopped it.
        signature: of number, verb and arguments, see `sign`; "" in old records.
    """

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid", allow_inf_nan=False)

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
    signature: str = ""

    @property
    def is_open(self) -> bool:
        """Whether it waits or runs by its record, which may come from somebody else."""
        return self.state in ("waiting", "running")

    @property
    def is_own(self) -> bool:
        """Whether this user has started it on this machine."""
        # A false signature may be any text.
        given, right = self.signature.encode(errors="replace"), sign(self.number, self.verb, self.arguments).encode()
        return hmac.compare_digest(given, right)

    @property
    def command(self) -> str:
        """The equivalent command line."""
        return " ".join(["mochi-tune", self.verb, *(a if a.isalnum() else _quoted(a) for a in self.arguments)])


_RECORDS = TypeAdapter(Job)


def _quoted(argument: str) -> str:
    import shlex

    return shlex.quote(argument)


def jobs_folder(folder: Path) -> Path:
    """Returns the folder of the jobs of a page's folder."""
    return folder / OWN_FOLDER / "jobs"


def log_path(folder: Path, number: int) -> Path:
    """Returns the path of a job's log."""
    return jobs_folder(folder) / f"{number:05d}.log"


def list_jobs(folder: Path) -> list[Job]:
    """Returns all jobs by number, without those whose records cannot be read."""
    return _read_records(folder)[0]


def damaged_records(folder: Path) -> list[Path]:
    """Returns the files of the records that are damaged, of another version or not readable."""
    return _read_records(folder)[1]


def _read_records(folder: Path) -> tuple[list[Job], list[Path]]:
    found, damaged = [], []
    for path in sorted(jobs_folder(folder).glob("[0-9]*.json")):
        # A record may have been removed meanwhile.
        with contextlib.suppress(FileNotFoundError):
            try:
                found.append(_RECORDS.validate_python(parse_object(path.read_bytes()) or {}))
            except (OSError, ValidationError):
                damaged.append(path)
    return found, damaged


def open_jobs(folder: Path, state: Literal["waiting", "running"] | None = None) -> list[Job]:
    """Returns the jobs of this user that wait or run, or only those of one of these states.

    Other records came with the folder, for example from an archive. Their commands are never run.
    """
    jobs = [job for job in list_jobs(folder) if job.is_open and state in (None, job.state)]
    return [job for job in jobs if job.is_own]


def is_queued(folder: Path, verb: str, conf: str) -> bool:
    """Whether a job of this user waits or runs that will make the result of a verb for a conf."""
    return any(job.verb == verb and f"conf={conf}" in job.arguments for job in open_jobs(folder))


def ended_jobs(folder: Path) -> list[int]:
    """Returns the numbers of the jobs that have ended; after each change there may be new files."""
    return [job.number for job in list_jobs(folder) if job.ended]


def find_job(folder: Path, number: int) -> Job:
    """Returns a job.

    Raises:
        DataError: there is no such job.
    """
    for job in list_jobs(folder):
        if job.number == number:
            return job
    raise DataError(f"job {number} does not exist any more: choose another one.")


def add_job(folder: Path, verb: str, arguments: list[str], title: str = "") -> Job:
    """Adds a job to the end of the queue, and starts a runner if none is running."""
    with changing(folder):
        # Includes logs, so that no new job appends to the log of a job whose record was removed.
        numbers = [int(path.stem) for path in jobs_folder(folder).glob("[0-9]*.*") if path.stem.isdecimal()]
        number = max(numbers, default=0) + 1
        title, signature = title or f"{verb} {' '.join(arguments)}", sign(number, verb, arguments)
        save_job(folder, Job(number, verb, arguments, title, signature=signature))
    start_runner(folder)
    return find_job(folder, number)


def repeat_job(folder: Path, number: int) -> Job:
    """Adds a job with the command of another one.

    Raises:
        DataError: there is no such job, or this user has not started it.
    """
    old = find_job(folder, number)
    if not old.is_own:
        raise DataError(
            f"job {number} was not started by you on this machine, or by an earlier version: start it in its tab."
        )
    return add_job(folder, old.verb, old.arguments, old.title)


def stop_job(folder: Path, number: int) -> Job:
    """Asks a running job to save and end, by SIGTERM, or removes a waiting job from the queue.

    Raises:
        DataError: the job has ended, or this user has not started it.
    """
    with changing(folder):
        job = find_job(folder, number)
        if job.state == "running" and not job.is_own:
            raise DataError(
                f"job {number} was not started by you on this machine, or by an earlier version: stop it where it runs."
            )
        if job.state == "waiting":
            job = replace(job, state="stopped", ended=time.time())
        elif job.state == "running" and is_alive(job):
            job = replace(job, is_asked_to_stop=True)
        else:
            raise DataError(f"job {number} has ended already: there is nothing to stop.")
        save_job(folder, job)
        if job.state == "running":
            os.kill(job.pid, signal.SIGTERM)
    return job


def save_job(folder: Path, job: Job) -> None:
    """Writes a job's record durably, as a record that cannot be read is left out."""
    content = json.dumps(asdict(job), indent=1).encode()
    write_atomic(jobs_folder(folder) / f"{job.number:05d}.json", content, durable=True)


@contextlib.contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Locks the jobs of a folder against changes by other processes."""
    jobs_folder(folder).mkdir(parents=True, exist_ok=True)
    with open(jobs_folder(folder) / ".lock", "a") as file:
        lock(file, fcntl.LOCK_EX)
        yield


def start_runner(folder: Path) -> None:
    """Starts a runner if any job waits or runs. A second runner ends at once."""
    if open_jobs(folder):
        with open(jobs_folder(folder) / "runner.log", "ab") as log:
            command = [sys.executable, "-m", "mochi_tune.ui.runner", os.fspath(folder.resolve())]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        _reap_later(process)


def revive_runner(folder: Path) -> None:
    """Starts a runner if any job waits or runs and no runner is running, such as after a kill."""
    if not open_jobs(folder):
        return
    with open(jobs_folder(folder) / ".runner", "a") as file:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    start_runner(folder)


def _reap_later(process: subprocess.Popen) -> None:
    """Reads the exit code of a process when it ends, so that it does not remain a zombie."""
    import threading

    threading.Thread(target=process.wait, daemon=True).start()


def process_start(pid: int) -> str:
    """Returns the id of the boot and the clock ticks from it to the start of a process; "" without /proc.

    Together with the process number they are unique. The start in seconds since 1970 is not reliable, because it
    changes when the system clock is set.

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
    """Whether the process of a job is running, and not a later process of the same number."""
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
    """Returns the last lines of a log, with only the last state of each progress bar."""
    try:
        with open(path, "rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - TAIL_BYTES, 0))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].replace("\x1b[A", "").rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-num_lines:]


def message_of(lines: list[str]) -> str:
    """Returns the error message of a verb from the last lines of its log, "" if they contain none."""
    return next((line.partition(": ")[2] for line in reversed(lines) if line.startswith("mochi-tune: ")), "")
