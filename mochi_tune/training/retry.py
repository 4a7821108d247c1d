"""Repeats a micro-batch that ran out of memory with blocks that keep less for the backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mochi_tune.models.device import free_memory
from mochi_tune.training.loader import Inputs


class MemoryRetry:
    """Runs the passes of micro-batches, and repeats one micro-batch after the first out-of-memory error of the run.

    Each process decides alone, because what a block keeps changes neither its gradients nor the communication between
    steps. With parallel.context and ZeRO, processes communicate within the passes and one of them cannot start again,
    so `keep_less` must be None.

    Args:
        parameters: the parameters whose gradients the passes compute.
        keep_less: makes the blocks keep less for the backward pass, see `MemoryPlan.keep_less`; None for no retry.
        log: prints a line.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], keep_less: Callable[[], None] | None, log: Callable[[str], None]
    ) -> None:
        self.parameters = list(parameters)
        self.keep_less, self.log = keep_less, log

    def __call__(self, passes: Callable[[Inputs], Tensor], inputs: Inputs) -> Tensor:
        """Returns the loss of a micro-batch; `passes` adds its gradients to those of the parameters.

        Raises:
            torch.OutOfMemoryError: the memory does not suffice even if the blocks keep as little as possible.
        """
        if self.keep_less is None:
            return passes(inputs)
        # None before the first micro-batch of a step.
        before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        try:
            return passes(inputs)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ")[0]
        # Outside of the handler, because the error keeps the frames of the passes and their tensors alive.
        for parameter, gradient in zip(self.parameters, before, strict=True):
            parameter.grad = gradient
        free_memory()
        self.log(
            f"out of memory ({reason}): from here on all blocks are recomputed in the backward pass, as with "
            "train.recompute=block, which is slower and gives the same results; this part of the step is repeated"
        )
        self.keep_less()
        self.keep_less = None
        return passes(inputs)
