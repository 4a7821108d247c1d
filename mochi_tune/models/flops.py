"""How much arithmetic a forward pass is."""

from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.layers import hidden_width


def dit_flops(config: DiTConfig, num_tokens: int, num_text_tokens: int) -> tuple[float, float]:
    """Returns the FLOPs of an AsymmDiT's blocks: of matrix products, and of attention.

    Not counted is what does not grow with both the tokens and the depth: the embedders, the last layer, modulation.

    Args:
        config: of the model.
        num_tokens: visual tokens.
        num_text_tokens: valid ones.
    """
    wide, narrow = config.hidden_size_x, config.hidden_size_y
    hidden_x, hidden_y = hidden_width(wide, config.mlp_ratio_x), hidden_width(narrow, config.mlp_ratio_y)
    visual = 3 * wide * wide + wide * wide + 3 * wide * hidden_x
    text = 3 * narrow * wide
    updated = narrow * wide + 3 * narrow * hidden_y
    # The last block leaves the text stream as it is.
    weights = config.depth * (num_tokens * visual + num_text_tokens * text)
    weights += (config.depth - 1) * num_text_tokens * updated
    keys = num_tokens + num_text_tokens
    scores = (config.depth - 1) * keys * keys + num_tokens * keys
    return 2.0 * weights, 4.0 * scores * wide
