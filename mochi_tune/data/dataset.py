"""The clips of a cache as training batches; `order` says which clips a batch holds.

Shape letters: B batch, C channels, T latent frames, h w latent rows and columns, L text tokens, D text width.
"""

from typing import Any

import torch

from mochi_tune.data.cache import Cache


class LatentDataset(torch.utils.data.Dataset):
    """Gives item i of a cache; items are sorted by sample_id, so their numbers depend on the clips alone."""

    def __init__(self, cache: Cache):
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns what `load` does, with the first caption."""
        return self.load(index, 0)

    def num_captions(self, index: int) -> int:
        """Returns how many captions a clip has, at least 1."""
        return len(self.cache.rows[index].captions)

    def load(self, index: int, caption: int) -> dict[str, Any]:
        """Returns mean and logvar fp32 (C, T, h, w), prompt_embeds fp32 (n, D) with n >= 0, and sample_id."""
        return self.cache.read(index, caption) | {"sample_id": self.cache.rows[index].sample_id}


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
