"""Starts this program in several processes, and joins processes that another launcher has started."""

import atexit
import contextlib
import ctypes
import datetime
import gc
import hashlib
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from mochi_tune.errors import ParallelError

# An environment variable of the processes that this program starts: its own process number.
STARTED_HERE = "MOCHI_TUNE_STARTED_HERE"
# Exit code of a process that lost the connection to another one.
LOST_CONTACT = 75
# Exit code after a Ctrl-C.
INTERRUPTED = 128 + signal.SIGINT
# Exit code after a user's mistake, which the process has reported.
USERS_MISTAKE = 2
# Signals that end a program.
ENDS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
# How long the other processes have to end when one has failed.
GRACE_SECONDS = 10


def num_processes_here(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that torchrun, srun or accelerate started together; 1 for a single process."""
    return int(environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1)


def end_with_the_starter() -> None:
    """Makes this process end with the program that started it, even if that is killed; called first of all."""
    if STARTED_HERE not in os.environ:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    # The launcher's own process is the parent; it may have gone before that call.
    if os.getppid() != int(os.environ[STARTED_HERE]):
        os._exit(LOST_CONTACT)


def prepare_deepspeed(device: str) -> None:
    """Sets what Accelerate and DeepSpeed read when they are imported: that DeepSpeed is used, and the device."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # DeepSpeed warns hundreds of times of its own calls of torch.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not uses_gpus(device):
        os.environ["DS_ACCELERATOR"] = "cpu"


def prepare_ray() -> None:
    """Sets what Ray reads when it starts: nothing is reported, and workers do not stand back behind other programs."""
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_BACKEND_LOG_LEVEL": "error"}
    os.environ |= {name: value for name, value in ray.items() if name not in os.environ}


def spare_the_collector() -> None:
    """Has Python look for reference cycles less often: imports make a million objects, and all of them stay.

    Looking at them at every 700th takes a second of each start, and before the end, when the system takes all memory
    back anyway, another one.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def keep_compiled_code() -> None:
    """Keeps what torch compiles between runs, apart for each torch and each instruction set that it was compiled for.

    torch's own folder is in /tmp, and mixes what was compiled under different values of ATEN_CPU_CAPABILITY: code for
    one vector length then runs with another one's headers, and computes wrong numbers (seen with torch 2.13.0).
    """
    processor = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    instructions = hashlib.sha256(f"{processor} {os.environ.get('ATEN_CPU_CAPABILITY')}".encode()).hexdigest()[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mochi_tune"
    if not _can_write_below(cache):
        # As in a container that runs with a user's number and no home.
        cache = Path(tempfile.gettempdir()) / f"mochi_tune_{os.getuid()}"
        cache.mkdir(mode=0o700, exist_ok=True)
        if cache.lstat().st_uid != os.getuid():
            # Another user's: what is found there would be run.
            cache = Path(tempfile.mkdtemp(prefix="mochi_tune_"))
    folder = cache / "compiled" / f"torch-{version('torch')}-{instructions}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _can_write_below(folder: Path) -> bool:
    """Whether a folder that need not be there yet could be written to."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def let_segments_grow() -> None:
    """Has torch's allocator grow its segments of GPU memory, unless the user has set how it works.

    Otherwise streamed blocks and the inputs that come back from host memory leave gaps that no large tensor fits into:
    a training of 163 frames under a limit of 23 GiB ran out of memory with 7.5 GiB of it reserved and unused.
    """
    # Since torch 2.9 and before it.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "expandable_segments:True"))


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that torchrun would have set, from those of srun: the rank, and the address of rank 0."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return {}
    # "node[003-005,007],other": the first host is node003.
    first = re.match(r"([^\[,]+)(?:\[(\d*))?", environment["SLURM_STEP_NODELIST"])
    assert first is not None, "Slurm names at least one node"
    host, numbers = first.groups()
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": host + (numbers or ""),
        # Each job step has its own port, so that two steps on one node do not connect to each other.
        "MASTER_PORT": str(20000 + (int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])) % 20000),
    }


@contextlib.contextmanager
def joined(device: str, timeout_seconds: float) -> Iterator[None]:
    """Joins this process with the others of the run while the context lasts.

    Args:
        device: "cpu", "cuda" or "auto"; with CUDA each process of a machine takes the GPU of its number.
        timeout_seconds: how long a process waits for another one before it takes it for dead.

    Raises:
        ParallelError: this machine has fewer GPUs than processes.
    """
    import torch
    import torch.distributed as dist

    os.environ.update(slurm_variables(os.environ))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if uses_gpus(device):
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        check_gpus(local_rank + 1)
        torch.cuda.set_device(local_rank)
        # gloo beside nccl, for small things on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:  # DistError is one, and gloo raises plain ones.
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ParallelError(
            f"rank {os.environ['RANK']} could not meet the others at {meeting} ({str(error).splitlines()[0]}): "
            "if another program has that port, set MASTER_PORT to a free one; if not, see that all ranks were started."
        ) from None
    from accelerate import PartialState

    # The group is made above, as accelerate itself would make one of nccl alone.
    PartialState(cpu=not uses_gpus(device))
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        global_rank = os.environ["RANK"]
        # gloo's text starts with a line of its source and ends with a general hint: both are left out.
        why = re.sub(r"^\[[^]]*\]\s*", "", str(error).splitlines()[0]).partition(". ")[0]
        goes_on = "the same command goes on from what was saved last"
        sys.stderr.write(f"mochi-tune: rank {global_rank} lost contact with the others: {why}; {goes_on}\n")
        sys.stderr.flush()
        # An orderly exit would wait for the processes that do not answer.
        os._exit(LOST_CONTACT)
    PartialState().destroy_process_group()


