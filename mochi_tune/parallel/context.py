"""Context parallelism: the visual tokens are split over heads x ring processes.

The processes of a row exchange tokens for heads, so that each attends with some of the heads. Several rows form rings,
in which keys and values are passed from row to row. Rings are used if there are more processes than heads, if their
number does not divide the heads, or if a ring is faster, see `parallel.forecast_context`.

The model is changed in three places: the outputs of its embedder and its rotary tables, the attention's core, and the
output of its last Linear. Text tokens are few, so every rank has all of them. Every rank returns the complete velocity.
Source: Ulysses, arXiv 2309.14509, in rings, arXiv 2405.07719; here with shares of any size.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import dropout

from mochi_tune.errors import ParallelError
from mochi_tune.models.attention import JointAttention
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.collectives import even_shares, gather, heads_to_tokens, tokens_to_heads
from mochi_tune.parallel.ring import ring_attention

# Modules inside a layer of the visual stream. Modulation layers are not included: they process no tokens.
_VISUAL = re.compile(r"\.(attn\.(qkv|proj)_x|mlp_x)\.")
# The arguments of `AsymmDiT.forward`, for errors.
INPUTS = ("the noisy latents", "the noise level", "the prompt", "the prompt's mask")


class TokenShares:
    """The number of visual tokens of each rank of a group; each forward pass sets it when it embeds its latents.

    Attributes:
        counts: visual tokens of each rank.
        row: the consecutive ranks, with this one, that share the heads.
        ring: the ranks that have the same heads as this one, one from each row.
    """

    def __init__(self, group: dist.ProcessGroup, heads: int) -> None:
        self.group = group
        self.context_rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        first = self.context_rank // heads * heads
        self.row = range(first, first + heads)
        self.ring = range(self.context_rank % heads, self.num_ranks, heads)
        self.counts: list[int] = []

    @property
    def in_row(self) -> list[int]:
        """The number of visual tokens of each rank of this row."""
        return [self.counts[rank] for rank in self.row]

    @property
    def in_rows(self) -> list[int]:
        """The number of visual tokens of each row."""
        heads = len(self.row)
        return [sum(self.counts[first : first + heads]) for first in range(0, self.num_ranks, heads)]

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Sets `counts` and returns this rank's share of x along `dim`, the axis of all visual tokens."""
        self.counts = even_shares(x.shape[dim], self.num_ranks)
        return x.narrow(dim, sum(self.counts[: self.context_rank]), self.counts[self.context_rank])


class SharedDropout(nn.Dropout):
    """Dropout for this rank's share of the visual tokens. All ranks draw the same full mask and use their part of it.

    So each token has the same mask as in one process, and the generators of all ranks stay in the same state. The
    dropout of text tokens, which every rank has, is then the same on all ranks.
    """

    def __init__(self, p: float, shares: TokenShares) -> None:
        super().__init__(p)
        self.shares = shares

    def forward(self, x: Tensor) -> Tensor:
        """Takes and returns (B, n, C), n being this rank's share of the tokens."""
        if not self.training or not self.p:
            return x
        counts, rank = self.shares.counts, self.shares.context_rank
        assert x.shape[1] == counts[rank], (x.shape, counts)
        rows, num_tokens, width = x.shape[0], sum(counts), x.shape[2]
        # A mask is drawn in the order of memory. For clips of one latent frame, tokens may be the last axis in memory.
        is_turned = x.stride(2) != 1
        ones = x.new_ones((rows, width, num_tokens) if is_turned else (rows, num_tokens, width))
        mask = dropout(ones.transpose(1, 2) if is_turned else ones, self.p)
        return x * mask.narrow(1, sum(counts[:rank]), counts[rank])


class RingAttention(JointAttention):
    """`JointAttention` for the visual tokens of one row; the visual keys of all rows are passed around the ring.

    Every rank has all text tokens, so their keys are not passed, and every row computes all of their outputs.
    """

    def __init__(self, shares: TokenShares) -> None:
        super().__init__()
        self.shares = shares

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_visual: int) -> Tensor:
        """Attends this row's queries (B, H, ., K) to the keys of all rows; the first `num_visual` keys travel."""
        assert num_visual == sum(self.shares.in_row)
        return ring_attention(q, k, v, self.shares.group, self.shares.ring, self.shares.in_rows)


