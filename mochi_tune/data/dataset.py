"""The clips of a cache as training batches, in an order that needs no saved state.

Shape letters: B batch, C channels, T latent frames, h w latent rows and columns, L text tokens, D text width.
"""

import hashlib
from functools import lru_cache
from typing import Any

import torch

from mochi_tune.data.cache import Cache


class LatentDataset(torch.utils.data.Dataset):
    """Gives item i of a cache; items are sorted by path, so their numbers depend on the clips alone."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns mean and logvar fp32 (C, T, h, w), prompt_embeds fp32 (n, D) with n >= 0, and sample_id."""
        return self.cache.read(index) | {"sample_id": self.cache.rows[index].path}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks items of one size into a batch, padding the prompts with zeros.

    Args:
        items: What `LatentDataset` gives; B >= 1 of one latent shape.

    Returns:
        mean and logvar fp32 (B, C, T, h, w); prompt_embeds fp32 (B, L, D) and prompt_mask bool (B, L), true where a
        token is valid, L the longest prompt's length and at least 1; sample_ids, B strings.
    """
    lengths = [len(item["prompt_embeds"]) for item in items]
    # One padding token is kept when all prompts are empty: attention kernels do not all take a length of 0.
    longest = max(1, *lengths)
    prompt_embeds = torch.zeros(len(items), longest, items[0]["prompt_embeds"].shape[1])
    prompt_mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    for row, item in enumerate(items):
        prompt_embeds[row, : lengths[row]] = item["prompt_embeds"]
    return {
        "mean": torch.stack([item["mean"] for item in items]),
        "logvar": torch.stack([item["logvar"] for item in items]),
        "prompt_embeds": prompt_embeds,
        "prompt_mask": prompt_mask,
        "sample_ids": [item["sample_id"] for item in items],
    }


@lru_cache(maxsize=4)
def epoch_order(num_clips: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Returns the shuffled clip numbers of one epoch, a function of its arguments alone."""
    digest = hashlib.sha256(f"order/{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return tuple(torch.randperm(num_clips, generator=generator).tolist())


def batch_indices(batch: int, *, num_clips: int, batch_size: int, seed: int) -> list[int]:
    """Returns the clips of one batch, so that resuming is nothing but asking for a later batch.

    Epochs follow each other without a gap: a batch may straddle two, and every clip comes exactly once an epoch.

    Args:
        batch: Number of the batch since the start of training, from 0. With accumulation each micro-batch counts.
        num_clips: Clips in the dataset, at least 1.
        batch_size: Clips of the batch, over all processes together.
        seed: Of the run.
    """
    first = batch * batch_size
    positions = (divmod(position, num_clips) for position in range(first, first + batch_size))
    return [epoch_order(num_clips, seed, epoch)[i] for epoch, i in positions]
