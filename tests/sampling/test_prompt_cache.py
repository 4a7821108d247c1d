"""Cached features equal the original ones, and are aligned like them, so that CPU kernels round them equally."""

import torch

from mochi_tune.sampling.prompt_cache import PromptCache


def test_cached_features_are_aligned_in_memory(tmp_path):
    """The header before the features in the file contains the prompt, so its length varies."""
    cache, fresh = PromptCache(tmp_path, "a T5", torch.float32), torch.randn(5, 37)
    for length in range(1, 70, 3):
        cache.put("a" * length, fresh)
        found = cache.get("a" * length)
        assert found is not None and torch.equal(found, fresh)
        assert found.is_contiguous() and found.data_ptr() % 64 == 0
