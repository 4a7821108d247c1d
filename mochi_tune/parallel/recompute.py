"""What a training step keeps of each block for its backward pass, and what it computes again; the same gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.layers import FeedForward
from mochi_tune.parallel import ring  # noqa: F401  It defines an operation.

# Takes a block and what its forward takes.
BlockFunction = Callable[..., Any]
# What is kept: everything; the block's input, and the attention's output and log-sum-exp; the block's input alone.
POLICIES = ("none", "attention", "block")
_aten = torch.ops.aten
_ATTENTION = {
    getattr(_aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
} | {torch.ops.mochi_tune.ring_attention.default}


def block_function(block: nn.Module) -> BlockFunction:
    """Returns what a block computes now, as a function of the block: equal blocks have the same one."""
    forward: Any = block.forward
    return forward.func if isinstance(forward, functools.partial) else type(block).forward


def apply_activation_checkpointing(dit: AsymmDiT, policies: Sequence[str], inputs: "HostInputs | None" = None) -> None:
    """Makes each block keep for the backward pass what its policy says.

    Args:
        dit: the model.
        policies: of each block, one of POLICIES.
        inputs: where the checkpointed blocks' visual inputs wait for the backward pass; None: on the device.
    """
    if inputs is not None:
        # What a pass that was broken off has left is dropped.
        dit.register_forward_pre_hook(lambda *_: inputs.clear())
    for block, policy in zip(dit.blocks, policies, strict=True):
        assert policy in POLICIES, policy
        if policy == "none":
            continue
        function = block_function(block)
        checkpointed = _checkpointed(function, policy) if inputs is None else _waiting(function, policy, inputs)
        block.forward = functools.partial(checkpointed, block)


class SlicedFeedForward(FeedForward):
    """A feed-forward layer that works on `num_tokens` at a time, in its backward pass, too.

    With a dropout in it, it works on all at once: slices would draw other masks.
    """

    num_tokens: int
    has_dropout: bool

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, n, D) to (B, n, D)."""
        if x.shape[1] <= self.num_tokens or (self.has_dropout and self.training):
            return super().forward(x)
        parts = x.split(self.num_tokens, dim=1)
        if not torch.is_grad_enabled():
            return torch.cat([super(SlicedFeedForward, self).forward(part) for part in parts], dim=1)
        return torch.cat([checkpoint(FeedForward.forward, self, part, use_reentrant=False) for part in parts], dim=1)


def apply_mlp_slices(dit: AsymmDiT, num_tokens: int) -> None:
    """Makes the visual feed-forward layers work on some tokens at a time, in their backward pass, too.

    Inside they are five times as wide as the stream. Every token has the numbers that it would have among all others;
    sums over tokens, as gradients of adapters are, have another order.
    """
    for block in dit.blocks:
        mlp: Any = block.get_submodule("mlp_x")
        assert type(mlp) in (FeedForward, SlicedFeedForward), type(mlp)
        # By its class: a forward of its own would be compiled for each block anew.
        mlp.__class__ = SlicedFeedForward
        mlp.num_tokens = num_tokens
        mlp.has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in mlp.modules())


def _checkpointed(function: BlockFunction, policy: str) -> BlockFunction:
    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        more: Any = {}
        if policy == "attention":
            more = {"context_fn": _keep_attention}
        elif torch.compiler.is_compiling():
            # Without one, torch 2.11 keeps what an `autograd.Function` has computed, as 8-bit products are.
            more = {"context_fn": _keep_nothing}
        return checkpoint(function, block, *inputs, use_reentrant=False, **more)

    # Kept with the function, so that equal blocks share it and it ends with the model whose weights it streams.
    return vars(function).setdefault(f"checkpointed_{policy}", checkpointed)


def _waiting(function: BlockFunction, policy: str, inputs: "HostInputs") -> BlockFunction:
    def from_host(block: nn.Module, number: int, *others: Any) -> Any:
        # Selective checkpointing counts operations; those of a copy are none of the block's.
        with _disable_current_modes():
            x = inputs.get(number)
        return function(block, x, *others)

    # Here, and not at each call: a compiled block could not be traced through what is kept with a function.
    checkpointed = _checkpointed(from_host, policy)

    def waiting(block: nn.Module, x: Tensor, *others: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(block, x, *others)
        number = inputs.put(x)
        # The graph of this pass hangs on x; the recomputation gets a copy that only takes its place.
        out = checkpointed(block, number, *others)
        inputs.send(number)
        return out

    return inputs.functions.setdefault((function, policy), waiting)


class HostInputs:
    """Visual inputs of blocks, which wait in host memory from a block's forward to its backward pass.

    On the way back, the input of the block that comes next is fetched while a block computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        # By number, from 0 in each pass: on the device, in host memory, and on the device again.
        self.given: dict[int, Tensor] = {}
        self.waiting: dict[int, Tensor] = {}
        self.fetched: dict[int, Tensor] = {}
        self.needs_grad: dict[int, bool] = {}
        # What computes a block, by what computed it and its policy; here, so that it ends with the inputs.
        self.functions: dict[tuple[BlockFunction, str], BlockFunction] = {}

    def clear(self) -> None:
        """Begins a pass: the number of the next input is 0."""
        for left in (self.given, self.waiting, self.fetched, self.needs_grad):
            left.clear()

    def put(self, x: Tensor) -> int:
        """Takes an input before its block's forward pass; returns its number."""
        number = len(self.needs_grad)
        self.given[number], self.needs_grad[number] = x, x.requires_grad
        return number

    def get(self, number: int) -> Tensor:
        """Returns an input: itself in the forward pass, a copy from the host in the backward pass."""
        if number in self.given:
            return self.given[number]
        if number not in self.fetched:
            self._fetch(number)
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        x = self.fetched.pop(number)
        if self.stream is not None:
            x.record_stream(torch.cuda.current_stream(self.device))
        if number:
            self._fetch(number - 1)
        return x.requires_grad_(self.needs_grad[number])

    def send(self, number: int) -> None:
        """Sends an input to the host after its block's forward pass."""
        x = self.given.pop(number).detach()
        if self.stream is None:
            self.waiting[number] = x.clone()
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.waiting[number] = host.copy_(x, non_blocking=True)
        x.record_stream(self.stream)

    def _fetch(self, number: int) -> None:
        if self.stream is None:
            self.fetched[number] = self.waiting.pop(number)
            return
        with torch.cuda.stream(self.stream):
            self.fetched[number] = self.waiting.pop(number).to(self.device, non_blocking=True)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _keep_nothing() -> Any:
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


def _policy(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
