"""What the ranks of a run tell one another beside tensors; alone, a process agrees with itself."""

from typing import Any

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


def gathered(value: Any) -> list[Any]:
    """Returns what every rank has given, in the order of the ranks, at every rank."""
    if not dist.is_initialized():
        return [value]
    everyones: list[Any] = [None] * num_ranks()
    dist.all_gather_object(everyones, value)
    return everyones


def wait_for_all() -> None:
    """Waits until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()
