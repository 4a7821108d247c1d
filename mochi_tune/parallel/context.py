"""Context parallelism: the visual tokens are split over processes, and each one attends to all tokens
with some of the heads.

It changes a model at three seams: the outputs of its embedder and its rotary tables, the attention's core, and the
output of its last Linear. Text tokens are few; every rank has them all. Every rank gets the complete velocity.
Source: Ulysses, arXiv 2309.14509; here with shares of any size.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mochi_tune.errors import ParallelError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.collectives import even_shares, gather, heads_to_tokens, tokens_to_heads


class TokenShares:
    """How many visual tokens each rank of a group has; settled anew when a forward pass embeds its latents."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.context_rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.counts: list[int] = []

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Returns this rank's share of x along `dim`, which holds all visual tokens."""
        self.counts = even_shares(x.shape[dim], self.num_ranks)
        return x.narrow(dim, sum(self.counts[: self.context_rank]), self.counts[self.context_rank])


class ContextParallelAttention(nn.Module):
    """The attention's core over all ranks' tokens: to heads, the core as it was, and back to tokens."""

    def __init__(self, core: nn.Module, shares: TokenShares) -> None:
        super().__init__()
        self.core = core
        self.shares = shares

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor,
        v_x: Tensor,
        q_y: Tensor | None,
        k_y: Tensor,
        v_y: Tensor,
        text_lengths: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Takes and returns what `JointAttention` does, of this rank's visual tokens and of all text tokens."""
        counts, group = self.shares.counts, self.shares.group
        x = (tokens_to_heads(t, counts, group) for t in (q_x, k_x, v_x))
        y = (
            None if t is None else t.chunk(self.shares.num_ranks, dim=2)[self.shares.context_rank]
            for t in (q_y, k_y, v_y)
        )
        out_x, out_y = self.core(*x, *y, text_lengths)
        width = q_x.shape[-1]
        out_x = heads_to_tokens(out_x.unflatten(-1, (-1, width)), counts, group).flatten(2)
        if out_y is not None:
            out_y = gather(out_y, [out_y.shape[-1]] * self.shares.num_ranks, -1, group)
        return out_x, out_y


def check_context_ranks(num_ranks: int, num_heads: int) -> None:
    """Refuses a number of ranks that does not divide the heads.

    Raises:
        ParallelError: naming the numbers that do.
    """
    if num_heads % num_ranks:
        possible = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ParallelError(
            f"parallel.context={num_ranks} does not divide the model's {num_heads} heads: use {', '.join(possible)}."
        )


def apply_context_parallel(dit: AsymmDiT, group: dist.ProcessGroup) -> None:
    """Splits the work on visual tokens over the ranks of a group; with adapters or without, for any number of frames.

    All ranks call the model with the same inputs and get the same complete output. Gradients are each rank's share of
    the gradient of the sum of the ranks' losses.

    Raises:
        ParallelError: the number of ranks does not divide the heads.
    """
    shares = TokenShares(group)
    check_context_ranks(shares.num_ranks, dit.config.num_heads)

    def take_tokens(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
        return shares.take(x, 1)

    def take_positions(_module: nn.Module, _inputs: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(shares.take(table, 0) for table in tables)

    def gather_tokens(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
        return gather(x, shares.counts, 1, group)

    dit.x_embedder.register_forward_hook(take_tokens)
    dit.rope.register_forward_hook(take_positions)
    for block in dit.blocks:
        attention = block.get_submodule("attn")
        attention.set_submodule("core", ContextParallelAttention(attention.get_submodule("core"), shares))
    dit.final_layer.linear.register_forward_hook(gather_tokens)
