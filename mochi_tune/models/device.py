"""Device and dtype names of the settings, memory statistics and synchronization."""

import functools
import gc
import logging
import resource
from importlib.util import find_spec

import torch
from torch import Tensor

from mochi_tune.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TRITON_NEEDS = "triton, a C compiler and the headers of Python (on Debian and Ubuntu: apt-get install gcc python3-dev)"
# Without a handler, logging writes the bare line to stderr.
_LOG = logging.getLogger(__name__)


def find_device(name: str) -> torch.device:
    """Returns the device of a setting; "auto" is CUDA if available, else the CPU.

    Raises:
        ConfigError: `name` is "cuda" and CUDA is not available.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device that torch can use: use device=cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # By default cuDNN rounds fp32 convolutions to TF32, which has a relative error of about 1e-3.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@functools.cache
def triton_fault(device: torch.device) -> str:
    """Launches a Triton kernel on a GPU; returns why that failed, or "" if it did not.

    Triton compiles C code when it launches its first kernel, which needs more than its package: see TRITON_NEEDS.
    """
    if find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        from mochi_tune.models import dit_kernels

        dit_kernels.rms_norm(torch.ones(1, 1, 16, device=device), torch.ones(16, device=device), 1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - its driver, its compilers and the C compiler raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return ""


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a GPU; if not, a line says so once."""
    if fault := triton_fault(device):
        _LOG.warning(
            "mochi-tune: Triton kernels do not run on %s (%s), so slower code of torch runs instead: install %s.",
            device, fault, TRITON_NEEDS,
        )  # fmt: skip
    return not fault


def uses_triton(x: Tensor) -> bool:
    """Whether our Triton kernels process x: only on CUDA, without gradients, and if they run there.

    Compiled blocks use the compiler's own kernels instead.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and x.dtype != torch.float64
        and not torch.is_grad_enabled()
        and _has_triton(x.device)
    )


def free_memory() -> None:
    """Frees the memory of deleted models. Some have reference cycles, so `del` alone does not free them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Resets the peak memory statistics of a GPU; does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Returns the peak memory of tensors since `reset_peak`, in GiB; on a CPU, the process's peak since its start."""
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(device)
    else:
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(num_bytes / 2**30, 2)


def synchronize(device: torch.device) -> None:
    """Waits until the device has finished all work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
