"""Runs jobs on files in a child process, which may hang or die on one file without ending the run."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from mochi_tune.errors import DataError

# For the child to import torch and PyAV from a slow disk.
START_SECONDS = 120.0
Job = Callable[..., Iterator[dict[str, Any]]]


def child_context() -> Any:
    """Returns how children that read files start: forked from a process that has imported torch and PyAV once.

    That process is spawned, not forked, which works beside CUDA and threads; a child that takes the place of one that
    was lost is there at once, and does not import for two seconds.
    """
    context = multiprocessing.get_context("forkserver")
    # PyAV before decord, which brings libraries of other versions under the same names.
    context.set_forkserver_preload(["av", "mochi_tune.data_prep.clips"])
    with interrupts_wait():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Makes a Ctrl-C wait, here and in processes that are started within, and in their children, for good.

    While such a process imports, it would end it with a traceback; then it ignores it.
    """
    # Started first, as it lets the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WatchedProcess:
    """A child process for jobs that read a file: native code may loop for ever on a damaged one.

    A job is a generator function of a module: it takes the file's path and values that JSON can hold, and yields
    objects that JSON can hold. Each of them shows that it is alive. Use as a context manager:
        with WatchedProcess(timeout_seconds=120) as child:
            for message in child.run(measure, path, {}): ...

    Args:
        timeout_seconds: the longest time between two messages of a job before the child is killed.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._process: Any = None
        self._connection: Connection | None = None

    def __enter__(self) -> "WatchedProcess":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child, whatever it is doing; a later job starts another one."""
        if self._connection is not None:
            self._process.kill()
            # A process that waits for a dead network disk cannot even be killed; leave it behind.
            self._process.join(5)
            self._connection.close()
        self._process = self._connection = None

    def run(self, job: Job, path: Path, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields what `job(path, **arguments)` yields in the child.

        Raises:
            DataError: the job raised it, or an error that it does not expect; it was silent for `timeout_seconds`, or
                the child died on it.
            OSError: the job could not write.
        """
        connection = self._start(path)
        message = {"job": f"{job.__module__}:{job.__name__}", "path": str(path), "arguments": arguments}
        is_done = False
        try:
            # If the child has just died, the missing answer will say so.
            with contextlib.suppress(ConnectionError):
                connection.send_bytes(json.dumps(message).encode())
            while True:
                reply = self._receive(path, self.timeout_seconds)
                if "message" in reply:
                    yield reply["message"]
                    continue
                is_done = True
                if "refused" in reply:
                    raise DataError(reply["refused"])
                if "errno" in reply:
                    raise OSError(reply["errno"], reply["strerror"], reply["filename"])
                return
        finally:
            # The caller has left a job in the middle, or the child is gone.
            if not is_done:
                self.close()

    def _start(self, path: Path) -> Connection:
        if self._connection is None or not self._process.is_alive():
            self.close()
            context = child_context()
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), name="watched", daemon=True)
            self._process.start()
            theirs.close()
            self._receive(path, START_SECONDS, is_ready=False)
        assert self._connection is not None
        return self._connection

    def _receive(self, path: Path, seconds: float, is_ready: bool = True) -> dict[str, Any]:
        assert self._connection is not None
        try:
            if not self._connection.poll(seconds):
                raise DataError(
                    f"{path}: nothing was decoded of it for {seconds:g} s: re-encode it, remove it, or raise "
                    "timeout_seconds."
                )
            return json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            self._process.join(5)
            code = self._process.exitcode
            if not is_ready and (code is None or code >= 0):
                # It ended by itself before it got a file, and wrote the reason to stderr.
                raise RuntimeError(f"the decoder process did not start, exit code {code}") from error
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise DataError(f"{path}: the decoder died on it, {how}: re-encode it or remove it.") from None


def _serve(connection: Connection) -> None:
    """Runs in the child: does one job after the other until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Before decord, which brings libraries of other versions under the same names.
    import av  # noqa: F401

    # The other side is gone: nobody is left to answer.
    with contextlib.suppress(EOFError, ConnectionError):
        _send(connection, {"ready": True})
        while True:
            asked = json.loads(connection.recv_bytes())
            module, _, name = asked["job"].partition(":")
            path = Path(asked["path"])
            try:
                for message in getattr(importlib.import_module(module), name)(path, **asked["arguments"]):
                    _send(connection, {"message": message})
                _send(connection, {"done": True})
            except ConnectionError:
                raise
            except DataError as error:
                _send(connection, {"refused": str(error)})
            except OSError as error:
                reason = error.strerror or os.strerror(error.errno or 0)
                _send(connection, {"errno": error.errno, "strerror": reason, "filename": str(error.filename or path)})
            except Exception as error:  # noqa: BLE001  (one file's trouble, a bug included, is that file's)
                text = " ".join(str(error).split())[:300]
                refused = f"{path}: cannot be used ({type(error).__name__}: {text}): re-encode it or remove it."
                _send(connection, {"refused": refused})


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())
