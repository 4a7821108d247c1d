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
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from mochi_tune.errors import ParallelError

# An environment variable of the processes that this program starts: its own process number.
STARTED_HERE = "MOCHI_TUNE_STARTED_HERE"
# Environment variables that say which GPUs a process sees.
VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Exit code of a process that lost the connection to another one.
LOST_CONTACT = 75
# Exit code after a Ctrl-C.
INTERRUPTED = 128 + signal.SIGINT
# Exit code after a user's mistake, which the process has reported.
USERS_MISTAKE = 2


def num_processes_here(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that torchrun, srun or accelerate started together; 1 for a single process.

    Raises:
        ParallelError: a launcher's variables are not whole, as of a job whose template sets some of them, or one of
            them cannot be.
    """
    world, tasks = (_number(environment, name, "processes") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if tasks > 1 and not environment.get("RANK"):
        # srun's own variables are whole, whatever a job script has set beside them.
        slurm_variables(environment)
        return tasks
    if world > 1:
        _check_whole(environment, "WORLD_SIZE", ("RANK", "MASTER_ADDR", "MASTER_PORT"), "torchrun")
        _check_rank(environment, "RANK", world)
        _number(environment, "LOCAL_RANK", "a process")
        port = environment["MASTER_PORT"]
        if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
            raise ParallelError(
                f"the environment variable MASTER_PORT={port} is no port: set it to one from 1 to 65535."
            )
    elif tasks > 1 and not world:
        raise ParallelError(
            f"srun started {tasks} processes, and the environment variable RANK={environment['RANK']} is set without "
            "WORLD_SIZE: unset RANK."
        )
    return world or tasks or 1


def _number(environment: Mapping[str, str], name: str, what: str) -> int:
    """Returns the number that a variable has; 0 where it is not set.

    Raises:
        ParallelError: it is none of `what`.
    """
    value = environment.get(name) or "0"
    if not re.fullmatch("[0-9]{1,18}", value):
        raise ParallelError(f"the environment variable {name}={value} is no number of {what}: unset it.")
    return int(value)


def _check_whole(environment: Mapping[str, str], count: str, names: Iterable[str], launcher: str) -> None:
    """Refuses a launcher's number of processes without the other variables that it sets."""
    if absent := [name for name in names if not environment.get(name)]:
        raise ParallelError(
            f"the environment variable {count}={environment[count]} says that {environment[count]} processes were "
            f"started together, but {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set: start them by "
            f"{launcher}, or unset {count}."
        )


def _check_rank(environment: Mapping[str, str], name: str, count: int) -> None:
    """Refuses a rank that none of so many processes has: the others would wait for the one that is missing."""
    value = environment[name]
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) >= count:
        raise ParallelError(
            f"the environment variable {name}={value} is no rank of {count} processes: it is from 0 to {count - 1}, "
            "let the launcher set it."
        )


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
    """Returns the variables that torchrun would have set, from those of srun: the rank, and the address of rank 0.

    Raises:
        ParallelError: srun's variables are not whole, or one of them cannot be.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "processes")
    if environment.get("RANK") or tasks <= 1:
        return {}
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    _check_whole(environment, "SLURM_STEP_NUM_TASKS", names, "srun")
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _check_rank(environment, name, tasks)
    job, step = _number(environment, "SLURM_JOB_ID", "a job"), _number(environment, "SLURM_STEP_ID", "a step")
    # "node[003-005,007],other": the first host is node003.
    first = re.match(r"([^\[\],\s]+)(?:\[(\d*))?", environment["SLURM_STEP_NODELIST"])
    if first is None:
        raise ParallelError(
            f"the environment variable SLURM_STEP_NODELIST={environment['SLURM_STEP_NODELIST']} names no machine: "
            "start the processes by srun, or unset SLURM_STEP_NUM_TASKS."
        )
    host, numbers = first.groups()
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": host + (numbers or ""),
        # Each job step has its own port, so that two steps on one node do not connect to each other.
        "MASTER_PORT": str(20000 + (job * 7 + step) % 20000),
    }


@contextlib.contextmanager
def joined(device: str, timeout_seconds: float) -> Iterator[None]:
    """Joins this process with the others of the run while the context lasts.

    Args:
        device: "cpu", "cuda" or "auto"; with CUDA each process of a machine takes the GPU of its number.
        timeout_seconds: how long a process waits for another one before it takes it for dead.

    Raises:
        ParallelError: this process has no GPU of its own, or could not meet the others.
    """
    import torch
    import torch.distributed as dist

    os.environ.update(slurm_variables(os.environ))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "gloo"
    if uses_gpus(device):
        # accelerate and DeepSpeed take the GPU of this number, too.
        os.environ["LOCAL_RANK"] = str(own_gpu(os.environ, torch.cuda.device_count()))
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # gloo beside nccl, for small things on the CPU.
        backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timeout)
    except RuntimeError as error:  # DistError is one, and gloo raises plain ones.
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ParallelError(
            f"could not meet the others at {meeting} ({str(error).splitlines()[0]}): "
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


def own_gpu(environment: Mapping[str, str], num_visible: int) -> int:
    """Returns the number, of the GPUs that this process sees, of the one that no other process uses.

    It is the process's number on its machine; 0 where the launcher shows each process a GPU of its own alone, as
    `srun --gpus-per-task=1` does.

    Args:
        environment: variables of this process, with those of `slurm_variables`.
        num_visible: GPUs that this process sees.

    Raises:
        ParallelError: there is no such GPU.
    """
    number = _number(environment, "LOCAL_RANK", "a process")
    here = max(number + 1, _number(environment, "LOCAL_WORLD_SIZE", "processes"))
    if here <= num_visible:
        return number
    if num_visible == 1 and _sees_its_own(environment, str(number)):
        return 0
    raise ParallelError(
        f"process {number} of this machine, counted from 0, wants a GPU of its own, and sees {num_visible}: start as "
        "many processes a machine as it has GPUs, with srun by --gpus-per-node and without --gpus-per-task."
    )


def _sees_its_own(environment: Mapping[str, str], number: str) -> bool:
    """Whether the one GPU that the process of this number on its machine sees is shown to it alone."""
    # As a script around the program sets it. The first process sees to it that not all have the same one.
    if environment.get("LOCAL_WORLD_SIZE") and number in map(environment.get, VISIBLE_GPUS):
        return True
    # torchrun in a job of one task inherits what was asked of Slurm for that task.
    if environment.get("SLURM_LOCALID") != number:
        return False
    # Older and newer Slurm; a kind of GPU may stand before the number.
    if environment.get("SLURM_NTASKS_PER_GPU") == "1":
        return True
    if re.fullmatch(r"([\w.-]+[:=])?1", environment.get("SLURM_GPUS_PER_TASK", "")):
        return True
    asked = f"{environment.get('SLURM_TRES_PER_TASK', '')},{environment.get('SLURM_GPU_BIND', '')}"
    return re.search(r"(gpu(:[\w.-]+)?[:=]|single:|per_task:)1(,|$)", asked) is not None


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
