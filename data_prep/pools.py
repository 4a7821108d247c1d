"""Pools of worker processes that encode the tasks of one `prepare`; each takes the next task when it is free."""

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

import torch
from tqdm import tqdm

from mochi_tune.data.parts import PartsFolder
from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.tasks import ClipTask, Task, Worker, WorkerSettings
from mochi_tune.data_prep.watched import delay_interrupts
from mochi_tune.errors import ParallelError
from mochi_tune.models.device import find_device

# Number of workers that may die on the same task until the run fails.
MAX_TRIES = 3
# Seconds until a task that is still running is reported.
_PATIENCE_SECONDS = 600.0


class Named(Protocol):
    """A task of any kind; can be pickled."""

    @property
    def name(self) -> str:
        """Name of the task, for errors."""
        ...


AnyTask = TypeVar("AnyTask", bound=Named)


@dataclass(frozen=True)
class Death:
    """The end of a worker that died on its task: how it died."""

    how: str


class WorkerPool(ABC):
    """Runs tasks on workers, one task per worker at a time. Tasks of workers that died go to others.

    Args:
        count: maximum number of workers.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.patience = _PATIENCE_SECONDS

    def run(self, tasks: Sequence[AnyTask], update: Callable[[int], object]) -> Iterator[tuple[AnyTask, list[str]]]:
        """Yields each task when its results are on disk, in any order, with the result of `Worker.run`.

        Args:
            tasks: all of one kind.
            update: called with the number of finished clips or captions.

        Raises:
            MochiTuneError: raised by a worker; or ParallelError: several workers died on one task.
            OSError: raised by a worker.
        """
        waiting: deque[AnyTask] = deque(tasks)
        running: dict[int, AnyTask] = {}
        ahead: dict[int, AnyTask] = {}
        deaths: Counter[int] = Counter()
        begun: dict[int, float] = {}

        def assign(slot: int) -> None:
            task = ahead.pop(slot, None) or (waiting.popleft() if waiting else None)
            if task is not None:
                # None of the last tasks: a slow worker would hold one while others are idle.
                if len(waiting) > self.count and isinstance(waiting[0], ClipTask):
                    ahead[slot] = waiting.popleft()
                running[slot], begun[slot] = task, time.monotonic()
                self._submit(slot, task, ahead.get(slot))

        for slot in range(min(self.count, len(waiting))):
            assign(slot)
        while running:
            answer = self._wait(self.patience)
            for slot, since in list(begun.items()):
                if time.monotonic() - since >= self.patience and (answer is None or slot != answer[0]):
                    minutes = f"{self.patience / 60:.0f} minutes"
                    tqdm.write(f"{running[slot].name} has been running for {minutes} in {self._name_of(slot)}")
                    del begun[slot]
            if answer is None:
                continue
            slot, outcome = answer
            task = running.pop(slot)
            begun.pop(slot, None)
            if isinstance(outcome, Death):
                deaths[id(task)] += 1
                if deaths[id(task)] == MAX_TRIES:
                    raise ParallelError(
                        f"{MAX_TRIES} workers died on {task.name}; the last one: {outcome.how}. If memory ran out, "
                        "lower parallel.num_processes; else remove the file. The same command continues from here."
                    )
                waiting.appendleft(task)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                update(len(outcome) or 1)
                yield task, outcome
            assign(slot)

    def __enter__(self) -> "WorkerPool":
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Ends the workers, also in the middle of a task."""

    @abstractmethod
    def _submit(self, slot: int, task: Any, ahead: Any) -> None:
        """Sends a task to a worker, and starts the worker if necessary."""

    @abstractmethod
    def _wait(self, seconds: float) -> tuple[int, list[str] | Exception | Death] | None:
        """Waits for any worker; returns its slot and the result or error of `Worker.run`, or None after `seconds`."""

    def _name_of(self, slot: int) -> str:
        """Returns the name of a worker, for messages."""
        return f"worker {slot}"


class ProcessPool(WorkerPool):
    """Workers that are processes on this machine, one per GPU; a context manager.

    Args:
        settings: of the workers.
        count: maximum number of processes.
    """

    def __init__(self, settings: WorkerSettings, count: int) -> None:
        super().__init__(count)
        self._settings = settings
        self._workers: dict[int, tuple[Any, Connection]] = {}

    def __exit__(self, kind: type[BaseException] | None, *more: object) -> None:
        for worker in self._workers.values():
            worker[1].close()
        for process, _connection in self._workers.values():
            # An idle worker exits by itself when its connection is closed.
            process.join(5 if kind is None else 0)
            process.kill()
            process.join(5)

    def _submit(self, slot: int, task: Any, ahead: Any) -> None:
        if slot not in self._workers:
            # Spawned, not forked, which works with CUDA and threads.
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            arguments = (theirs, self._settings, slot, os.getpid())
            process = context.Process(target=_serve, args=arguments, name=f"encoder-{slot}")
            with delay_interrupts():
                process.start()
                theirs.close()
                self._workers[slot] = process, ours
        # If the worker has just died, `_wait` reports it.
        with contextlib.suppress(ConnectionError):
            self._workers[slot][1].send((task, ahead))

    def _name_of(self, slot: int) -> str:
        return f"process {self._workers[slot][0].pid}; kill it to run the task again in another one"

    def _wait(self, seconds: float) -> tuple[int, list[str] | Exception | Death] | None:
        answered = wait([connection for _, connection in self._workers.values()], seconds)
        if not answered:
            return None
        ready = answered[0]
        slot = next(slot for slot, (_, connection) in self._workers.items() if connection is ready)
        process, connection = self._workers[slot]
        try:
            return slot, connection.recv()
        except (EOFError, ConnectionError):
            process.join(5)
            process.kill()
            connection.close()
            del self._workers[slot]
            code = process.exitcode
            return slot, Death(f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}")


def _serve(connection: Connection, settings: WorkerSettings, slot: int, parent: int) -> None:
    """Runs in a worker: runs one task after the other until the main process closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        return
    if settings.device == "cuda":
        torch.cuda.set_device(slot)
    with ClipDecoder(settings.decode_timeout_seconds) as decoder:
        worker = make_worker(settings, decoder)
        while True:
            try:
                task, ahead = connection.recv()
            except (EOFError, ConnectionError):
                return
            connection.send(run_caught(worker, task, ahead))


def make_worker(settings: WorkerSettings, decoder: ClipDecoder) -> Worker:
    """Builds the worker of a process other than the main one."""
    # As in the main process: torchao's warnings about missing kernels do not matter here.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # tqdm's default lock has a semaphore, which leaks with a warning when this process is killed.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(settings.num_threads)
    find_device(settings.device)
    return Worker(settings, PartsFolder(settings.parts), decoder, checks_weights=True)


def run_caught(worker: Worker, task: Task, ahead: Task | None) -> list[str] | Exception:
    """Runs a task until its results are on disk; returns an exception, for the main process to raise."""
    try:
        refused = worker.run(task, ahead)
        worker.finish()
        return refused
    except Exception as error:  # noqa: BLE001  (raised again in the main process)
        error.add_note(f"In a worker:\n{traceback.format_exc()}")
        return error
