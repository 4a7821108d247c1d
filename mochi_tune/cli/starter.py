"""Starts this program in several processes on this machine, and reports how they ended."""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from mochi_tune.cli.connect import joined
from mochi_tune.cli.launch import (
    LOST_CONTACT,
    STARTED_HERE,
    USERS_MISTAKE,
    check_gpus,
    num_processes_here,
    uses_gpus,
)
from mochi_tune.cli.values import whole_number
from mochi_tune.errors import ParallelError
from mochi_tune.files import write_atomic

# Environment variable of the started processes: the file into which a process writes the exit code of the run if it is
# neither 0 nor an error.
STOPPED_FILE = "MOCHI_TUNE_STOPPED_FILE"
# Signals that end a program by default.
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# Seconds until the other processes are killed after one has failed.
GRACE_SECONDS = 10


def start_processes(
    count: int,
    arguments: list[str],
    device: str,
    timeout_seconds: float,
    stops: tuple[signal.Signals, ...] = (signal.SIGINT,),
) -> int:
    """Runs the command line in `count` processes on this machine, on a free port; returns the exit code.

    If one fails, the others are ended within 10 seconds. A first Ctrl-C asks them to stop, a second one ends them.
    SIGUSR1 is passed on.

    Args:
        count: number of processes, one per GPU.
        arguments: the command line, verb first.
        device: "cpu", "cuda" or "auto".
        timeout_seconds: seconds that a process may be stopped or wait for a disk.
        stops: signals that ask the processes to stop, without a time limit; a second one ends them.

    Raises:
        ParallelError: there are too few GPUs, or a process was ended by a signal or a bug; the error names its rank.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import PContext, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if uses_gpus(device):
        check_gpus(count)
    for noisy in ("elastic", "run"):
        logging.getLogger(f"torch.distributed.{noisy}").setLevel(logging.CRITICAL)
    os.environ[STARTED_HERE] = str(os.getpid())
    # A process that hangs ignores the request to end; the launcher would wait 30 seconds before it kills it.
    PContext.close.__defaults__ = (None, GRACE_SECONDS)
    # Otherwise torch's launcher leaves a folder behind each time.
    logs = tempfile.TemporaryDirectory(prefix="mochi_tune_")
    stopped_file = Path(logs.name) / "stopped"
    os.environ[STOPPED_FILE] = str(stopped_file)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()), max_restarts=0, monitor_interval=0.5, shutdown_timeout=GRACE_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        # Ignored signals stay ignored: under nohup, a run continues when the terminal is gone.
        signals_to_handle=",".join(
            s.name for s in ENDS if s not in stops and signal.getsignal(s) is not signal.SIG_IGN
        ),
    )  # fmt: skip
    with logs, PassedOnSignals(stops) as asked, StoppedProcesses(timeout_seconds) as stopped:
        try:
            elastic_launch(config, sys.executable)("-m", "mochi_tune.cli", *arguments)
        except ChildFailedError as error:
            if not asked.received:
                sys.stderr.write("\n")  # This line may have the progress bar of a process that has ended.
                failures = {r: (f.exitcode, f.timestamp) for r, f in error.failures.items()}
                return report_failures(failures, stopped.killed)
        except SignalException as error:
            return 128 + error.sigval
        if asked.received:
            return 128 + asked.received
        return int(stopped_file.read_text()) if stopped_file.exists() else 0


def tell_the_starter(code: int) -> int:
    """Returns the exit code of a started process.

    A stop and partial success are no failures: a file reports them, and the process ends with exit code 0.
    """
    if code in (0, USERS_MISTAKE):
        return code
    write_atomic(Path(os.environ[STOPPED_FILE]), str(code).encode())
    return 0


def run_in_processes(verb: str, arguments: list[str], options: dict[str, str], run: Callable[[bool], int]) -> int:
    """Runs a verb in this process, in several started ones, or as one of those that a launcher has started.

    Args:
        verb: name of the verb.
        arguments: the arguments after the verb.
        options: the parsed arguments, with "device" and "parallel.num_processes".
        run: does the work; takes whether this is the first process, returns the exit code.
    """
    count = whole_number("parallel.num_processes", options["parallel.num_processes"], 1)
    if num_processes_here(os.environ) == 1:
        return start_processes(count, [verb, *arguments], options["device"], 600) if count > 1 else run(True)
    with joined(options["device"], 600):
        code = run(os.environ["RANK"] == "0")
    return tell_the_starter(code) if STARTED_HERE in os.environ else code


class PassedOnSignals:
    """Passes the first signal to stop on to the started processes; a second one ends this process."""

    def __init__(self, stops: tuple[signal.Signals, ...]) -> None:
        self.received = 0
        self.stops = stops

    def __enter__(self) -> "PassedOnSignals":
        self._former = {number: signal.signal(number, self._stop) for number in self.stops}
        self._former_save = signal.signal(signal.SIGUSR1, self._save)
        return self

    def __exit__(self, *_: object) -> None:
        self._release()
        signal.signal(signal.SIGUSR1, self._former_save)

    def _release(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: object) -> None:
        self.received = number
        self._release()
        if not self._pass_on(number):
            # No process has been started yet.
            signal.raise_signal(number)

    def _save(self, number: int, _frame: object) -> None:
        self._pass_on(number)

    @staticmethod
    def _pass_on(number: int) -> bool:
        import psutil

        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        return bool(children)


class StoppedProcesses:
    """Kills a started process that was stopped, or waited for a disk, for too long: it cannot report that itself."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.killed: set[int] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "StoppedProcesses":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        since: dict[int, float] = {}
        while not self._over.wait(0.5):
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if child.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_DISK_SLEEP):
                        since.pop(child.pid, None)
                    elif time.monotonic() - since.setdefault(child.pid, time.monotonic()) > self.timeout_seconds:
                        self.killed.add(int(child.environ()["RANK"]))
                        child.kill()


def report_failures(failures: Mapping[int, tuple[int, float]], killed: Collection[int] = ()) -> int:
    """Returns the exit code 2 if a process has reported an error that a user can fix.

    Args:
        failures: exit code, negative for a signal, and time of detection of each rank that failed, including those
            that were ended because of another one.
        killed: ranks that were killed because they had stopped.

    Raises:
        ParallelError: any other failure.
    """
    codes = {global_rank: code for global_rank, (code, _) in failures.items()}
    # NCCL's watchdog aborts its process if another one does not answer.
    lost = {
        global_rank: time for global_rank, (code, time) in failures.items() if code in (LOST_CONTACT, -signal.SIGABRT)
    }
    silent = [r for r, (c, t) in failures.items() if c == -signal.SIGKILL and lost and t - min(lost.values()) >= 5]
    if silent := [*killed, *silent]:
        raise ParallelError(f"rank {min(silent)} did not answer and had to be killed, and all others with it.")
    # A process that lost contact, or was then asked to end, is not the cause.
    first = [global_rank for global_rank, code in codes.items() if code not in (LOST_CONTACT, -signal.SIGTERM)]
    # Unless someone ended it before.
    earliest = min(failures, key=lambda global_rank: (failures[global_rank][1], global_rank not in lost, global_rank))
    global_rank = min(first, default=earliest)
    code = codes[global_rank]
    if code == USERS_MISTAKE:
        return code
    if code > 0:
        what = "lost contact with the others" if code == LOST_CONTACT else f"ended with exit code {code}"
        raise ParallelError(f"rank {global_rank} {what}, and all others were ended: see what it wrote above.")
    name = signal.Signals(-code).name
    hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    raise ParallelError(f"rank {global_rank} was ended by {name}, and all others with it{hint}.")
