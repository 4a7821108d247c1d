"""What a training step keeps of each block for its backward pass, and what it computes again; the same gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mochi_tune.models.dit import AsymmDiT

# Takes a block and what its forward takes.
BlockFunction = Callable[..., Any]
# Keeps everything; the attention's output and log-sum-exp, a seventh of the work at 37 frames and two thirds at 163;
# the block's input alone.
POLICIES = ("none", "attention", "block")
_aten = torch.ops.aten
_ATTENTION = {
    getattr(_aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
}


def block_function(block: nn.Module) -> BlockFunction:
    """Returns what a block computes now, as a function of the block: equal blocks have the same one."""
    forward: Any = block.forward
    return forward.func if isinstance(forward, functools.partial) else type(block).forward


def apply_activation_checkpointing(dit: AsymmDiT, policies: Sequence[str]) -> None:
    """Makes each block keep for the backward pass what its policy says, one of POLICIES a block."""
    for block, policy in zip(dit.blocks, policies, strict=True):
        assert policy in POLICIES, policy
        if policy != "none":
            block.forward = functools.partial(_checkpointed(block_function(block), policy), block)


@functools.cache
def _checkpointed(function: BlockFunction, policy: str) -> BlockFunction:
    more = {"context_fn": _keep_attention} if policy == "attention" else {}

    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        return checkpoint(function, block, *inputs, use_reentrant=False, **more)

    return checkpointed


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
