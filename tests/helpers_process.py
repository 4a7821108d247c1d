"""The command line in forked processes: real ones, disturbed exactly where a test wants it, that need no time to start.

Each is a process of its own, forked from one that has imported everything, and runs the command line's own `main`.
Python's audit events report every file that it opens for writing, renames or removes: at one of them it may send itself
a signal. Nothing in the product knows of this.
"""

import atexit
import gc
import itertools
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from helpers_hold import hold
from helpers_parallel import THREADS, use_forkserver

HERE = Path(__file__).parent
CHANGES = {
    "open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.rmtree",
    "shutil.copyfile",
}  # fmt: skip
# A bound on hanging and nothing else: what takes a second on an idle machine has ten minutes.
PATIENCE = 600.0


@dataclass(frozen=True)
class Disturbance:
    """What befalls a process.

    Attributes:
        under: the folder whose changes are counted.
        signal_at: the change, counted from 1, before which the process gets `signal`; 0: never.
        signal_before: ending of a path before whose change it gets `signal`; None: never.
        nth: the change of such a path that is meant, from 1.
        signal: its number.
        hold: "module:function" that waits in some of its calls until the test lets it go on.
        hold_at: numbers of these calls, from 1.
        holds_ranks: whether it is not this process that waits but those that it starts.
        file_bytes: size beyond which none of its files may grow, as on a full disk; None: any.
        max_files: as `ulimit -n`; None: any.
    """

    under: str | Path = ""
    signal_at: int = 0
    signal_before: str | None = None
    nth: int = 1
    signal: int = signal.SIGKILL
    hold: str | None = None
    hold_at: tuple[int, ...] = ()
    holds_ranks: bool = False
    file_bytes: int | None = None
    max_files: int | None = None


