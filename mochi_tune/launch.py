"""Starting this program in several processes, and joining those that something else has started."""

import contextlib
import ctypes
import datetime
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping

from mochi_tune.errors import ParallelError

# Set for processes that this program started itself.
STARTED_HERE = "MOCHI_TUNE_STARTED_HERE"
# Exit code of a process whose peer is gone.
LOST_CONTACT = 75


def num_processes_here(environment: Mapping[str, str]) -> int:
    """Returns of how many processes, started by torchrun or by srun, this one is; 1 if it stands alone."""
    return int(environment.get("WORLD_SIZE") or environment.get("SLURM_STEP_NUM_TASKS") or 1)


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what torchrun would have set in the place of srun: this process's rank, and where rank 0 is met."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS") or 1) == 1:
        return {}
    # "node[003-005,007],other": the first host is node003.
    host, numbers = re.match(r"([^\[,]+)(?:\[(\d*))?", environment["SLURM_STEP_NODELIST"]).groups()
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "MASTER_ADDR": host + (numbers or ""),
        # One for each job step, so that two on the same node do not meet.
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
    if STARTED_HERE in os.environ:
        # When the program that started this one is killed, this one ends too (PR_SET_PDEATHSIG).
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= torch.cuda.device_count():
            raise ParallelError(
                f"this machine has {torch.cuda.device_count()} GPUs, and more processes run on it: "
                f"use parallel.num_processes={torch.cuda.device_count()}."
            )
        torch.cuda.set_device(place)
        # gloo beside nccl, for small things on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        rank = os.environ["RANK"]
        sys.stderr.write(f"mochi-tune: rank {rank} lost contact with the others: {str(error).splitlines()[0]}\n")
        sys.stderr.flush()
        # Taking leave in order would wait for those that do not answer.
        os._exit(LOST_CONTACT)
    dist.destroy_process_group()


def start_processes(count: int, arguments: list[str]) -> int:
    """Runs the command line in `count` processes on this machine, on a free port; returns their exit code.

    When one ends badly, the others are ended too, at the latest after 30 seconds.

    Args:
        count: processes, one a GPU.
        arguments: of the command line, verb first.

    Raises:
        ParallelError: a process ended by a signal or by an error that is no user's mistake; its rank is named.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.CRITICAL)
    os.environ[STARTED_HERE] = "1"
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0, monitor_interval=0.5, shutdown_timeout=15,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "mochi_tune.cli", *arguments)
    except ChildFailedError as error:
        return report_failures({rank: failure.exitcode for rank, failure in error.failures.items()})
    return 0


def report_failures(exit_codes: Mapping[int, int]) -> int:
    """Returns the exit code of a user's mistake, which its process has already told of.

    Args:
        exit_codes: of the ranks that failed; negative for a signal.

    Raises:
        ParallelError: it was something else.
    """
    # A process that lost contact with another one is not where the trouble began.
    first = [rank for rank, code in exit_codes.items() if code != LOST_CONTACT] or list(exit_codes)
    rank = min(first)
    code = exit_codes[rank]
    if code > 0 and code != LOST_CONTACT:
        return code
    if code == LOST_CONTACT:
        raise ParallelError(f"rank {rank} lost contact with the others, and all were ended: see what it wrote above.")
    name = signal.Signals(-code).name
    hint = "; out of memory is the usual reason" if name == "SIGKILL" else ""
    raise ParallelError(f"rank {rank} was ended by {name}, and all others with it{hint}.")
