"""The optimizer and the learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def build_adamw(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, device_type: str
) -> torch.optim.AdamW:
    """Builds AdamW over fp32 parameters; fused on CUDA."""
    parameters = list(parameters)
    assert all(p.dtype == torch.float32 for p in parameters), "adapter weights and their Adam state are fp32"
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.999), weight_decay=weight_decay, fused=device_type == "cuda"
    )


def learning_rate_at(step: int, peak: float, warmup_steps: int, num_steps: int) -> float:
    """Returns the learning rate of a step, counted from 1: a linear warm-up to the peak, then half a cosine to 0.

    A function of the step alone, so that it needs no state and cannot drift from it.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = (step - 1 - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))
