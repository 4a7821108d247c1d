"""Weight streaming: frozen blocks stay in host memory and are copied to the device in each pass.

The device has a few buffers. While a block computes, the next one, in the direction of the pass, is copied into the
least recently used buffer. Nothing is written back.
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

# In training.
NUM_BUFFERS = 3
# Alignment of tensors in a buffer in bytes, which kernels rely on.
ALIGNMENT = 256


class Copier(Protocol):
    """Copies tensors in parallel with the arithmetic."""

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Starts a copy after all work queued so far; returns a handle for `wait`."""

    def wait(self, copy: Any) -> None:
        """Makes all work queued from now on wait for a copy."""


class CudaCopier:
    """Copies on a separate CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Starts a copy after the kernels that still read the targets."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copy: Any) -> None:
        """Makes the current stream wait for the copy."""
        torch.cuda.current_stream().wait_event(copy)


class ThreadCopier:
    """Copies in a thread, on a CPU."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1)

    def start(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Future:
        """Starts a copy in the thread. On a CPU, all work so far is already done."""
        return self.thread.submit(self.copy, targets, sources)

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copies synchronously."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def wait(self, copy: Future) -> None:
        """Waits until the copy is done."""
        copy.result()


def apply_streaming(dit: AsymmDiT, device: torch.device, copier: Copier | None = None) -> None:
    """Streams the blocks' frozen weights from host memory; adapters and all other modules are moved to the device.

    Checkpointing must be applied to all blocks after this. Otherwise autograd saves weights in a buffer, which later
    blocks overwrite.

    Args:
        dit: the model on the CPU, frozen except for its adapters.
        device: the device that computes.
        copier: copies the weights; None: the default of the device.
    """
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    dit.pos_frequencies.data = dit.pos_frequencies.data.to(device)
    ring = BlockRing(list(dit.blocks), device, copier)
    for number, block in enumerate(dit.blocks):
        block.forward = functools.partial(_streamed(block_function(block), ring), block)
        ring.numbers[block] = number


class BlockRing:
    """The buffers on the device and the blocks that they hold.

    The buffers are allocated once. Copies into memory that is allocated for each block would fill the device with
    blocks, because the host runs ahead of the device, and memory of work that is not done cannot be used again.
    """

    def __init__(
        self, blocks: list[nn.Module], device: torch.device, copier: Copier | None, num_buffers: int = NUM_BUFFERS
    ) -> None:
        self.copier = copier or _copier(device)
        self.numbers: dict[nn.Module, int] = {}
        self.parameters, self.home = [], []
        for block in blocks:
            for name, parameter in block.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(device)
            frozen = _frozen(block)
            self.parameters.append(list(frozen.values()))
            # Only copies from pinned memory run in parallel with the arithmetic.
            pin = device.type == "cuda"
            for parameter in frozen.values():
                parameter.data = parameter.data.pin_memory() if pin else parameter.data
                if (scales := getattr(parameter, "quant_state", None)) is not None:
                    # bitsandbytes stores scales as an attribute of the parameter; its kernels need them on the device.
                    scales.to(device)
            self.home.append([parameter.data for parameter in frozen.values()])
        size = max(_offsets(tensors)[-1] for tensors in self.home)
        num_buffers = min(num_buffers, len(blocks))
        self.buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(num_buffers)]
        # For each buffer, its block and the time (`clock`) of its last use.
        self.block_of: list[int | None] = [None] * num_buffers
        self.entered = [0] * num_buffers
        self.copies: dict[int, Any] = {}
        self.current, self.direction, self.clock = -1, 1, 0
        # The streamed function of a block by its original one; stored here, so that it is freed with the ring.
        self.functions: dict[BlockFunction, BlockFunction] = {}

    def enter(self, number: int) -> None:
        """Gives a block its weights on the device, and starts the copy of the next block."""
        if number != self.current:
            # The first block is the last one of a backward pass, or begins another pass after one without gradients.
            self.direction = 1 if number > self.current or number == 0 else -1
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
            if before in self.copies:  # It was prefetched, but the pass changed its direction.
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
    """Returns the offset of each tensor in a buffer, followed by the size of the buffer."""
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT)
    return offsets


def _copier(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else ThreadCopier()


def _streamed(function: BlockFunction, ring: BlockRing) -> BlockFunction:
    def streamed(block: nn.Module, *inputs: Any) -> Any:
        # Selective checkpointing counts operations, and must not count those of the copy.
        with _disable_current_modes():
            ring.enter(ring.numbers[block])
        return function(block, *inputs)

    return ring.functions.setdefault(function, streamed)
