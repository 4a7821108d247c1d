"""Runs the jobs of a folder one at a time, in a separate process that ends when no job is left.

It shares nothing with a page except the files. If it is killed, the running job continues, and the next runner waits
for the end of that job.
"""

import contextlib
import fcntl
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil

from mochi_tune.config.load import load_config
from mochi_tune.errors import MochiTuneError
from mochi_tune.ui.folder import changed_at, lock
from mochi_tune.ui.jobs import (
    Job,
    State,
    changing,
    is_alive,
    jobs_folder,
    list_jobs,
    log_path,
    open_jobs,
    process_start,
    read_tail,
    save_job,
)

POLL_SECONDS = 0.5


def main(folder: Path) -> None:
    """Runs all waiting jobs, including those that are added meanwhile."""
    with open(jobs_folder(folder) / ".runner", "a") as file:
        while True:
            try:
                lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            for job in open_jobs(folder, "running"):
                wait_for_process(folder, job)
            while (started := start_next(folder)) is not None:
                job, process = started
                finish(folder, job, process.wait())
            fcntl.flock(file, fcntl.LOCK_UN)
            # A job that was added just before the lock was released has not started another runner.
            if not open_jobs(folder, "waiting"):
                return


def start_next(folder: Path) -> tuple[Job, subprocess.Popen] | None:
    """Starts the first waiting job that can be started. Returns the job and its process, or None if no job is left."""
    with changing(folder):
        for job in open_jobs(folder, "waiting"):
            # Before its process starts, so that no runner starts it again if this one is killed.
            job = replace(job, state="running", began=time.time())
            save_job(folder, job)
            with open(log_path(folder, job.number), "ab") as log:
                try:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "mochi_tune.cli", job.verb, *with_kept_conf(folder, job)],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=folder,
                        start_new_session=True,
                    )  # fmt: skip
                except (OSError, ValueError) as error:
                    # An argument is too long, or cannot be encoded.
                    log.write(f"mochi-tune: it cannot be started: {error}\n".encode(errors="backslashreplace"))
                    save_job(folder, replace(job, state="failed", ended=time.time()))
                    continue
            started = 0.0
            with contextlib.suppress(psutil.Error):
                started = psutil.Process(process.pid).create_time()
            start = process_start(process.pid)
            job = replace(job, pid=process.pid, pid_started=started, pid_start=start)
            save_job(folder, job)
            return job, process
    return None


def with_kept_conf(folder: Path, job: Job) -> list[str]:
    """Returns the arguments of a job, with a copy of its conf in place of the file.

    A verb reads its conf seconds after its start, and each process of a training reads it again. The page may save
    other settings meanwhile. The verb gets a conf with a mistake itself, so that its error names that file.
    """
    kept = []
    for argument in job.arguments:
        conf = folder / "conf" / f"{argument.removeprefix('conf=')}.yaml"
        if argument.startswith("conf=") and conf.is_file() and _is_right(conf):
            copy = kept_folder(folder, job) / conf.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(conf, copy)
            argument = f"conf={copy.relative_to(folder)}"
        kept.append(argument)
    return kept


def kept_folder(folder: Path, job: Job) -> Path:
    """Returns the folder for the copy of a job's conf, which is removed when the job has ended."""
    return jobs_folder(folder) / f"{job.number:05d}"


def _is_right(conf: Path) -> bool:
    try:
        load_config(str(conf), [])
    except MochiTuneError:
        return False
    return True


def wait_for_process(folder: Path, job: Job) -> None:
    """Waits for the end of a job that another runner has started, and whose exit code is therefore unknown."""
    while is_alive(job):
        time.sleep(POLL_SECONDS)
    if not job.pid:
        with open(log_path(folder, job.number), "ab") as log:
            log.write(b"mochi-tune: the queue was killed while it started this job: check that it does not run, and ")
            log.write(b"start it again\n")
    finish(folder, job, None)


def finish(folder: Path, job: Job, code: int | None) -> None:
    """Records how a job ended.

    Args:
        folder: folder of the page.
        job: job that has ended.
        code: exit code; None if no runner saw the job end. The last change of the log is then taken as its end.
    """
    with changing(folder):
        ended = time.time() if code is not None else max(changed_at(log_path(folder, job.number)), job.began)
        now = next((each for each in list_jobs(folder) if each.number == job.number), job)
        state = state_of(code, now.is_asked_to_stop)
        if state == "partly" and any(line.startswith("Traceback") for line in read_tail(log_path(folder, job.number))):
            # Python's exit code for an uncaught exception is 1, too.
            state = "failed"
        save_job(folder, replace(now, state=state, code=code, ended=ended or time.time()))
        shutil.rmtree(kept_folder(folder, job), ignore_errors=True)


def state_of(code: int | None, is_asked_to_stop: bool) -> State:
    """Returns the final state of a job by its exit code (see `cli.main`), which is None if unknown."""
    if code == 0:
        return "done"
    if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM, -signal.SIGINT):
        return "stopped"
    if code is None and is_asked_to_stop:
        return "stopped"
    return "partly" if code == 1 else "failed"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
