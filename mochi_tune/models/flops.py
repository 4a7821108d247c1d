"""FLOPs of a forward pass of the DiT."""

from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.layers import hidden_width


def dit_flops(config: DiTConfig, num_tokens: int, num_text_tokens: int) -> tuple[float, float]:
    """Returns the FLOPs of the matrix products and those of attention in the blocks of an AsymmDiT.

    The embedders, the last layer and modulation are not counted: they do not grow with both tokens and depth.

    Args:
        config: sizes of the model.
        num_tokens: number of visual tokens.
        num_text_tokens: number of valid text tokens.
    """
    wide, narrow = config.hidden_size_x, config.hidden_size_y
    hidden_x, hidden_y = hidden_width(wide, config.mlp_ratio_x), hidden_width(narrow, config.mlp_ratio_y)
    visual = 3 * wide * wide + wide * wide + 3 * wide * hidden_x
    text = 3 * narrow * wide
    updated = narrow * wide + 3 * narrow * hidden_y
    # The last block does not update the text stream.
    weights = config.depth * (num_tokens * visual + num_text_tokens * text)
    weights += (config.depth - 1) * num_text_tokens * updated
    keys = num_tokens + num_text_tokens
    scores = (config.depth - 1) * keys * keys + num_tokens * keys
    return 2.0 * weights, 4.0 * scores * wide
