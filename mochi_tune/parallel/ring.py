"""Ring attention: each rank has some of the tokens, and keys and values are passed around a ring during attention.

Every rank attends its queries to one block of keys after the other and merges the results by their log-sum-exp. In the
backward pass the blocks are passed around once more, with the gradients of their keys and values, back to their owner.
Source: Ring Attention, arXiv 2310.01889; the backward pass of a block, FlashAttention, arXiv 2205.14135, algorithm 4.

Shape letters: B batch, H heads, N queries, M keys, K width of a head.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend

from mochi_tune.models.layers import at_least_fp32
from mochi_tune.parallel.kernels import KERNELS

_aten = torch.ops.aten
# The efficient kernel pads its log-sum-exp to a multiple of this many rows with infinity.
_LSE_ROWS = 32


def choose_kernel(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Returns the kernel that torch would choose for these tensors (B, H, N or M, K) in the current `sdpa_kernel`.

    It is one of KERNELS on CUDA, or "cpu", or "plain": attention by its definition, with all scores in memory.
    """
    choice = SDPBackend(_aten._fused_sdp_choice(q, k, v))
    if q.device.type == "cpu":
        return "cpu" if choice == SDPBackend.FLASH_ATTENTION else "plain"
    names = [name for name, kernel in KERNELS.items() if kernel == choice and q.device.type == "cuda"]
    return names[0] if names else "plain"


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Attends queries (B, H, N, K) to keys and values (B, H, M, K), with M > 0.

    Returns:
        The output (B, H, N, K), and the log-sum-exp (B, H, N) of the scaled scores in fp32, or in fp64 for fp64.
    """
    if not q.numel():
        return torch.zeros_like(q), at_least_fp32(q).sum(-1)
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    if kernel == "flash":
        return _aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    if kernel == "efficient":
        out, lse = _aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
        return out, lse[..., : q.shape[2]]
    if kernel == "cudnn":
        out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        return out, lse.squeeze(-1)
    scores = _scores(q, k)
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ at_least_fp32(v)).to(q.dtype), lse


def attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, result: tuple[Tensor, Tensor], kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v from one block of keys.

    Args:
        gradient: gradient of the output over all blocks, (B, H, N, K).
        q: queries, (B, H, N, K).
        k, v: keys and values of the block, (B, H, M, K).
        result: output and log-sum-exp over all blocks; with them, the scores of the block become probabilities.
        kernel: the kernel that `attend` ran.
    """
    if not (q.numel() and k.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    out, lse = result
    sizes = None, None, q.shape[2], k.shape[2]
    if kernel == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, lse, 0.0, False)
    if kernel == "flash":
        # The kernel requires the random state of dropout, although there is no dropout.
        seed, offset = (torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))
        return _aten._scaled_dot_product_flash_attention_backward(
            gradient, q, k, v, out, lse, *sizes, 0.0, False, seed, offset
        )
    seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
    if kernel == "efficient":
        lse = F.pad(lse, (0, -lse.shape[-1] % _LSE_ROWS), value=torch.inf).contiguous()
        return _aten._scaled_dot_product_efficient_attention_backward(
            gradient, q, k, v, None, out, lse, seed, offset, 0.0, [True, True, True, False]
        )[:3]
    if kernel == "cudnn":
        lse = lse.unsqueeze(-1).contiguous()
        return _aten._scaled_dot_product_cudnn_attention_backward(
            gradient, q, k, v, out, lse, seed, offset, None, *sizes, 0.0, False
        )
    probabilities = (_scores(q, k) - lse[..., None]).exp()
    gradient, out = at_least_fp32(gradient), at_least_fp32(out)
    scores = probabilities * (gradient @ at_least_fp32(v).mT - (gradient * out).sum(-1, keepdim=True))
    scores = scores * q.shape[-1] ** -0.5
    grad_q, grad_k = scores @ at_least_fp32(k), scores.mT @ at_least_fp32(q)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), (probabilities.mT @ gradient).to(v.dtype)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return at_least_fp32(q) @ at_least_fp32(k).mT * q.shape[-1] ** -0.5


