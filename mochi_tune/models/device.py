"""Device and dtype names of the settings, and giving memory back."""

import functools
import gc
import resource
from importlib.util import find_spec

import torch
from torch import Tensor

from mochi_tune.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """Returns the device of a setting; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device that torch can use: use device=cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # cuDNN rounds fp32 convolutions to TF32 by default: a thousandth of error where fp32 was asked for.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """Whether our CUDA kernels compute what is done to x: without gradients, and where torch has brought Triton.

    Compiled blocks have kernels of the compiler's.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cuda
        and x.dtype != torch.float64
        and not torch.is_grad_enabled()
        and _has_triton()
    )


def free_memory() -> None:
    """Gives back what deleted models held: some have reference cycles, so that `del` alone does not free them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> None:
    """Begins to note anew how much of a GPU's memory tensors take."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Returns the most that tensors took since `reset_peak`; on a CPU, the most that this process ever took."""
    if device.type == "cuda":
        num_bytes = torch.cuda.max_memory_allocated(device)
    else:
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round(num_bytes / 2**30, 2)


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