class Program:
    """A running `mochi-tune`, in a process of its own.

    Args:
        arguments: of the command line.
        log: the name, without suffix, of the files that take what it writes: .out, .err, and .changes of the folder
            that a disturbance counts the changes of. Their folder exists.
        disturbance: what befalls it.
        env: variables of its environment beside those of the tests.
        cwd: its working directory.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        disturbance: Disturbance | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.log, self._releases, number = log, itertools.count(1), next(_NUMBERS)
        pipes, self._copiers = [], []
        for name in ("out", "err"):
            # Through a pipe, so that a full disk is not what its words fail on.
            pipe = log.with_name(f"{log.name}.{name}.{number}.pipe")
            os.mkfifo(pipe)
            copier = threading.Thread(target=_copy, args=(pipe, self._file(name)), daemon=True)
            copier.start()
            pipes.append(str(pipe))
            self._copiers.append(copier)
        for old in log.parent.glob(f"{log.name}.release_*"):
            old.unlink()
        disturbance, env = disturbance or Disturbance(), dict(env or {})
        if disturbance.holds_ranks:
            env["PYTHONPATH"] = f"{HERE / 'rank_site'}:{HERE}"
            env["MOCHI_TUNE_TEST_HOLD"] = json.dumps([disturbance.hold, disturbance.hold_at, str(log)])
        given = (arguments, pipes, log, disturbance, env, cwd)
        self.process = context.Process(target=_run, args=given)
        self.process.start()
        # One that a failed test has left running or stopped would be waited for when the tests end.
        atexit.register(self.process.kill)
        self.pid = self.process.pid

    def _file(self, suffix: str) -> Path:
        return self.log.with_name(f"{self.log.name}.{suffix}")

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        self.process.join(PATIENCE)
        assert self.process.exitcode is not None, f"still running: {self.text()[-2000:]}"
        for copier in self._copiers:
            # What it has started may hold the pipe a little longer.
            copier.join(30)
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.is_alive(), f"ended too early: {self.text()[-2000:]}"
            assert time.monotonic() < deadline, self.text()[-2000:]
            time.sleep(0.005)

    def wait_until_held(self, times: int = 1) -> None:
        """Waits until the process is in its held call of this number, from 1."""
        self.wait_until(lambda: self.err.count("held: ") >= times)

    def release(self) -> None:
        """Lets the held call go on; signals that were sent before are there first."""
        self._file(f"release_{next(self._releases)}").touch()

    def wait_until_stopped(self) -> None:
        """Waits until the process has been stopped by SIGSTOP."""
        status = Path(f"/proc/{self.pid}/stat")
        self.wait_until(lambda: status.read_text().rpartition(")")[2].split()[0] == "T")

    def kill(self) -> None:
        """Ends the process by SIGKILL."""
        self.process.kill()
        self.wait()

    @property
    def out(self) -> str:
        """What it has written to stdout."""
        return _read(self._file("out"))

    @property
    def err(self) -> str:
        """What it has written to stderr."""
        return _read(self._file("err"))

    def text(self) -> str:
        """All that it has written, stderr last."""
        return self.out + self.err

    @property
    def changes(self) -> list[tuple[str, str]]:
        """The changes so far of the folder that is watched: the audit event and the path."""
        return [tuple(json.loads(line)) for line in _read(self._file("changes")).splitlines()]

    @property
    def refusal(self) -> str:
        """The one line with which it refused, after nothing but progress bars."""
        assert self.wait() == 2, self.text()
        lines = self.err.splitlines()
        assert lines[-1].startswith("mochi-tune: ") and "Traceback" not in self.text(), self.text()
        return lines[-1]


def wait_for_end(processes: Iterable[psutil.Process]) -> None:
    """Waits until processes that others have started have ended; one whose exit code no process reads has, too."""
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"still there: {process}"
            time.sleep(0.02)


def run_program(arguments: list[str], log: Path, disturbance: Disturbance | None = None) -> tuple[int, str]:
    """Runs a program to its end; returns its exit code and what it wrote."""
    program = Program(arguments, log, disturbance)
    return program.wait(), program.text()


def run(
    *arguments: str,
    disturbance: Disturbance | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess:
    """Runs a program to its end, as subprocess.run would run `mochi-tune`."""
    with TemporaryDirectory(prefix="mochi_tune_run_") as folder:
        program = Program(list(arguments), Path(folder) / "log", disturbance, env, cwd)
        return subprocess.CompletedProcess(arguments, program.wait(), program.out, program.err)


def run_in_two(*arguments: str) -> subprocess.CompletedProcess:
    """Runs a program in two processes, see `run_in`."""
    return run_in(2, *arguments)


def run_in(count: int, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a program in `count` processes with the variables that torchrun sets; returns the first one's output."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    env["GLOO_SOCKET_IFNAME"] = "lo"
    with TemporaryDirectory(prefix="mochi_tune_run_") as folder:
        ranks = [env | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
        all_ranks = [Program(list(arguments), Path(folder) / f"log_{i}", env=each) for i, each in enumerate(ranks)]
        code = max(program.wait() % 256 for program in all_ranks)
        return subprocess.CompletedProcess(
            arguments, code, all_ranks[0].out, "".join(program.err for program in all_ranks)
        )


_NUMBERS = itertools.count()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _copy(pipe: Path, target: Path) -> None:
    with open(pipe, "rb", buffering=0) as source, open(target, "wb", buffering=0) as file:
        while piece := source.read(65536):
            file.write(piece)


def _run(
    arguments: list[str], pipes: list[str], log: Path, disturbance: Disturbance, env: dict, cwd: Path | None
) -> None:
    import torch

    from mochi_tune.cli import main as cli

    # What was imported before the fork is not looked through, which would copy it.
    gc.freeze()
    for number, pipe in enumerate(pipes, 1):
        handle = os.open(pipe, os.O_WRONLY)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    # The shell of a background job has its children ignore SIGINT, and the tests are such a child now and then.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(env)
    torch.set_num_threads(THREADS)
    if disturbance == Disturbance():
        # Its own children come from the process that it comes from, which has imported all that they need.
        use_forkserver(forkserver._forkserver._forkserver_address)
    if cwd is not None:
        os.chdir(cwd)
    if disturbance.under:
        sys.addaudithook(_hook(disturbance, os.open(f"{log}.changes", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)))
    if disturbance.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disturbance.file_bytes, resource.RLIM_INFINITY))
    if disturbance.max_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (disturbance.max_files, disturbance.max_files))
    if disturbance.hold and not disturbance.holds_ranks:
        hold(disturbance.hold, disturbance.hold_at, str(log))
    cli.main(arguments)


def _hook(disturbance: Disturbance, log: int) -> Callable[[str, tuple], None]:
    under, count, matching = str(disturbance.under), 0, 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count, matching
        if event not in CHANGES:
            return
        path = str(arguments[0])
        if event == "open":
            mode, flags = arguments[1], arguments[2]
            is_writing = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            # A folder or file opened with O_RDONLY by number is about to be synced.
            if not is_writing and not (mode is None and not path.endswith(".json")):
                return
        if not path.startswith(under):
            return
        # The machine and the process's number in a temporary file's name are others each time.
        path = re.sub(r"\.(\w+-)?\d+\.tmp$", ".tmp", path)
        count += 1
        is_matching = disturbance.signal_before is not None and path.endswith(disturbance.signal_before)
        matching += is_matching
        if count == disturbance.signal_at or (is_matching and matching == disturbance.nth):
            os.kill(os.getpid(), disturbance.signal)
        os.write(log, (json.dumps([event, path]) + "\n").encode())

    return hook