class ContextParallelAttention(nn.Module):
    """Attention over the tokens of all ranks: exchanges tokens for heads, runs the core, and exchanges back."""

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
        """As `JointAttention.forward`, with this rank's visual tokens and all text tokens."""
        row = self.shares.row
        of_row = self.shares.in_row, self.shares.group, row.start
        x = (tokens_to_heads(t, *of_row) for t in (q_x, k_x, v_x))
        own = self.shares.context_rank - row.start
        y = (None if t is None else t.chunk(len(row), dim=2)[own] for t in (q_y, k_y, v_y))
        out_x, out_y = self.core(*x, *y, text_lengths)
        width = q_x.shape[-1]
        out_x = heads_to_tokens(out_x.unflatten(-1, (-1, width)), *of_row).flatten(2)
        if out_y is not None:
            # Contiguous, as in one process, because a dropout draws its mask in the order of memory.
            out_y = gather(out_y, [out_y.shape[-1]] * len(row), -1, self.shares.group, row.start).contiguous()
        return out_x, out_y


def check_inputs(inputs: Sequence[Any], group: dist.ProcessGroup) -> None:
    """Refuses inputs of `AsymmDiT.forward` that are not bitwise equal on all ranks. All ranks must call it.

    Raises:
        ParallelError: some inputs differ; names one of them and the ranks.
    """
    sums = [hashlib.sha256(x.detach().contiguous().cpu().view(torch.uint8).numpy()).hexdigest() for x in inputs[:4]]
    gathered: list[list[str]] = [[]] * dist.get_world_size(group)
    dist.all_gather_object(gathered, sums, group=group)
    for name, of_ranks in zip(INPUTS, zip(*gathered, strict=True), strict=False):
        if other := [str(rank) for rank, found in enumerate(of_ranks) if found != of_ranks[0]]:
            raise ParallelError(
                f"the processes of one video have diverged in {name}: context ranks 0 and {', '.join(other)} differ: "
                "all ranks must draw the same noise and get the same prompts and weights."
            )


def apply_context_parallel(dit: AsymmDiT, group: dist.ProcessGroup, heads: int, checks_inputs: bool = False) -> None:
    """Splits the work on visual tokens over the ranks of a group, for any number of ranks and any video size.

    All ranks must call the model with the same inputs, and all get the same complete output. Gradients are each rank's
    share of the gradient of the sum of the ranks' losses.

    Args:
        dit: the model. Adapters must be added before, or each rank would draw a different dropout mask.
        group: the ranks.
        heads: number of ranks that share the heads, a divisor of the number of ranks and of heads. See `choose_split`.
        checks_inputs: whether each call compares the inputs of all ranks, which copies them to the CPU.
    """
    assert dist.get_world_size(group) % heads == 0 and dit.config.num_heads % heads == 0, heads
    shares = TokenShares(group, heads)

    def take_tokens(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
        # A copy, which has no gaps in memory: copies of a block's input, as in host memory, then have its strides.
        return shares.take(x, 1).clone()

    def take_positions(_module: nn.Module, _inputs: Any, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(shares.take(table, 0) for table in tables)

    def gather_tokens(_module: nn.Module, _inputs: Any, x: Tensor) -> Tensor:
        return gather(x, shares.counts, 1, group)

    if checks_inputs:
        dit.register_forward_pre_hook(lambda _module, inputs: check_inputs(inputs, group))
    dit.x_embedder.register_forward_hook(take_tokens)
    dit.rope.register_forward_hook(take_positions)
    for block in dit.blocks:
        attention = block.get_submodule("attn")
        core = RingAttention(shares) if len(shares.ring) > 1 else attention.get_submodule("core")
        attention.set_submodule("core", ContextParallelAttention(core, shares))
    dit.final_layer.linear.register_forward_hook(gather_tokens)
    for name, module in list(dit.named_modules()):
        if type(module) is nn.Dropout and _VISUAL.search(name):
            dit.set_submodule(name, SharedDropout(module.p, shares))
