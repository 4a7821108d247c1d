"""Reading the weights of 8-bit layers."""

import torch

from mochi_tune.models.eight_bit import EightBitLinear


def dequantized(linear: EightBitLinear) -> torch.Tensor:
    """Returns the weight that the layer multiplies with, fp32 (out, in)."""
    return linear.weight.view(linear.dtype_of_weight).float() * linear.weight_scale[:, None]
