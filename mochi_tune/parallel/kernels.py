"""Which kernel attention runs: measured once, at the shape of the run, forward and backward."""

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
# FlashAttention 3 and 4 take the place of torch's own flash attention, where their packages are installed.
FLASH_VERSIONS = {"fa4": "FA4", "fa3": "FA3"}
ALL_KERNELS = ("cudnn", *FLASH_VERSIONS, "flash", "efficient")
REPEATS = 3
# Kernels whose times differ by less than this are equally fast: the clock decides between them otherwise, and two runs
# of one command would round in other places.
NEARLY = 1.1


def time_attention(
    shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype, names: Iterable[str] = ALL_KERNELS
) -> dict[str, float]:
    """Returns the seconds of a forward and a backward pass by kernel, the fastest of some; of those that run here.

    Args:
        shape: heads, tokens and the width of a head, of one row.
        device: of the run.
        dtype: of the run.
        names: of the kernels to try.
    """
    seconds = {}
    q, k, v = (torch.randn(1, *shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    for name in names:
        # What is not installed, or that the device has not for the shape, raises.
        with contextlib.suppress(RuntimeError, ImportError, AssertionError), _flash_version(name), _only(name):
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
    """Has torch's flash attention run one of FLASH_VERSIONS; does nothing for other kernels.

    Raises:
        ImportError: its package is not installed, or torch does not know it.
    """
    if name not in FLASH_VERSIONS:
        yield
        return
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        raise ImportError(f"torch {torch.__version__} runs no other flash attention than its own")
    torch.nn.attention.activate_flash_attention_impl(FLASH_VERSIONS[name])
    try:
        yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def preferred(seconds: Mapping[str, float], is_deterministic: bool) -> str:
    """Returns the kernel to run: of the fastest ones, the first in the order of ALL_KERNELS.

    Args:
        seconds: what `time_attention` returns, not empty.
        is_deterministic: whether two runs must choose the same, whatever the clock says.
    """
    limit = float("inf") if is_deterministic else NEARLY * min(seconds.values())
    return next(name for name in ALL_KERNELS if name in seconds and seconds[name] <= limit)


def has_kernel(name: str, shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device runs a kernel of this name at this shape, see `time_attention`; a CPU has none of them."""
    return device.type == "cuda" and name in time_attention(shape, device, dtype, [name])


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Has torch run only kernels that sum in the same order each time.

    A warning in the place of an error would not do: attention then runs kernels that sum in any order.

    Raises:
        ConfigError: the run needs an operation that has no such kernel on the device.
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
            f"train.deterministic=true is not possible here: {operation} has no kernel that repeats: set it to false."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Makes attention run one kernel wherever it can; the prompt's pooling, which has a mask, runs what takes one.

    Raises:
        ImportError: it is one of FLASH_VERSIONS, and not installed.
    """
    first = KERNELS.get(name, SDPBackend.FLASH_ATTENTION)
    others = [kernel for kernel in (*KERNELS.values(), SDPBackend.MATH) if kernel != first]
    with _flash_version(name), sdpa_kernel([first, *others], set_priority=True):
        yield
