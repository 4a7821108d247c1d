"""Connects this process with the other processes of the run."""

import contextlib
import datetime
import os
import re
import sys
from collections.abc import Iterator, Mapping, MutableMapping

from mochi_tune.cli.launch import LOST_CONTACT, own_gpu, slurm_variables, uses_gpus
from mochi_tune.errors import ParallelError


@contextlib.contextmanager
def joined(device: str, timeout_seconds: float) -> Iterator[None]:
    """Connects this process with the others of the run for the duration of the context.

    Args:
        device: "cpu", "cuda" or "auto"; with CUDA each process of a machine uses the GPU of its local rank.
        timeout_seconds: seconds that a process waits for another before it gives up.

    Raises:
        ParallelError: there is no GPU for this process alone, or the others cannot be reached.
    """
    import torch
    import torch.distributed as dist

    os.environ.update(slurm_variables(os.environ))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    is_gpu = uses_gpus(device)
    if is_gpu:
        # accelerate and DeepSpeed use the GPU of this number, too.
        os.environ["LOCAL_RANK"] = str(own_gpu(os.environ, torch.cuda.device_count()))
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        avoid_unsupported_links(os.environ)
    try:
        # gloo in addition to nccl, for small tensors on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_gpu else "gloo", timeout=timeout)
        if is_gpu:
            # NCCL connects at its first use: here, so that it can fail here, and before free memory is measured.
            connected = torch.ones(1, device="cuda")
            dist.all_reduce(connected)
            connected.item()
    except RuntimeError as error:  # The base class of DistError; gloo raises it directly.
        raise ParallelError(describe_failure(str(error), os.environ)) from None
    from accelerate import PartialState

    # The group exists already, because accelerate would create one with nccl alone.
    PartialState(cpu=not is_gpu)
    try:
        with announced_end():
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        global_rank = os.environ["RANK"]
        goes_on = "the same command continues from the last save, if there is one"
        sys.stderr.write(
            f"mochi-tune: rank {global_rank} lost contact with the others: {cause(str(error))}; {goes_on}\n"
        )
        sys.stderr.flush()
        # A normal exit would wait for the processes that do not answer.
        os._exit(LOST_CONTACT)
    if dist.is_initialized():  # A training leaves by itself.
        leave(timeout)
    PartialState().destroy_process_group()


@contextlib.contextmanager
def announced_end() -> Iterator[None]:
    """Tells rank 0 when this process has finished or failed, so that it does not wait for it in `leave`."""
    import torch.distributed as dist

    try:
        yield
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # Rank 0 has ended.
                dist.distributed_c10d._get_default_store().set(f"finished/{dist.get_rank()}", "")


def leave(timeout: datetime.timedelta) -> None:
    """Waits on rank 0 until the other processes have finished.

    Rank 0 holds what GPUs need to connect for the first time, which another process may do late, in its decoder.
    """
    import torch.distributed as dist

    if dist.get_rank() == 0:
        # A process that works for longer, or was killed, does not make a failure of this one.
        with contextlib.suppress(RuntimeError):
            keys = [f"finished/{global_rank}" for global_rank in range(dist.get_world_size())]
            dist.distributed_c10d._get_default_store().wait(keys, timeout)


def avoid_unsupported_links(environment: MutableMapping[str, str]) -> None:
    """Makes NCCL use neither peer-to-peer copies nor InfiniBand where GPUs and their driver cannot.

    These are GPUs of the RTX 40 series with a driver before 550.40.07. accelerate would raise NotImplementedError.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            environment.setdefault(name, "1")


def describe_failure(error: str, environment: Mapping[str, str]) -> str:
    """Returns the error of a process that could not connect with the others."""
    meeting = f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"
    if "NCCL" in error:
        return (
            f"could not connect its GPU with the others ({cause(error)}): set NCCL_SOCKET_IFNAME to the network "
            "interface that the machines share, or NCCL_DEBUG=INFO to see more."
        )
    return (
        f"could not meet the others at {meeting} ({error.splitlines()[0]}): "
        "set MASTER_PORT to a free port if another program uses it, and check that all ranks were started."
    )


def cause(error: str) -> str:
    """Returns the cause in an error of gloo or NCCL, which names it after the place in its source."""
    named = error.partition("Last error:")[2].strip() or error
    # Without the source line at the start of gloo's text and the general hint at its end.
    return re.sub(r"^\[[^]]*\]\s*", "", named.splitlines()[0]).partition(". ")[0]
