"""Activation checkpointing: what each block keeps for its backward pass and what it recomputes; gradients are equal."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.layers import FeedForward
from mochi_tune.parallel import ring  # noqa: F401  It registers torch.ops.mochi_tune.ring_attention.

# Called with a block and the arguments of its forward.
BlockFunction = Callable[..., Any]
# What a block keeps: everything; its input, and the output and log-sum-exp of attention; only its input.
POLICIES = ("none", "attention", "block")
_aten = torch.ops.aten
_ATTENTION = {
    getattr(_aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
} | {torch.ops.mochi_tune.ring_attention.default}


def block_function(block: nn.Module) -> BlockFunction:
    """Returns the current forward of a block as a function of the block; equal blocks have the same function."""
    forward: Any = block.forward
    return forward.func if isinstance(forward, functools.partial) else type(block).forward


def apply_activation_checkpointing(dit: AsymmDiT, policies: Sequence[str], inputs: "HostInputs | None" = None) -> None:
    """Makes each block keep for the backward pass what its policy says, and recompute the rest.

    Args:
        dit: the model.
        policies: the policy of each block, one of POLICIES.
        inputs: holds the visual inputs of checkpointed blocks in host memory; None: they stay on the device.
    """
    if inputs is not None:
        # An interrupted pass may have left inputs.
        dit.register_forward_pre_hook(lambda *_: inputs.clear())
    for block, policy in zip(dit.blocks, policies, strict=True):
        assert policy in POLICIES, policy
        if policy == "none":
            continue
        function = block_function(block)
        checkpointed = _checkpointed(function, policy) if inputs is None else _offloaded(function, policy, inputs)
        block.forward = functools.partial(checkpointed, block)


class SlicedFeedForward(FeedForward):
    """A feed-forward layer that processes `num_tokens` at a time, forward and backward.

    With active dropout, it processes all tokens at once, because slices would draw different masks.
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
    """Makes the visual feed-forward layers process `num_tokens` at a time, forward and backward, to save memory.

    Inside they are five times as wide as the stream. The results of each token do not change; sums over tokens, such
    as the gradients of adapters, have a different order.
    """
    for block in dit.blocks:
        mlp: Any = block.get_submodule("mlp_x")
        assert type(mlp) in (FeedForward, SlicedFeedForward), type(mlp)
        # The class is changed, because a forward set on each instance would be compiled separately for each block.
        mlp.__class__ = SlicedFeedForward
        mlp.num_tokens = num_tokens
        mlp.has_dropout = any(isinstance(module, nn.Dropout) and module.p for module in mlp.modules())


def _checkpointed(function: BlockFunction, policy: str) -> BlockFunction:
    def checkpointed(block: nn.Module, *inputs: Any) -> Any:
        more: Any = {}
        if policy == "attention":
            more = {"context_fn": _keep_attention}
        elif torch.compiler.is_compiling():
            # Without a context, torch 2.11 keeps the outputs of `autograd.Function`s, such as 8-bit products.
            more = {"context_fn": _keep_nothing}
        return checkpoint(function, block, *inputs, use_reentrant=False, **more)

    # Stored on the function, so that equal blocks share it and it is freed with the model whose weights it streams.
    return vars(function).setdefault(f"checkpointed_{policy}", checkpointed)


def _offloaded(function: BlockFunction, policy: str, inputs: "HostInputs") -> BlockFunction:
    def from_host(block: nn.Module, number: int, *others: Any) -> Any:
        # Selective checkpointing counts operations, and must not count those of the copy.
        with _disable_current_modes():
            x = inputs.get(number)
        return function(block, x, *others)

    # Not at each call, because the compiler cannot trace the attributes of a function.
    checkpointed = _checkpointed(from_host, policy)

    def offloaded(block: nn.Module, x: Tensor, *others: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(block, x, *others)
        number = inputs.put(x)
        # The graph of the forward pass depends on x itself; only the recomputation uses a copy.
        out = checkpointed(block, number, *others)
        inputs.send(number)
        return out

    return inputs.functions.setdefault((function, policy), offloaded)


class HostInputs:
    """Holds the visual inputs of blocks in host memory from the forward to the backward pass of each block.

    In the backward pass, the input of the next block is fetched while a block computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.device = device
        # Inputs by number, from 0 in each pass: not sent yet, in host memory, and back on the device.
        self.given: dict[int, Tensor] = {}
        self.waiting: dict[int, Tensor] = {}
        self.fetched: dict[int, Tensor] = {}
        self.needs_grad: dict[int, bool] = {}
        # The new function of a block by its old one and its policy; stored here, so that it is freed with the inputs.
        self.functions: dict[tuple[BlockFunction, str], BlockFunction] = {}

    def clear(self) -> None:
        """Drops all inputs and starts a new pass, whose first input has the number 0."""
        for left in (self.given, self.waiting, self.fetched, self.needs_grad):
            left.clear()

    def put(self, x: Tensor) -> int:
        """Registers an input before the forward pass of its block; returns its number."""
        number = len(self.needs_grad)
        self.given[number], self.needs_grad[number] = x, x.requires_grad
        return number

    def get(self, number: int) -> Tensor:
        """Returns the input itself in the forward pass, and a copy from the host in the backward pass."""
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
        """Copies an input to the host after the forward pass of its block."""
        x = self.given.pop(number).detach()
        # With the strides of x: compiled code expects them, and a dropout draws its mask in the order of memory. For
        # clips of one latent frame, tokens may be the last axis in memory.
        host = torch.empty_like(x, device="cpu", pin_memory=self.stream is not None)
        if self.stream is None:
            self.waiting[number] = host.copy_(x)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
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
