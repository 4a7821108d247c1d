"""Workers on a Ray cluster, started here or already running, for `prepare` and for `sample` of many videos."""

import contextlib
import logging
import os
import socket
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from mochi_tune.data_prep.decoder import ClipDecoder
from mochi_tune.data_prep.pools import MAX_TRIES, Death, WorkerPool, make_worker, run_caught
from mochi_tune.data_prep.tasks import Task, WorkerSettings
from mochi_tune.errors import ConfigError, ParallelError

# Seconds until an address must accept a connection.
_CONNECT_SECONDS = 10.0
# Seconds for a machine of the cluster to start a process and import this module.
_START_SECONDS = 300.0
# Seconds without any result until that is reported.
_QUIET_SECONDS = 60.0
# Size of Ray's object store. Results are small: workers write encoded tensors to the disk.
_STORE_BYTES = 100 * 2**20


class PoolSettings(Protocol):
    """Settings of the workers of a pool."""

    @property
    def device(self) -> str:
        """Device of each worker, cpu or cuda."""
        ...


class RayPool(WorkerPool):
    """Workers that are actors of a Ray cluster, one per GPU or CPU; a context manager.

    Ray restarts a worker that was killed, on another machine if necessary, and runs its task again. All machines must
    have the files of the run under the same paths.

    Args:
        settings: of the workers.
        count: number of workers.
        address: "auto", HOST:PORT or ray://HOST:PORT; None starts a cluster on this machine.
        worker: class of the actors: built from the settings and the working directory, with a method `run` as that of
            `RayWorker`.

    Raises:
        ConfigError: Ray is not installed.
        ParallelError: the cluster cannot be reached, is too small, or has another version of mochi-tune.
    """

    def __init__(self, settings: PoolSettings, count: int, address: str | None, worker: type | None = None) -> None:
        super().__init__(count)
        self._settings, self._address, self._worker = settings, address, worker or RayWorker
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}
        self._has_answered = False

    def __enter__(self) -> "RayPool":
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError('parallel.engine=ray needs Ray: pip install "mochi-tune[ray]".') from None
        self._ray: Any = ray
        # Ray's workers search the folder in which it connects for modules; that of the run may hold anybody's files.
        with contextlib.chdir("/"):
            self._connect()
        try:
            self._check_machines()
        except BaseException:
            self._ray.shutdown()
            raise
        gpus = self._settings.device == "cuda"
        options = {"num_cpus": 0 if gpus else 1, "num_gpus": 1 if gpus else 0}
        actor = self._ray.remote(**options, max_restarts=-1, max_task_retries=MAX_TRIES - 1)(self._worker)
        self._actors = {slot: actor.remote(self._settings, Path.cwd()) for slot in range(self.count)}
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors.values():
            self._ray.kill(actor)
        self._ray.shutdown()

    def _connect(self) -> None:
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if self._address is None:
            here = {"num_cpus": self.count, "include_dashboard": False, "object_store_memory": _STORE_BYTES}
            try:
                self._ray.init("local", **here, **quiet)
            except OSError as error:
                if "AF_UNIX" not in str(error):
                    raise
                # "... cannot exceed 107 bytes: TMPDIR/ray/session_DATE/sockets/NAME"
                folder = str(error).rpartition(": ")[2].partition("/ray/session_")[0]
                raise ParallelError(
                    f"Ray makes sockets in its folder of temporary files, {folder}, whose path is too long for that: "
                    "set TMPDIR, and RAY_TMPDIR if it is set, to a short path, for example TMPDIR=/tmp."
                ) from None
            return
        host, _, port = self._address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():
                # Fail fast: Ray itself retries for minutes.
                socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
            self._ray.init(self._address, **quiet)
        except (OSError, RuntimeError, ValueError, self._ray.exceptions.RayError) as error:
            text = str(error.__cause__ or error).strip() or type(error).__name__
            why = text.splitlines()[-1].strip()[:200]
            if "authentication token" in text.lower():
                why = "it needs a token that Ray does not have here"
            raise ParallelError(
                f"the Ray cluster of parallel.ray_address={self._address} cannot be reached ({why}): start it, or "
                "leave parallel.ray_address out to start one here."
            ) from None

    def _check_machines(self) -> None:
        """Refuses a cluster that is too small, or that has other versions on a machine that may run a worker."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        kind = "GPU" if self._settings.device == "cuda" else "CPU"
        nodes = [node for node in self._ray.nodes() if node["Alive"] and node["Resources"].get(kind)]
        there = int(sum(node["Resources"][kind] for node in nodes))
        if there < self.count:
            raise ParallelError(
                f"parallel.num_processes={self.count} workers need a {kind} each, but the Ray cluster has {there}: use "
                f"parallel.num_processes={max(there, 1)}, or device=cpu on a cluster without GPUs."
            )
        asked = {
            node["NodeManagerHostname"]: self._ray.remote(num_cpus=0)(versions)
            .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            .remote()
            for node in nodes
        }
        ours = versions()
        for host, answer in asked.items():
            try:
                theirs = self._ray.get(answer, timeout=_START_SECONDS)
            except (self._ray.exceptions.RayError, TimeoutError) as error:
                why = [line.strip() for line in str(error).splitlines() if line.strip()]
                raise ParallelError(
                    f"{host} of the Ray cluster does not answer ({(why or [type(error).__name__])[-1]}): install "
                    f"mochi-tune {ours['mochi-tune']} there, or take it out of the cluster."
                ) from None
            for name in [name for name in ours if theirs.get(name) != ours[name]][:1]:
                raise ParallelError(
                    f"{host} of the Ray cluster has {name} {theirs.get(name)}, this process has {ours[name]}: install "
                    "the same on all machines."
                )

    def _submit(self, slot: int, task: Any, ahead: Any) -> None:
        self._pending[self._actors[slot].run.remote(task, ahead)] = slot

    def _wait(self, seconds: float) -> tuple[int, list[str] | Exception | Death] | None:
        ready = self._wait_for_any(seconds)
        if ready is None:
            return None
        slot = self._pending.pop(ready)
        try:
            return slot, self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ParallelError(
                f"a worker of the Ray cluster was lost {MAX_TRIES} times on one task, the last time by "
                f"{type(error).__name__} ({lines[0] if lines else ''}). The same command continues from here."
            ) from None

    def _wait_for_any(self, seconds: float) -> Any:
        """Waits for any result, or returns None after `seconds`; reports a long wait for the first result."""
        if not self._has_answered:
            found, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=_QUIET_SECONDS)
            if not found:
                tqdm.write("no Ray worker has finished a task yet: they are starting, or no CPU or GPU is free")
        found, _ = self._ray.wait(list(self._pending), num_returns=1, timeout=seconds)
        self._has_answered |= bool(found)
        return found[0] if found else None


class RayWorker:
    """The actor class of a `prepare`."""

    def __init__(self, settings: WorkerSettings, folder: Path) -> None:
        # Paths in the settings are relative to the working directory.
        os.chdir(folder)
        self._worker = make_worker(settings, ClipDecoder(settings.decode_timeout_seconds))

    def run(self, task: Task, ahead: Task | None) -> list[str] | Exception:
        """Runs a task; see `run_caught`."""
        return run_caught(self._worker, task, ahead)


def versions() -> dict[str, str]:
    """Returns the versions of the software that affects what is encoded."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"mochi-tune": version("mochi-tune"), "torch": version("torch"), "Python": python}