def uses_gpus(device: str) -> bool:
    """Whether a setting of the device, "cpu", "cuda" or "auto", means GPUs here."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def check_gpus(count: int) -> None:
    """Refuses more processes than this machine has GPUs.

    Raises:
        ParallelError: naming how many there may be.
    """
    import torch

    if count > torch.cuda.device_count():
        raise ParallelError(
            f"{count} processes want a GPU each, and this machine has {torch.cuda.device_count()}: "
            f"use parallel.num_processes={max(1, torch.cuda.device_count())}."
        )


def start_processes(
    count: int,
    arguments: list[str],
    device: str,
    timeout_seconds: float,
    stops: tuple[signal.Signals, ...] = (signal.SIGINT,),
) -> int:
    """Runs the command line in `count` processes on this machine, on a free port; returns the exit code.

    When one ends badly, the others are ended too, at the latest after 10 seconds. A first Ctrl-C asks them to stop, a
    second one ends them. SIGUSR1 is passed on.

    Args:
        count: processes, one a GPU.
        arguments: of the command line, verb first.
        device: "cpu", "cuda" or "auto".
        timeout_seconds: how long a process may stand still.
        stops: signals of which a first one asks the processes to stop, for which they have all the time they need.

    Raises:
        ParallelError: too few GPUs; a process ended by a signal or by an error that is no user's mistake, and its rank
            is named.
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
    # A process that hangs does not end when it is asked to; the launcher would wait 30 seconds before it kills it.
    PContext.close.__defaults__ = (None, GRACE_SECONDS)
    # torch's launcher would leave one behind each time.
    logs = tempfile.TemporaryDirectory(prefix="mochi_tune_")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()), max_restarts=0, monitor_interval=0.5, shutdown_timeout=GRACE_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        signals_to_handle=",".join(s.name for s in ENDS if s not in stops),
    )  # fmt: skip
    with logs, PassedOnSignals(stops) as asked, StoppedProcesses(timeout_seconds) as stopped:
        try:
            elastic_launch(config, sys.executable)("-m", "mochi_tune.cli", *arguments)
        except ChildFailedError as error:
            if not asked.received:
                sys.stderr.write("\n")  # The progress bar of a process that is gone stands in this line.
                failures = {r: (f.exitcode, f.timestamp) for r, f in error.failures.items()}
                return report_failures(failures, stopped.killed)
        except SignalException as error:
            return 128 + error.sigval
    return 128 + asked.received if asked.received else 0


class PassedOnSignals:
    """Passes a first request to stop on to the processes that were started; a second one ends this process."""

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
            # No process has been started yet that could get the signal.
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
    """Kills a started process that has been stopped, or has waited for a disk, too long: it cannot report itself."""

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
    """Returns the exit code of a user's mistake, which its process has reported.

    Args:
        failures: of each rank that ended badly: its exit code, negative for a signal, and the time when it was seen.
            Those that were ended because of another one are among them.
        killed: ranks that were killed as they had stopped.

    Raises:
        ParallelError: it was something else.
    """
    codes = {global_rank: code for global_rank, (code, _) in failures.items()}
    # NCCL's watchdog aborts its process when another one does not answer.
    lost = {
        global_rank: time for global_rank, (code, time) in failures.items() if code in (LOST_CONTACT, -signal.SIGABRT)
    }
    silent = [r for r, (c, t) in failures.items() if c == -signal.SIGKILL and lost and t - min(lost.values()) >= 5]
    if silent := [*killed, *silent]:
        raise ParallelError(f"rank {min(silent)} did not answer and had to be killed, and all others with it.")
    # Neither a process that lost contact with another one, nor one that was then asked to end, began the trouble.
    first = [global_rank for global_rank, code in codes.items() if code not in (LOST_CONTACT, -signal.SIGTERM)]
    global_rank = min(first or lost or codes)
    code = codes[global_rank]
    if code == USERS_MISTAKE:
        return code
    if code > 0:
        what = "lost contact with the others" if code == LOST_CONTACT else f"ended with exit code {code}"
        raise ParallelError(f"rank {global_rank} {what}, and all others were ended: see what it wrote above.")
    name = signal.Signals(-code).name
    hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    raise ParallelError(f"rank {global_rank} was ended by {name}, and all others with it{hint}.")
