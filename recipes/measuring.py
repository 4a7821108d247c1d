"""Measures the seconds of work, and the FLOPs per second of this device."""

import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from tqdm import tqdm

from mochi_tune.models.device import peak_gib, reset_peak, synchronize
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.layers import hidden_width
from mochi_tune.parallel.forecast import ATTENTION_BACKWARD
from mochi_tune.sampling.render import ATTENTION_KERNELS

# Seconds of each measurement of a rate: a GPU takes a while to reach its clock. And maximum number of tokens on a CPU.
RATE_SECONDS = {"cuda": 1.0, "cpu": 0.25}
CPU_TOKENS = 4096


def timed(run: Callable[[], object], repeats: int, device: torch.device, num_warm_up: int = 1) -> tuple[float, float]:
    """Returns the median seconds of `repeats` runs, and the peak memory of all runs in GiB."""
    reset_peak(device)
    seconds = []
    is_quiet = dist.is_initialized() and dist.get_rank() > 0
    for i in tqdm(range(num_warm_up + repeats), "bench", leave=False, disable=is_quiet, file=sys.stderr):
        synchronize(device)
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        run()
        synchronize(device)
        if i >= num_warm_up:
            seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 4), peak_gib(device)


def measure_rates(
    config: DiTConfig, num_tokens: int, device: torch.device, dtype: torch.dtype, is_fp8: bool = False
) -> tuple[float, float]:
    """Measures the FLOPs per second of this device in the widest matrix product of the model, and in attention."""
    num_tokens = min(num_tokens, CPU_TOKENS) if device.type == "cpu" else num_tokens
    dim = config.hidden_size_x
    x = torch.randn(num_tokens, dim, device=device, dtype=dtype)
    w = torch.randn(2 * hidden_width(dim, config.mlp_ratio_x), dim, device=device, dtype=dtype)
    multiply: Callable[[], Tensor] = functools.partial(F.linear, x, w)
    if is_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        ones = torch.ones(num_tokens, 1, device=device), torch.ones(1, len(w), device=device)
        multiply = functools.partial(torch.ops.aten._scaled_mm, x8, w8.t(), *ones, out_dtype=dtype)
    q = torch.randn(1, config.num_heads, num_tokens, dim // config.num_heads, device=device, dtype=dtype)

    def compute_attention() -> Tensor:
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            return F.scaled_dot_product_attention(q, q, q)

    return (
        2.0 * num_tokens * dim * len(w) / fastest(multiply, device),
        4.0 * num_tokens**2 * dim / fastest(compute_attention, device),
    )


def measure_attention_backward(config: DiTConfig, num_tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Measures the FLOPs per second of the backward pass of attention."""
    num_tokens = min(num_tokens, CPU_TOKENS) if device.type == "cpu" else num_tokens
    shape = (1, config.num_heads, num_tokens, config.hidden_size_x // config.num_heads)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    gradient = torch.randn_like(out)
    seconds = fastest(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), device)
    return ATTENTION_BACKWARD * 4.0 * num_tokens**2 * config.hidden_size_x / seconds


@torch.no_grad()
def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of several runs."""
    best, begun = float("inf"), time.perf_counter()
    run()
    while best == float("inf") or time.perf_counter() - begun < RATE_SECONDS[device.type]:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def most(value: float, num_ranks: int) -> float:
    """Returns the largest value of all ranks."""
    return value if num_ranks == 1 else _over_ranks(value, dist.ReduceOp.MAX)


def total(value: float, num_ranks: int) -> float:
    """Returns the sum of the values of all ranks."""
    return float(value) if num_ranks == 1 else _over_ranks(value, dist.ReduceOp.SUM)


def _over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    joined = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(joined, op=operation)
    return joined.item()
