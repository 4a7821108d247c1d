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


def test_features_of_another_text_encoder_or_dtype_are_not_used(tmp_path):
    PromptCache(tmp_path, "a T5", torch.float32).put("a cat", torch.ones(2, 3))
    assert PromptCache(tmp_path, "a T5", torch.float32).get("a cat") is not None
    assert PromptCache(tmp_path, "a T5", torch.bfloat16).get("a cat") is None
    assert PromptCache(tmp_path, "another T5", torch.float32).get("a cat") is None
