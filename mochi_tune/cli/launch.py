"""Sets up this process: its variables, and its place among the other processes of the run."""

import atexit
import contextlib
import ctypes
import gc
import hashlib
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Iterable, Mapping, MutableMapping
from importlib.metadata import version
from pathlib import Path

from mochi_tune.errors import ConfigError, ParallelError, printable

# Environment variable of the processes that this program starts: the process id of this program.
STARTED_HERE = "MOCHI_TUNE_STARTED_HERE"
# Environment variables that say which GPUs a process sees.
VISIBLE_GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
# Environment variables by which accelerate recognises one process of several.
RANK_VARIABLES = ("LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# The folder that has this package.
_PACKAGE_PARENT = Path(__file__).parents[2]
# Exit code of a process that lost the connection to another one.
LOST_CONTACT = 75
# Exit code after a Ctrl-C.
INTERRUPTED = 128 + signal.SIGINT
# Exit code after an error that a user can fix; the process has reported it.
USERS_MISTAKE = 2


def num_processes_here(environment: Mapping[str, str]) -> int:
    """Returns the number of processes that torchrun, srun or accelerate started together; 1 for a single process.

    Raises:
        ParallelError: some of a launcher's variables are missing, as when a job template sets a few of them, or one has
            an impossible value.
    """
    world, tasks = (_number(environment, name, "processes") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if tasks > 1 and not environment.get("RANK"):
        # srun sets all of its variables, whatever else a job script has set.
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
    """Returns the number in a variable; 0 if it is not set.

    Raises:
        ParallelError: the value is not a number of `what`.
    """
    value = environment.get(name) or "0"
    if not re.fullmatch("[0-9]{1,18}", value):
        raise ParallelError(f"the environment variable {name}={value} is no number of {what}: unset it.")
    return int(value)


def _check_whole(environment: Mapping[str, str], count: str, names: Iterable[str], launcher: str) -> None:
    """Refuses a launcher's number of processes if the other variables of the launcher are missing."""
    if absent := [name for name in names if not environment.get(name)]:
        raise ParallelError(
            f"the environment variable {count}={environment[count]} says that {environment[count]} processes were "
            f"started together, but {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not set: start them by "
            f"{launcher}, or unset {count}."
        )


def _check_rank(environment: Mapping[str, str], name: str, count: int) -> None:
    """Refuses a rank outside 0 to count - 1: the other processes would wait for the missing rank."""
    value = environment[name]
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) >= count:
        raise ParallelError(
            f"the environment variable {name}={value} is no rank of {count} processes: it is from 0 to {count - 1}, "
            "let the launcher set it."
        )


def drop_rank_variables(environment: MutableMapping[str, str]) -> None:
    """Removes what a job script or a shell under MPI has left in the environment of a single process.

    accelerate would wait for processes that do not exist.
    """
    for name in RANK_VARIABLES:
        environment.pop(name, None)


def name_process(environment: Mapping[str, str]) -> str:
    """Returns the prefix of errors: the program's name, and the rank if there are several processes."""
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
        ParallelError: the launcher started a different number than the setting says.
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
    """Makes this process end with the program that started it, even if that is killed. Must be called first."""
    if (starter := os.environ.get(STARTED_HERE)) is None:
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    # The parent, which is the launcher, may have ended before that call.
    if str(os.getppid()) != starter:
        line = f"mochi-tune: process {printable(starter)}, which {STARTED_HERE} names as the one that started this "
        with contextlib.suppress(OSError):  # stderr may be closed.
            os.write(2, f"{line}one, has ended: unset {STARTED_HERE} if it is left from another run.\n".encode())
        os._exit(LOST_CONTACT)


def import_nothing_from_here() -> None:
    """Makes the Python processes that this one starts find no modules in the working folder.

    `python -m` and `python -c`, by which we, multiprocessing and torch start them, search it first: they would execute
    a queue.py in a folder of downloaded clips. A working folder that has this package is searched, as it may be the
    only way to it.
    """
    if not os.path.samefile(os.curdir, _PACKAGE_PARENT):
        os.environ["PYTHONSAFEPATH"] = "1"


def check_python(optimize: int) -> None:
    """Refuses a Python that removes docstrings, which transformers completes when it is imported.

    Args:
        optimize: `sys.flags.optimize`.

    Raises:
        ConfigError: it is 2.
    """
    if optimize > 1:
        raise ConfigError(
            "Python removes docstrings (PYTHONOPTIMIZE=2 or python -OO), which transformers needs: unset "
            "PYTHONOPTIMIZE, or set it to 1."
        )


def prepare_deepspeed(device: str) -> None:
    """Sets the variables that enable DeepSpeed in Accelerate and select its device; both read them at import."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # DeepSpeed prints hundreds of warnings about its own calls of torch.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not uses_gpus(device):
        os.environ["DS_ACCELERATOR"] = "cpu"


def prepare_ray() -> None:
    """Sets the variables that Ray reads when it starts: no usage report, and workers of normal priority."""
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_BACKEND_LOG_LEVEL": "error"}
    os.environ |= {name: value for name, value in ray.items() if name not in os.environ}


def spare_the_collector() -> None:
    """Makes Python search for reference cycles less often: imports create a million objects that stay alive.

    With the default threshold of 700 objects the search takes a second of each start. At exit it would take another
    second, although the system frees all memory anyway.
    """
    gc.set_threshold(10_000)
    atexit.register(gc.freeze)


def keep_compiled_code() -> None:
    """Keeps compiled code between runs, in a separate folder for each version of torch and each instruction set.

    torch's default folder is in /tmp, and mixes code compiled under different values of ATEN_CPU_CAPABILITY: code for
    one vector length then runs with the headers of another and computes wrong numbers (seen with torch 2.13.0).
    """
    processor = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]
    instructions = hashlib.sha256(f"{processor} {os.environ.get('ATEN_CPU_CAPABILITY')}".encode()).hexdigest()[:8]
    # It stays "~" for a user id without a home folder, for example in a container.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mochi_tune")
    if not cache.is_absolute() or not _can_write_below(cache):
        cache = Path(tempfile.gettempdir()) / f"mochi_tune_{os.getuid()}"
        with contextlib.suppress(FileExistsError):  # It is a file, or a link that leads nowhere.
            cache.mkdir(mode=0o700, exist_ok=True)
        if not cache.is_dir() or cache.lstat().st_uid != os.getuid():
            # The folder belongs to another user, whose code must not be run.
            cache = Path(tempfile.mkdtemp(prefix="mochi_tune_"))
    folder = cache / "compiled" / f"torch-{version('torch')}-{instructions}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def _can_write_below(folder: Path) -> bool:
    """Whether a folder, which need not exist yet, is writable."""
    # os.path.exists, because Path.exists raises below a folder that must not be searched, such as root's home folder.
    there = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def let_segments_grow() -> None:
    """Makes torch's allocator use expandable segments of GPU memory, unless the user has configured the allocator.

    Otherwise streamed blocks and inputs copied back from host memory fragment the memory: a training of 163 frames
    under a limit of 23 GiB ran out of memory with 7.5 GiB reserved and unused.
    """
    # The names since torch 2.9, and before.
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    if not any(name in os.environ for name in names):
        os.environ.update(dict.fromkeys(names, "expandable_segments:True"))


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns torchrun's variables, computed from those of srun: the rank, and the address of rank 0.

    Raises:
        ParallelError: some of srun's variables are missing, or one has an impossible value.
    """
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", "processes")
    if environment.get("RANK") or tasks <= 1:
        return {}
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID")
    _check_whole(environment, "SLURM_STEP_NUM_TASKS", names, "srun")
    for name in ("SLURM_PROCID", "SLURM_LOCALID"):
        _check_rank(environment, name, tasks)
    job, step = _number(environment, "SLURM_JOB_ID", "a job"), _number(environment, "SLURM_STEP_ID", "a step")
    # In "node[003-005,007],other" the first host is node003.
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


def uses_gpus(device: str) -> bool:
    """Whether a device setting, "cpu", "cuda" or "auto", means GPUs on this machine."""
    import torch

    return device == "cuda" or (device == "auto" and torch.cuda.is_available())


def own_gpu(environment: Mapping[str, str], num_visible: int) -> int:
    """Returns the index, among the GPUs that this process sees, of the GPU that no other process uses.

    It is the local rank; 0 where the launcher shows each process only its own GPU, as `srun --gpus-per-task=1` does.

    Args:
        environment: variables of this process, including those of `slurm_variables`.
        num_visible: number of GPUs that this process sees.

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
        f"process {number} of this machine, counted from 0, needs a GPU of its own, and sees {num_visible}: start one "
        "process per GPU, with srun by --gpus-per-node and without --gpus-per-task."
    )


def _sees_its_own(environment: Mapping[str, str], number: str) -> bool:
    """Whether the only GPU that the process of this local rank sees is visible to no other process."""
    # As set by a wrapper script. Local rank 0 must see GPU 0, so not all processes have the same GPU.
    if environment.get("LOCAL_WORLD_SIZE") and number in map(environment.get, VISIBLE_GPUS):
        return True
    # torchrun in a job of one task inherits the GPU request of that task.
    if environment.get("SLURM_LOCALID") != number:
        return False
    # Variables of older and newer Slurm. A GPU type may precede the number.
    if environment.get("SLURM_NTASKS_PER_GPU") == "1":
        return True
    if re.fullmatch(r"([\w.-]+[:=])?1", environment.get("SLURM_GPUS_PER_TASK", "")):
        return True
    asked = f"{environment.get('SLURM_TRES_PER_TASK', '')},{environment.get('SLURM_GPU_BIND', '')}"
    return re.search(r"(gpu(:[\w.-]+)?[:=]|single:|per_task:)1(,|$)", asked) is not None


def check_gpus(count: int) -> None:
    """Refuses more processes than this machine has GPUs.

    Raises:
        ParallelError: names the maximum.
    """
    import torch

    if count > torch.cuda.device_count():
        raise ParallelError(
            f"{count} processes need a GPU each, and this machine has {torch.cuda.device_count()}: "
            f"use parallel.num_processes={max(1, torch.cuda.device_count())}."
        )
