"""What a training step holds on its device, and which blocks may keep their attention for the backward pass."""

import torch
from torch import nn

from mochi_tune.models.dit import DiTConfig
from mochi_tune.parallel.precision import LARGE_LAYERS

# Bytes that one block's forward and backward hold at a time, for each visual token and each number of its width.
# Measured on an H200 at 37 and 163 frames: docs/benchmarks.md.
INSIDE_BYTES = {"compiled": 59, "eager": 90}
LARGE_WEIGHTS = tuple(f"{name}.weight" for name in LARGE_LAYERS)
# Left to kernels, to the fragments between tensors, and to other programs.
SPARE_BYTES = 2**30


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a GPU; None for a CPU, whose memory is not counted."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def weight_bytes(dit: nn.Module, dtype: torch.dtype, precision: str = "bf16") -> int:
    """Returns what a model's weights take in a dtype, its large matrices in a precision; on the meta device, too."""
    rounded = {"fp8": 1.0, "int8": 1.0, "nf4": 0.57}.get(precision, dtype.itemsize)
    return int(
        sum(
            parameter.numel() * (rounded if name.endswith(LARGE_WEIGHTS) else dtype.itemsize)
            for name, parameter in dit.named_parameters()
        )
    )


def recompute_policies(
    setting: str, config: DiTConfig, num_tokens: int, weights: int, free: int | None, is_compiled: bool
) -> list[str]:
    """Returns what each block recomputes, see `parallel.recompute.POLICIES`.

    Args:
        setting: a policy, for all blocks, or "auto": "attention", and "block" in as many blocks as memory asks for.
        config: sizes of the model.
        num_tokens: visual tokens of a micro-batch on one device.
        weights: bytes of the weights on the device.
        free: bytes that are free there before they are loaded; None: enough.
        is_compiled: whether the blocks are compiled, which makes what they hold smaller.
    """
    if setting != "auto":
        return [setting] * config.depth
    if free is None:
        return ["attention"] * config.depth
    inputs = 2 * num_tokens * config.hidden_size_x * config.depth
    inside = INSIDE_BYTES["compiled" if is_compiled else "eager"] * num_tokens * config.hidden_size_x
    # The output in 16 bits and the log-sum-exp in 32.
    attention = num_tokens * (2 * config.hidden_size_x + 4 * config.num_heads)
    num_kept = (free - weights - inputs - inside - SPARE_BYTES) // attention
    num_kept = min(config.depth, max(0, num_kept))
    return ["block"] * (config.depth - num_kept) + ["attention"] * num_kept
