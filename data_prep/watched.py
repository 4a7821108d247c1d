"""Runs jobs on files in a child process, which may hang or die on one file without ending the run."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, Self

import numpy as np

from mochi_tune.errors import DataError

# Time for the child to import torch and PyAV from a slow disk.
_START_SECONDS = 120.0
Job = Callable[..., Iterator[Any]]


def child_context() -> Any:
    """Returns the multiprocessing context that starts children: forked from a server that has imported torch and PyAV.

    The server is spawned, not forked, which works with CUDA and threads. Forking from it replaces a lost child at once,
    without two seconds of imports.
    """
    context = multiprocessing.get_context("forkserver")
    # PyAV before decord, which brings libraries of other versions under the same names.
    context.set_forkserver_preload(["av", "mochi_tune.data_prep.clips"])
    with delay_interrupts():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def delay_interrupts() -> Iterator[None]:
    """Delays Ctrl-C in this process until the block ends, and blocks it for good in processes that the block starts.

    Ctrl-C would end such a process with a traceback while it imports. Its own children inherit the blocked signal.
    """
    # The resource tracker unblocks the signal when it starts, so start it first.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WatchedProcess:
    """A child process for jobs that read a file: native code may loop forever on a damaged one.

    A job is a generator function at the top level of a module. It takes the path of a file and JSON values, and yields
    results: JSON objects, or pairs of a JSON object and a uint8 array. The child computes one result ahead while the
    caller works on the last one. Use as a context manager:
        with WatchedProcess(timeout_seconds=120) as child:
            for result in child.run(measure, path, {}): ...

    Args:
        timeout_seconds: maximum time for one result; then the child is killed.
        setting: the user's name for `timeout_seconds`, for errors.
    """

    def __init__(self, timeout_seconds: float, setting: str = "timeout_seconds") -> None:
        self.timeout_seconds = timeout_seconds
        self._setting = setting
        self._child: _Child | None = None
        self._pending: Path | None = None
        self._requested_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the child, even in the middle of a job; a later job starts another child.

        Safe to call while another thread waits for a result; that thread then gets none.
        """
        child, self._child, self._pending = self._child, None, None
        if child is not None:
            child.process.kill()
            # A process that waits for a dead network disk cannot be killed: leave it behind.
            child.process.join(5)
            child.socket.close()

    def run(self, job: Job, path: Path, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the JSON results of `job(path, **arguments)`.

        Raises:
            DataError: the job raised it or an unexpected error, a result took longer than `timeout_seconds`, or the
                child died.
            OSError: the job could not write.
        """
        self._request_job(job, path, arguments)
        try:
            while True:
                result, _ = self._receive_result()
                if result is None:
                    return
                self._request_next(path)
                yield result
        finally:
            # The caller left the job before its end.
            if self._pending is not None:
                self.close()

    def _request_job(self, job: Job, path: Path, arguments: dict[str, Any]) -> None:
        """Starts a job, in a new child where none is alive, and requests its first result."""
        if self._child is None or not self._child.process.is_alive():
            self.close()
            self._child = _Child()
        name = f"{job.__module__}:{job.__name__}"
        self._request(path, {"job": name, "path": str(path), "arguments": arguments})

    def _request_next(self, path: Path) -> None:
        """Requests the next result of the job that the child runs."""
        self._request(path, {"next": True})

    def _request(self, path: Path, request: dict[str, Any]) -> None:
        assert self._pending is None, f"{self._pending} is still being processed"
        assert self._child is not None
        self._pending, self._requested_at = path, time.monotonic()
        # If the child has just died, `_receive_result` reports it.
        with contextlib.suppress(ConnectionError):
            _send(self._child.socket, request)

    def _receive_result(self) -> tuple[dict[str, Any] | None, np.ndarray]:
        """Waits for the result that was requested, with its array; (None, empty array) after the job's last result.

        Raises:
            DataError: as `run`.
            OSError: as `run`.
        """
        path, child = self._pending, self._child
        assert child is not None
        try:
            if not child.is_ready:
                _receive(child.socket, time.monotonic() + _START_SECONDS, _START_SECONDS)
                child.is_ready, self._requested_at = True, time.monotonic()
            # A late caller still gets a result that is already there.
            reply = _receive(child.socket, self._requested_at + self.timeout_seconds, self.timeout_seconds)
            array = np.empty(reply.get("shape", 0), np.uint8)
            _fill(child.socket, array.data, time.monotonic() + self.timeout_seconds)
        except TimeoutError as error:
            self.close()
            raise DataError(
                f"{path}: the decoder did not answer within {self.timeout_seconds:g} s: re-encode the file, remove it, "
                f"or raise {self._setting}."
            ) from error
        except (EOFError, ConnectionError) as error:
            child.process.join(5)
            code = child.process.exitcode
            self.close()
            if not child.is_ready and (code is None or code >= 0):
                # It exited before its first job, and wrote the reason to stderr.
                raise RuntimeError(f"the decoder process did not start, exit code {code}") from error
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise DataError(f"{path}: the decoder process died ({how}): re-encode the file or remove it.") from error
        self._pending = None
        if "refused" in reply:
            raise DataError(reply["refused"])
        if "errno" in reply:
            raise OSError(reply["errno"], reply["strerror"], reply["filename"])
        return reply.get("result"), array


class _Child:
    """A child process and the parent's end of the socket between them."""

    def __init__(self) -> None:
        self.socket, theirs = socket.socketpair()
        self.process = child_context().Process(target=_serve, args=(theirs,), name="decoder", daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False


def _serve(parent: socket.socket) -> None:
    """Runs in the child: answers one request after the other until the parent closes its end of the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Imported now, so that its time does not count for the first file. Before decord, see `child_context`.
    import av  # noqa: F401

    replies: Iterator[tuple[dict[str, Any], Any]] = iter(())
    # Raised when the parent has closed the socket.
    with contextlib.suppress(EOFError, ConnectionError):
        _send(parent, {"ready": True})
        while True:
            request = _receive(parent, None, None)
            if "job" in request:
                replies = _replies(request["job"], Path(request["path"]), request["arguments"])
            reply, array = next(replies)
            _send(parent, reply)
            if array is not None:
                parent.sendall(array.data.cast("B"))


def _replies(job: str, path: Path, arguments: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yields the reply to each request for a result of a job, with an array or None."""
    module, _, name = job.partition(":")
    try:
        for result in getattr(importlib.import_module(module), name)(path, **arguments):
            values, array = result if isinstance(result, tuple) else (result, None)
            yield {"result": values} | ({} if array is None else {"shape": list(array.shape)}), array
        yield {"done": True}, None
    except DataError as error:
        yield {"refused": str(error)}, None
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        yield {"errno": error.errno, "strerror": reason, "filename": str(error.filename or path)}, None
    except Exception as error:  # noqa: BLE001  (any error, a bug included, refuses this file only)
        yield {"refused": str(unexpected_error(path, error))}, None


def unexpected_error(path: Path, error: Exception) -> DataError:
    """Builds the error that refuses a file on which unexpected code failed."""
    text = " ".join(str(error).split())[:300]
    return DataError(f"{path}: cannot be decoded ({type(error).__name__}: {text}): re-encode it or remove it.")


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    """Sends a message: its length in 8 bytes, then JSON."""
    text = json.dumps(message).encode()
    to.sendall(len(text).to_bytes(8, "big") + text)


def _receive(source: socket.socket, deadline: float | None, text_seconds: float | None) -> dict[str, Any]:
    """Receives a message that begins before `deadline` (monotonic) and whose text takes at most `text_seconds`."""
    length = bytearray(8)
    _fill(source, memoryview(length), deadline)
    text = bytearray(int.from_bytes(length, "big"))
    _fill(source, memoryview(text), None if text_seconds is None else time.monotonic() + text_seconds)
    return json.loads(text)


def _fill(source: socket.socket, view: memoryview, deadline: float | None) -> None:
    """Reads until `view` is full.

    Raises:
        EOFError: the other end is closed.
        TimeoutError: `deadline` (monotonic) has passed and no data is there.
    """
    view = view.cast("B")
    while view:
        source.settimeout(None if deadline is None else max(deadline - time.monotonic(), 1e-3))
        count = source.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
