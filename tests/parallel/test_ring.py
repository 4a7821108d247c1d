"""Ring attention: its kernels, the order of transfers, uneven shares, and transfers when it is recomputed."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers_parallel import run_ranks
from helpers_step import build, step

from mochi_tune.parallel import ring
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.recompute import apply_activation_checkpointing

# Tokens of each rank; local keys, which are not passed on; dtype; tolerance.
CASES = (
    ([4, 3, 3], 2, torch.float64, 1e-13),
    ([1, 1, 0], 0, torch.float64, 1e-13),
    ([9, 8, 8], 3, torch.float32, 5e-6),
    ([9, 8, 8], 3, torch.bfloat16, 3e-2),
)


def randoms(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("kernel", ["cpu", "plain"])
def test_blocks_of_keys_joined_by_their_log_sum_exp_are_attention(kernel):
    q, k, v, gradient = randoms([(2, 3, n, 8) for n in (5, 7, 7, 5)], torch.float64, 0)
    expected = F.scaled_dot_product_attention(q, k, v)
    gradients = torch.autograd.grad(expected, (q, k, v), gradient)
    q, k, v = q.detach(), k.detach(), v.detach()
    blocks = list(zip(k.split(3, dim=2), v.split(3, dim=2), strict=True))
    parts, sums = zip(*(ring.attend(q, *block, kernel) for block in blocks), strict=True)
    lse = torch.stack(sums).logsumexp(0)
    out = sum(part * (of_part - lse).exp()[..., None] for part, of_part in zip(parts, sums, strict=True))
    assert torch.allclose(out, expected, rtol=0, atol=1e-13)
    found = [ring.attend_backward(gradient, q, *block, (out, lse), kernel) for block in blocks]
    of_q, of_k, of_v = zip(*found, strict=True)
    for ours, theirs in zip((sum(of_q), torch.cat(of_k, 2), torch.cat(of_v, 2)), gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def errors_of_a_ring() -> torch.Tensor:
    """Returns this rank's largest errors (case, 4): of the output and of the gradients of q, k, v."""
    here, errors = dist.get_rank(), []
    for counts, staying, dtype, _ in CASES:
        q, k, v = (randoms([(2, 3, n + staying, 16) for n in counts], dtype, seed) for seed in range(3))
        weights = randoms([t.shape for t in q], dtype, 3)
        # The reference computes all ranks in one process; its loss is the sum of their losses.
        outs = [
            F.scaled_dot_product_attention(
                *(t.double() for t in (q[i], *(torch.cat([*visual(x, counts), x[i][:, :, n:]], 2) for x in (k, v))))
            )
            for i, n in enumerate(counts)
        ]
        loss = sum((out * weight).sum() for out, weight in zip(outs, weights, strict=True))
        mine = [t[here] for t in (q, k, v)]
        expected = [outs[here], *torch.autograd.grad(loss, mine)]
        out = ring.ring_attention(*mine, dist.group.WORLD, range(len(counts)), counts)
        got = [out, *torch.autograd.grad((out * weights[here]).sum(), mine)]
        pairs = zip(got, expected, strict=True)
        errors.append([float((a - b).detach().abs().max()) if a.numel() else 0.0 for a, b in pairs])
    return torch.tensor(errors)


def visual(x: list[torch.Tensor], counts: list[int]) -> list[torch.Tensor]:
    return [t[:, :, :n] for t, n in zip(x, counts, strict=True)]


def calls_of_a_ring() -> list[str]:
    """Returns the order in which a forward and a backward pass start transfers, wait for them, and compute."""
    calls = []
    starts, forward, backward = dist.batch_isend_irecv, ring.attend, ring.attend_backward

    class Work:
        def __init__(self, work) -> None:
            self.work = work

        def wait(self) -> None:
            self.work.wait()
            calls.append("wait")

    def start(operations):
        calls.append(f"start {len(operations)}")
        return [Work(work) for work in starts(operations)]

    dist.batch_isend_irecv = start
    ring.attend = lambda *arguments: (calls.append("attend"), forward(*arguments))[1]
    ring.attend_backward = lambda *arguments: (calls.append("backward"), backward(*arguments))[1]
    try:
        q, k, v = randoms([(1, 2, 4, 8)] * 3, torch.float32, 0)
        ring.ring_attention(q, k, v, dist.group.WORLD, range(3), [4, 4, 4]).sum().backward()
    finally:
        dist.batch_isend_irecv, ring.attend, ring.attend_backward = starts, forward, backward
    return calls


class Count(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the rings that run, without those whose results selective checkpointing has kept."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.ops.mochi_tune.ring_attention.default
        return func(*args, **(kwargs or {}))


def recomputing() -> tuple[list[int], bool]:
    """Returns how many rings a step of 3 blocks runs under each policy, and whether all steps gave the same bits."""
    counted, results = [], []
    for policy in ("none", "attention", "block"):
        dit = build()
        apply_context_parallel(dit, dist.group.WORLD, heads=1)
        apply_activation_checkpointing(dit, [policy] * 3)
        with Count() as count:
            results.append([t for case in ({}, {"lengths": [5, 2]}) for t in step(dit, **case)])
        counted.append(count.calls)
    same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    return counted, same


def in_a_rank():
    return errors_of_a_ring(), calls_of_a_ring(), recomputing()


def test_three_ranks_in_a_ring(tmp_path):
    for errors, calls, (counted, same) in run_ranks(3, in_a_rank, tmp_path):
        for (*case, tolerance), of_case in zip(CASES, errors.tolist(), strict=True):
            assert max(of_case) <= tolerance, f"{case}: {of_case}"
        # No transfer follows the last block of the forward pass. Gradients need one more, back to their owner.
        copied, both = ["start 2", "attend", "wait", "wait"], ["start 4", "backward", *["wait"] * 4]
        expected = [*copied, *copied, "attend", "start 2", "backward", "wait", "wait", *both]
        assert calls == [*expected, "start 2", "backward", "wait", "wait", "start 2", "wait", "wait"]
        # A step with one prompt runs one ring per block; with two prompts of different lengths, two.
        assert counted == [9, 9, 18] and same
