"""Exchanges between the ranks of a group. Their backward pass is the exact adjoint of their forward pass.

The ranks together are one function, whose output is the sum of theirs: a gradient that a rank computes is its share and
the sum over the ranks is the gradient. All of them use one collective, the all-to-all; its adjoint is the
all-to-all back. Shares may be uneven.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def even_shares(count: int, parts: int) -> list[int]:
    """Splits `count` items as evenly as possible; the first shares are the larger ones."""
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
    """Sends rows of x to each rank and returns those that each rank sent here, in the order of the ranks.

    Args:
        x: (sum of `sent`, ...), the rows for the first rank first.
        sent: the number of rows for each rank.
        received: the number of rows from each rank.
        group: all of its ranks call this together.
        first: of the consecutive ranks that `sent` and `received` are about; the others' rows go elsewhere.
    """
    if len(sent) == 1:
        return x
    before, after = [0] * first, [0] * (dist.get_world_size(group) - first - len(sent))
    return _AllToAll.apply(x, [*before, *sent, *after], [*before, *received, *after], group)


def gather(x: Tensor, shares: Sequence[int], dim: int, group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Returns the shares of all ranks, from the first one, joined along `dim`, at every one of them."""
    rows = x.movedim(dim, 0)
    out = all_to_all(rows.repeat(len(shares), *[1] * (rows.ndim - 1)), [len(rows)] * len(shares), shares, group, first)
    return out.movedim(0, dim)


def tokens_to_heads(x: Tensor, shares: Sequence[int], group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Turns this rank's tokens of all heads (B, n, H, K) into all tokens of this rank's heads (B, N, H / G, K).

    N are those of G ranks of the group, from the first one.
    """
    num_tokens, ranks = x.shape[1], len(shares)
    rows = x.unflatten(2, (ranks, -1)).permute(2, 1, 0, 3, 4)  # (G, n, B, H / G, K): a rank's heads together
    rows = all_to_all(rows.flatten(0, 1), [num_tokens] * ranks, shares, group, first)
    return rows.transpose(0, 1)


def heads_to_tokens(x: Tensor, shares: Sequence[int], group: dist.ProcessGroup, first: int = 0) -> Tensor:
    """Turns all tokens of this rank's heads (B, N, H / G, K) back into this rank's tokens of all heads (B, n, H, K)."""
    ranks, num_tokens = len(shares), shares[dist.get_rank(group) - first]
    rows = all_to_all(x.transpose(0, 1), shares, [num_tokens] * ranks, group, first)
    return rows.unflatten(0, (ranks, num_tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3)
