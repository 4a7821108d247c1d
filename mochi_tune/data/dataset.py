"""Loads clips of a cache and collates them into batches; `order` chooses the clips of a batch.

Shape letters: B batch, C channels, T latent frames, h w latent rows and columns, L text tokens, D text width.
"""

from typing import Any

import torch

from mochi_tune.data.cache import Cache


class LatentDataset(torch.utils.data.Dataset):
    """The clips of a cache, sorted by sample_id, so that an index depends on the clips only."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns `load` of the clip with its first caption."""
        return self.load(index, 0)

    def num_captions(self, index: int) -> int:
        """Returns the number of captions of a clip, at least 1."""
        return len(self.cache.rows[index].captions)

    def load(self, index: int, caption: int) -> dict[str, Any]:
        """Returns mean and logvar fp32 (C, T, h, w), prompt_embeds fp32 (n, D) with n >= 0, and sample_id."""
        return self.cache.read(index, caption) | {"sample_id": self.cache.rows[index].sample_id}


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks items of one size into a batch, and pads the prompts with zeros.

    Args:
        items: B >= 1 items of `LatentDataset`, of one latent shape.

    Returns:
        mean and logvar fp32 (B, C, T, h, w); prompt_embeds fp32 (B, L, D) and prompt_mask bool (B, L), true where a
        token is valid, L the longest prompt's length and at least 1; sample_ids, B strings.
    """
    lengths = [len(item["prompt_embeds"]) for item in items]
    # Keep one padding token when all prompts are empty: some attention kernels refuse a length of 0.
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
