"""Sets up this process, and joins it with the others that were started with it."""

import atexit
import contextlib
import ctypes
import datetime
import gc
import hashlib
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
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


def num_processes_here(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that torchrun, srun or accelerate started together; 1 for a single process.

    Raises:
        ParallelError: a launcher's variables are not whole, as of a job whose template sets some of them.
    """
    world, tasks = (_count(environment, name) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if tasks > 1 and "RANK" not in environment:
        # srun's own variables are whole, whatever a job script has set beside them.
        return tasks
    absent = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if world > 1 and absent:
        raise ParallelError(
            f"the environment variable WORLD_SIZE={world} says that {world} processes were started together, but "
            f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set: start them by torchrun, or unset "
            "WORLD_SIZE."
        )
    return world or tasks or 1


def _count(environment: Mapping[str, str], name: str) -> int:
    """Returns a number of processes; 0 where the variable is not set."""
    value = environment.get(name) or "0"
    if not re.fullmatch("[0-9]+", value):
        raise ParallelError(f"the environment variable {name}={value} is no number of processes: unset it.")
    return int(value)


def name_process(environment: Mapping[str, str]) -> str:
    """Returns what stands before an error: the program's name and, of several processes, the rank."""
    with contextlib.suppress(ParallelError):
        if num_processes_here(environment) > 1:
            return f"mochi-tune: rank {environment.get('RANK') or environment.get('SLURM_PROCID')}"
    return "mochi-tune"


def check_num_processes(asked: int, environment: Mapping[str, str]) -> int:
    """Returns the number of processes that a launcher started; 1 for a single process.

    Args:
        asked: parallel.num_processes.
        environment: variables of this process.

    Raises:
        ParallelError: the launcher started another number than the setting asks for.
    """
    started = num_processes_here(environment)
    here = environment.get("LOCAL_WORLD_SIZE") or str(started)
    if started > 1 and asked != 1 and str(asked) not in (here, str(started)):
        raise ParallelError(
            f"parallel.num_processes={asked}, but {started} processes were started: leave the setting out, the "
            "launcher decides."
        )
    return started


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