class _Ring:
    """The position of this rank in a ring of ranks of a group, and the number of tokens that each of them owns."""

    def __init__(self, group_name: str, members: Sequence[int], counts: Sequence[int]) -> None:
        self.group = _resolve_process_group(group_name)  # pyright: ignore[reportArgumentType]
        self.counts = counts
        self.place = members.index(dist.get_rank(self.group))
        self.following, self.preceding = members[(self.place + 1) % len(members)], members[self.place - 1]

    def count(self, step: int) -> int:
        """Returns the number of tokens of the block that this rank holds at a step; at step 0, its own block."""
        return self.counts[(self.place - step) % len(self.counts)]

    def pass_on(self, *blocks: tuple[Tensor, int]) -> Callable[[], list[Tensor]]:
        """Starts sending blocks to the following rank and receiving as many from the preceding one.

        Args:
            blocks: pairs of a contiguous block to send (..., tokens, K) and the number of tokens of the one to receive.

        Returns:
            A function that waits for both transfers and returns the received blocks.
        """
        received = [sent.new_empty(*sent.shape[:-2], count, sent.shape[-1]) for sent, count in blocks]
        operations = []
        for tag, (sent, _) in enumerate(blocks):
            operations.append(dist.P2POp(dist.isend, sent, None, self.group, tag, self.following))
            operations.append(dist.P2POp(dist.irecv, received[tag], None, self.group, tag, self.preceding))
        # Empty blocks are not transferred; both ends know which are empty.
        operations = [operation for operation in operations if operation.tensor.numel()]
        works = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> list[Tensor]:
            for work in works:
                work.wait()
            return received

        return wait


# A custom operation, so that selective checkpointing can keep its result and nothing is sent again.
@torch.library.custom_op("mochi_tune::ring_attention", mutates_args=())
def _ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group_name: str, members: Sequence[int], counts: Sequence[int], kernel: str
) -> tuple[Tensor, Tensor]:
    ring, last = _Ring(group_name, members, counts), len(members) - 1
    block = torch.stack([k, v])
    travelling = block[..., : ring.count(0), :].contiguous()
    out = lse = None
    for step in range(last + 1):
        # The next block is received while this one is attended.
        wait = ring.pass_on((travelling, ring.count(step + 1))) if step < last else None
        if block.shape[-2]:
            part, part_lse = attend(q, block[0], block[1], kernel)
            if out is None or lse is None:
                out, lse = at_least_fp32(part), part_lse
            else:
                out.lerp_(part.to(out.dtype), (part_lse - lse).sigmoid()[..., None])
                lse = torch.logaddexp(lse, part_lse)
        if wait is not None:
            [travelling] = wait()
            block = travelling
    assert out is not None and lse is not None, "no rank of the ring has a token"
    return out.to(q.dtype), lse.contiguous()


def _keep(ctx, inputs, output) -> None:
    q, k, v, *ctx.ring, ctx.kernel = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _ring_attention_backward(ctx, gradient: Tensor, _of_lse: None):
    q, k, v, out, lse = ctx.saved_tensors
    ring, last = _Ring(*ctx.ring), len(ctx.ring[1]) - 1
    own = ring.count(0)
    block = torch.stack([k, v])
    travelling = block[..., :own, :].contiguous()
    grad_q = at_least_fp32(torch.zeros_like(q))
    grad_block = grad_travelling = at_least_fp32(torch.zeros_like(block))
    for step in range(last + 1):
        # During the computation, the next block is received, and the gradient of this one from the ranks before.
        passed = [(travelling, ring.count(step + 1))] if step < last else []
        passed += [(grad_travelling, ring.count(step))] if step else []
        wait = ring.pass_on(*passed)
        part_q, *part = attend_backward(gradient, q, block[0], block[1], (out, lse), ctx.kernel)
        grad_q += part_q
        received = wait()
        if step == 0:
            grad_block += torch.stack(part)
            grad_travelling = grad_block[..., :own, :].contiguous()
        else:
            grad_travelling = received[-1] + torch.stack(part)
        if step < last:
            block = travelling = received[0]
    [grad_block[..., :own, :]] = ring.pass_on((grad_travelling, own))()
    return grad_q.to(q.dtype), *grad_block.to(k.dtype), None, None, None, None


_ring_attention.register_autograd(_ring_attention_backward, setup_context=_keep)


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, group: dist.ProcessGroup, members: Sequence[int], counts: Sequence[int]
) -> Tensor:
    """Attends this rank's queries to the keys that all members of a ring pass on, and to its local keys.

    The backward pass is the adjoint of the forward passes of all members together. All members must call both.

    Args:
        q: this rank's queries, (B, H, N, K).
        k, v: this rank's keys and values, (B, H, counts[its position] + M, K). The last M are local: not passed on.
        group: the group of the members.
        members: their ranks in the group, in the order of the ring; at least two.
        counts: number of keys that each member passes on.

    Returns:
        The output (B, H, N, K), merged in fp32, or in fp64 for fp64.
    """
    return _ring_attention(q, k, v, group.group_name, list(members), list(counts), choose_kernel(q, k, v))[0]
