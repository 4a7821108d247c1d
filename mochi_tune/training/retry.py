"""A micro-batch whose passes ran out of memory is computed again, with blocks that keep less: the same mathematics."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mochi_tune.models.device import free_memory
from mochi_tune.training.loader import Inputs


class MemoryRetry:
    """Runs the passes of micro-batches; once a run, after an out-of-memory error, those of one micro-batch again.

    Each process decides for itself: what a block keeps changes neither its gradients nor what processes exchange
    between the steps. Where they exchange something within the passes, as with parallel.context and ZeRO, one of them
    cannot begin anew: `keep_less` is to be None there.

    Args:
        parameters: that the passes add gradients to.
        keep_less: makes the blocks keep less for the backward pass, see `MemoryPlan.keep_less`; None: no retry.
        log: writes a line for the user.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], keep_less: Callable[[], None] | None, log: Callable[[str], None]
    ) -> None:
        self.parameters = list(parameters)
        self.keep_less, self.log = keep_less, log

    def __call__(self, passes: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """Returns the loss of a micro-batch, whose gradients `passes` adds to those of the parameters.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice for a micro-batch whose blocks keep the least.
        """
        if self.keep_less is None:
            return passes(inputs)
        # None before the first micro-batch of a step.
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        try:
            return passes(inputs)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # Not above: the error holds the frames of the passes, and these what the passes have made.
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        free_memory()
        self.log(
            f"memory did not suffice ({reason}): from here on all blocks are computed again in the backward pass, as "
            "with train.recompute=block, which is slower and changes no number; this part of the step is made again"
        )
        self.keep_less()
        self.keep_less = None
        return passes(inputs)
