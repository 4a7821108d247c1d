"""What the ranks of a run tell one another beside tensors; alone, a process agrees with itself."""

from typing import Any

import torch
import torch.distributed as dist


def num_ranks() -> int:
    """Returns the number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the rank that writes and tells."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: Any) -> Any:
    """Returns the first rank's value at every rank."""
    if not dist.is_initialized():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def mean_and_most(value: float, flag: int) -> tuple[float, int]:
    """Returns the mean of all ranks' values, and the largest of their flags, in one exchange."""
    if not dist.is_initialized():
        return value, flag
    mine = torch.tensor([value, flag], dtype=torch.float64)
    everyones = torch.empty(num_ranks(), 2, dtype=torch.float64)
    dist.all_gather_into_tensor(everyones, mine)
    return everyones[:, 0].mean().item(), int(everyones[:, 1].max().item())


def wait_for_all() -> None:
    """Waits until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
