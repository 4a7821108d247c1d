"""The command line in forked processes: real ones, to be killed, stopped and limited, that need no time to start."""

import atexit
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from helpers_parallel import PRELOADED

# What Python tells of before it happens, of all that changes a folder.
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree")


class Command:
    """`mochi-tune` in a process of its own; what it writes goes to files.

    Args:
        log: the files' name, without suffix; their folder exists.
        arguments: of the command line.
        signal_at: (number, signal): the process sends itself a signal just before the change of that number, from 0,
            that it makes in `watched`.
        watched: the folder whose changes are counted.
        max_files: as `ulimit -n`.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        signal_at: tuple[int, int] = (-1, 0),
        watched: Path | None = None,
        max_files: int | None = None,
    ) -> None:
        self.log = log
        self.watched = watched
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.process = context.Process(target=_run, args=(log, arguments, signal_at, watched, max_files))
        self.process.start()
        # One that a failed test has left stopped would be waited for when the tests end.
        atexit.register(self.process.kill)

    @property
    def changes(self) -> list[str]:
        """The changes of the watched folder so far, "os.rename NAME" and so on."""
        return self.log.with_suffix(".changes").read_text().splitlines()

    def end(self, timeout: float = 60) -> int:
        """Waits for the end; returns the exit code, negative for a signal."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self.said()
        return self.process.exitcode

    def wait_until_stopped(self) -> None:
        """Waits until the process has been stopped by its signal."""
        deadline = time.monotonic() + 60
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            assert self.process.exitcode is None and time.monotonic() < deadline, self.said()
            time.sleep(0.01)

    def kill(self) -> None:
        """Ends the process by SIGKILL."""
        self.process.kill()
        self.process.join()

    @property
    def out(self) -> str:
        """What it wrote to stdout."""
        return self.log.with_suffix(".out").read_text()

    @property
    def refusal(self) -> str:
        """The one line with which it refused, after nothing but progress bars."""
        assert self.end() == 2, self.said()
        lines = self.log.with_suffix(".err").read_text().splitlines()
        assert lines[-1].startswith("mochi-tune: ") and "Traceback" not in self.said(), self.said()
        return lines[-1]

    def said(self) -> str:
        """All that it wrote."""
        return "".join(self.log.with_suffix(f".{name}").read_text() for name in ("out", "err"))


def _run(
    log: Path, arguments: Sequence[str], signal_at: tuple[int, int], watched: Path | None, max_files: int | None
) -> None:
    import torch

    from mochi_tune.cli.main import main

    torch.set_num_threads(1)
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.flush()
        with log.with_suffix(f".{name}").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    if max_files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))
    if watched is not None:
        _watch(watched, os.open(log.with_suffix(".changes"), os.O_CREAT | os.O_WRONLY), *signal_at)
    main(list(arguments))


def _watch(folder: Path, counter: int, number: int, signal_number: int) -> None:
    """Writes a line to the file `counter` for each change of the folder, and sends this process a signal at one."""
    prefix, seen = str(folder), 0

    def note(event: str, arguments: tuple) -> None:
        nonlocal seen
        is_change = event in CHANGES or (event == "open" and isinstance(arguments[1], str) and "r" not in arguments[1])
        if is_change and str(arguments[0]).startswith(prefix):
            if seen == number:
                os.kill(os.getpid(), signal_number)
            seen += 1
            os.write(counter, f"{event} {Path(arguments[0]).name}\n".encode())

    sys.addaudithook(note)
