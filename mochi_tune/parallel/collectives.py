"""Differentiable exchanges between the ranks of a group. Each backward pass is the exact adjoint of its forward pass.

The loss is the sum of the losses of all ranks. Each rank computes its share of a gradient; the sum over the ranks is
the gradient. All exchanges use one collective, the all-to-all, whose adjoint is the reverse all-to-all. Ranks may have
different numbers of rows.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def even_shares(count: int, parts: int) -> list[int]:
    """Splits `count` items into `parts` shares as evenly as possible; larger shares come first."""
    each, more = divmod(count, parts)
    return [each + (i < more) for i in range(parts)]


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return _AllToAll.apply(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


def all_to_all(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup, first: int = 0
) -> Tensor:
    """Sends rows of x to consecutive ranks and returns the rows received from them, in the order of the ranks.

    Args:
        x: (sum of `sent`, ...), the rows for the first rank first.
        sent: number of rows for each of the ranks.
        received: number of rows from each of the ranks.
        group: the group; all of its ranks must call this together.
        first: the first of the ranks that `sent` and `received` describe. Nothing is exchanged with others.
    """
    if len(sent) == 1:
        return x
    before, after = [0] * first, [0] * (dist.get_world_size(group) - first - len(sent))
    return _AllToAll.apply(x, [*before, *sent, *after], [*before, *received, *after], group)


def gather(x: Tensor, shares: Sequence[int], dim: int, group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Returns the shares of the ranks from `first` on, concatenated along `dim`, on each of these ranks."""
    rows = x.movedim(dim, 0)
    out = all_to_all(rows.repeat(len(shares), *[1] * (rows.ndim - 1)), [len(rows)] * len(shares), shares, group, first)
    return out.movedim(0, dim)


def tokens_to_heads(x: Tensor, shares: Sequence[int], group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Exchanges this rank's tokens with all heads (B, n, H, K) for all tokens with this rank's heads (B, N, H / G, K).

    N is the number of tokens of G ranks of the group, from `first` on.
    """
    num_tokens, ranks = x.shape[1], len(shares)
    rows = x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4)  # (G, n, B, H / G, K): a rank's heads together
    rows = all_to_all(rows.flatten(0, 1), [num_tokens] * ranks, shares, group, first)
    return rows.transpose(0, 1)


def heads_to_tokens(x: Tensor, shares: Sequence[int], group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Reverses `tokens_to_heads`: exchanges (B, N, H / G, K) for this rank's tokens with all heads (B, n, H, K)."""
    ranks, num_tokens = len(shares), shares[dist.get_rank(group) - first]
    rows = all_to_all(x.transpose(0, 1), shares, [num_tokens] * ranks, group, first)
    return rows.unflatten(0, (ranks, num_tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)
