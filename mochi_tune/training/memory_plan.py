"""What a training step holds on its device and in host memory, and how its blocks are arranged for that."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mochi_tune.errors import ConfigError
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.parallel.precision import LARGE_LAYERS
from mochi_tune.parallel.recompute import HostInputs, apply_activation_checkpointing, apply_mlp_slices
from mochi_tune.parallel.stream import NUM_BUFFERS, apply_streaming

# Bytes that one block's forward and backward hold at a time, for each visual token and each number of its width.
# From the peaks of such a step on an H200 at 37 and 163 frames, less the weights and the blocks' inputs.
INSIDE_BYTES = {"compiled": 59, "eager": 90}
LARGE_WEIGHTS = tuple(f"{name}.weight" for name in LARGE_LAYERS)
# At a time, where memory is short.
MLP_TOKENS = 4096
# Left to kernels, to the fragments between tensors, and to other programs.
SPARE_BYTES = 2**30


@dataclass(frozen=True)
class MemoryPlan:
    """Where a training has its blocks, and what it keeps of them for the backward pass; none of it changes a result.

    Attributes:
        recompute: what each block computes again, one of `parallel.recompute.POLICIES`.
        is_compiled: whether the blocks are compiled.
        is_streamed: whether the blocks' weights are in host memory.
        offloads_inputs: whether the blocks' inputs wait in host memory for the backward pass; their feed-forward layers
            then work on MLP_TOKENS at a time.
    """

    recompute: list[str]
    is_compiled: bool
    is_streamed: bool
    offloads_inputs: bool

    def apply(
        self,
        dit: AsymmDiT,
        device: torch.device,
        log: Callable[[str], None],
        before_compiling: Callable[[], None] | None = None,
    ) -> None:
        """Arranges the blocks of a model that has its adapter: on the device, or on the CPU where it is streamed.

        Args:
            dit: the model.
            device: where it computes.
            log: writes a line for the user.
            before_compiling: called before each graph is compiled, which takes some seconds; may raise.
        """
        if self.offloads_inputs:
            apply_mlp_slices(dit, MLP_TOKENS)
        if self.is_compiled and self.is_streamed:
            # A graph of what is between two copies; otherwise a graph partitions what is kept, too.
            apply_compilation(dit, log, True, before_compiling)
        if self.is_streamed:
            apply_streaming(dit, device)
        apply_activation_checkpointing(dit, self.recompute, HostInputs(device) if self.offloads_inputs else None)
        if self.is_compiled and not self.is_streamed:
            apply_compilation(dit, log, True, before_compiling)


def check_host_memory(needed: int, available: int) -> None:
    """Refuses weights in host memory that does not have them.

    Raises:
        ConfigError: naming what is needed.
    """
    if needed > available:
        raise ConfigError(
            f"host memory has {available / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB of weights are to stay "
            "there: free some, or use memory.dit=resident or model.precision=int8."
        )


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of the fullest process's GPU; None for a CPU, whose memory is not counted.

    Processes that share the tokens of a sample exchange them while they recompute: all have to do that alike.
    """
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if dist.is_initialized():
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return int(free.item())


def weight_bytes(dit: AsymmDiT, dtype: torch.dtype, precision: str = "bf16") -> dict[str, int]:
    """Returns the bytes of a model's "blocks", of their "modulation", and of the "rest"; on the meta device, too.

    Args:
        dit: the model.
        dtype: of its weights.
        precision: of its large matrices, see `parallel.precision`.
    """
    rounded = {"fp8": 1.0, "int8": 1.0, "nf4": 0.57}.get(precision, dtype.itemsize)
    sizes = {"blocks": 0.0, "modulation": 0.0, "rest": 0.0}
    for name, parameter in dit.named_parameters():
        part = "rest" if not name.startswith("blocks.") else "modulation" if ".mod_" in name else "blocks"
        sizes[part] += parameter.numel() * (rounded if name.endswith(LARGE_WEIGHTS) else dtype.itemsize)
    return {part: int(size) for part, size in sizes.items()}


def bytes_on_device(weights: dict[str, int], config: DiTConfig, is_streamed: bool) -> int:
    """Returns what `weight_bytes` has on the device: no modulation, and of streamed blocks the buffers."""
    blocks = weights["blocks"] * min(NUM_BUFFERS, config.depth) // config.depth if is_streamed else weights["blocks"]
    return blocks + weights["rest"]


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
