"""Frozen blocks that live in host memory and visit the device, for training: forward, and again on the way back.

The blocks go through a ring of buffers on the device. While one computes, the next one in the direction of the pass is
copied into the buffer whose block was left longest ago. Nothing is written back.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.recompute import BlockFunction, block_function

NUM_BUFFERS = 3
# Of a tensor's first byte in a buffer: what kernels may count on.
ALIGNMENT = 256


class Copier(Protocol):
    """Copies beside the arithmetic."""

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Starts to copy when the device has done what it was asked for until now; returns what to wait for."""

    def wait(self, copy: Any) -> None:
        """Makes the arithmetic that is asked for from now on wait for a copy."""


class CudaCopier:
    """Copies on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Starts to copy, after the kernels that still read the targets."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copy: Any) -> None:
        """Makes the current stream wait."""
        torch.cuda.current_stream().wait_event(copy)


class ThreadCopier:
    """Copies in a thread: what a CPU has beside its arithmetic."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Future:
        """Starts to copy; a CPU has done already what it was asked for."""
        return self.thread.submit(self.copy, targets, sources)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copies now."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def wait(self, copy: Future) -> None:
        """Waits for the thread."""
        copy.result()


def apply_streaming(dit: AsymmDiT, device: torch.device, copier: Copier | None = None) -> None:
    """Keeps the blocks' frozen weights in host memory; adapters and all other modules move to the device for good.

    The blocks must be checkpointed after this: what is kept of a forward pass would be kept with its weights.

    Args:
        dit: on the CPU, frozen but for its adapters.
        device: where it computes.
        copier: copies beside the arithmetic; None: that of the device.
    """
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    dit.pos_frequencies.data = dit.pos_frequencies.data.to(device)
    ring = BlockRing(list(dit.blocks), device, copier or _copier(device))
    for number, block in enumerate(dit.blocks):
        block.forward = functools.partial(_streamed(block_function(block), ring), block)
        ring.numbers[block] = number


class BlockRing:
    """The buffers on the device, and which block is in which."""

    def __init__(self, blocks: list[nn.Module], device: torch.device, copier: Copier) -> None:
        self.copier = copier
        self.numbers: dict[nn.Module, int] = {}
        self.parameters, self.home = [], []
        for block in blocks:
            for name, parameter in block.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(device)
            frozen = _frozen(block)
            self.parameters.append(list(frozen.values()))
            # Only from pinned memory does a copy run beside the arithmetic.
            pin = device.type == "cuda"
            for parameter in frozen.values():
                parameter.data = parameter.data.pin_memory() if pin else parameter.data
                if (scales := getattr(parameter, "quant_state", None)) is not None:
                    # bitsandbytes keeps them beside the parameter, and its kernels read them on the device.
                    scales.to(device)
            self.home.append([parameter.data for parameter in frozen.values()])
        size = max(_offsets(tensors)[-1] for tensors in self.home)
        num_buffers = min(NUM_BUFFERS, len(blocks))
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_buffers)]
        # Of each buffer, its block, and when it was entered last.
        self.block_of: list[int | None] = [None] * num_buffers
        self.entered = [0] * num_buffers
        self.copies: dict[int, Any] = {}
        self.current, self.direction, self.clock = -1, 1, 0
        # What computes a block, by what computed it without the ring; here, so that it ends with the ring.
        self.functions: dict[BlockFunction, BlockFunction] = {}

    def enter(self, number: int) -> None:
        """Gives a block its weights on the device, and starts to copy those of the block that comes next."""
        if number != self.current:
            self.direction = 1 if number > self.current else -1
        elif number == len(self.home) - 1:
            # The last block is entered twice in a row: the backward pass begins.
            self.direction = -1
        if number not in self.block_of:
            self._start(number)
        buffer = self.block_of.index(number)
        if number in self.copies:
            self.copier.wait(self.copies.pop(number))
        self.clock += 1
        self.current, self.entered[buffer] = number, self.clock
        for parameter, view in zip(self.parameters[number], self._views(number, buffer), strict=True):
            parameter.data = view
        following = number + self.direction
        if 0 <= following < len(self.home) and following not in self.block_of:
            self._start(following)

    def _start(self, number: int) -> None:
        free = [i for i, block in enumerate(self.block_of) if block is None or block != self.current]
        buffer = min(free, key=lambda i: self.entered[i])
        if (before := self.block_of[buffer]) is not None:
            for parameter, home in zip(self.parameters[before], self.home[before], strict=True):
                parameter.data = home
            if before in self.copies:  # It was copied for a pass that turned round.
                self.copier.wait(self.copies.pop(before))
        self.block_of[buffer] = number
        self.copies[number] = self.copier.start(self._views(number, buffer), self.home[number])

    def _views(self, number: int, buffer: int) -> list[Tensor]:
        tensors = self.home[number]
        pairs = zip(_offsets(tensors), tensors, strict=False)
        return [self.buffers[buffer][at : at + t.nbytes].view(t.dtype).view(t.shape) for at, t in pairs]


def _frozen(block: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in block.named_parameters() if ".lora_" not in name}


def _offsets(tensors: Sequence[Tensor]) -> list[int]:
    """Returns where each tensor begins in a buffer, and last where the buffer ends."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _copier(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else ThreadCopier()


def _streamed(function: BlockFunction, ring: BlockRing) -> BlockFunction:
    def streamed(block: nn.Module, *inputs: Any) -> Any:
        # Selective checkpointing counts operations; those of a copy are none of the block's.
        with _disable_current_modes():
            ring.enter(ring.numbers[block])
        return function(block, *inputs)

    return ring.functions.setdefault(function, streamed)
