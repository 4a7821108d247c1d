"""Chooses the attention kernel: times each one once at the shape of the run, forward and backward."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from mochi_tune.errors import ConfigError
from mochi_tune.models.device import synchronize

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# FlashAttention 3 and 4 replace torch's own flash attention if their packages are installed.
FLASH_VERSIONS = {"fa4": "FA4", "fa3": "FA3"}
ALL_KERNELS = ("cudnn", *FLASH_VERSIONS, "flash", "efficient")
REPEATS = 3
# Kernels whose times differ by less than this factor count as equally fast. Otherwise timing noise would choose, and
# two runs of one command would round differently.
NEARLY = 1.1


def time_attention(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, names: Iterable[str] = ALL_KERNELS
) -> dict[str, float]:
    """Returns the seconds of a forward and backward pass for each kernel that runs here, the fastest of REPEATS.

    Args:
        shape: (heads, tokens, width of a head) of one row.
        device: the device of the run.
        dtype: the dtype of the run.
        names: the kernels to try.
    """
    seconds = {}
    q, k, v = (torch.randn(1, *shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for name in names:
        # A kernel that is not installed, or that does not support the device or the shape, raises: those of other
        # packages anything, for example an OSError if the package was built for another torch.
        with contextlib.suppress(Exception), _flash_version(name), _only(name):
            times = []
            for _ in range(REPEATS):
                synchronize(device)
                started = time.perf_counter()
                out = F.scaled_dot_product_attention(q, k, v)
                torch.autograd.grad(out, (q, k, v), out)
                synchronize(device)
                times.append(time.perf_counter() - started)
            seconds[name] = min(times)
    return seconds


def _only(name: str) -> contextlib.AbstractContextManager[object]:
    return sdpa_kernel([KERNELS.get(name, SDPBackend.FLASH_ATTENTION)])


@contextlib.contextmanager
def _flash_version(name: str) -> Iterator[None]:
    """Makes torch's flash attention run one of FLASH_VERSIONS; does nothing for other kernels.

    Raises:
        ImportError: its package is not installed, or torch does not support it.
    """
    if name not in FLASH_VERSIONS:
        yield
        return
    # torch 2.10 activates FA4, but cannot restore its own.
    if not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        raise ImportError(f"torch {torch.__version__} cannot replace its flash attention")
    torch.nn.attention.activate_flash_attention_impl(FLASH_VERSIONS[name])
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def preferred(seconds: Mapping[str, float], is_deterministic: bool) -> str:
    """Returns the kernel to run: the first of ALL_KERNELS among the fastest ones.

    Args:
        seconds: the result of `time_attention`, not empty.
        is_deterministic: whether two runs must choose the same kernel, regardless of the measured times.
    """
    limit = float("inf") if is_deterministic else NEARLY * min(seconds.values())
    return next(name for name in ALL_KERNELS if name in seconds and seconds[name] <= limit)


def has_kernel(name: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device runs this kernel at this shape; arguments as for `time_attention`. Always False on a CPU."""
    return device.type == "cuda" and name in time_attention(shape, device, dtype, [name])


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Makes torch run only deterministic kernels.

    torch's option to warn instead of raising is not used: with it, attention runs nondeterministic kernels.

    Raises:
        ConfigError: the run needs an operation that has no deterministic kernel on the device.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "use_deterministic_algorithms" not in str(error):
            raise
        operation = str(error).partition(" does not have")[0]
        raise ConfigError(
            f"train.deterministic=true is not possible here: {operation} has no deterministic kernel: set it to false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Makes attention prefer one kernel. Where it is not supported, as with the mask of `AttentionPool`, another runs.

    Raises:
        ImportError: the kernel is one of FLASH_VERSIONS, and its package is not installed.
    """
    first = KERNELS.get(name, SDPBackend.FLASH_ATTENTION)
    others = [kernel for kernel in (*KERNELS.values(), SDPBackend.MATH) if kernel != first]
    with _flash_version(name), sdpa_kernel([first, *others], set_priority=True):
        yield
