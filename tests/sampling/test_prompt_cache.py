"""Features that come from the cache are those that were put there, where a CPU's kernels round them alike."""

import torch

from mochi_tune.sampling.prompt_cache import PromptCache


def test_features_begin_where_those_of_a_fresh_prompt_do(tmp_path):
    """The header before them in the file, which holds the prompt, is of another length each time."""
    cache, fresh = PromptCache(tmp_path, "a T5", torch.float32), torch.randn(5, 37)
    for length in range(1, 70, 3):
        cache.put("a" * length, fresh)
        found = cache.get("a" * length)
        assert found is not None and torch.equal(found, fresh)
        assert found.is_contiguous() and found.data_ptr() % 64 == 0
