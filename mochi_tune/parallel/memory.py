"""Trading time for memory, as functions over a model that knows nothing of it."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_activation_checkpointing(dit: nn.Module) -> None:
    """Keeps only each block's input for the backward pass and computes its inside again; gradients stay the same."""
    for block in dit.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
