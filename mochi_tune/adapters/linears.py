"""Linears that replace others where an adapter is: one casts its weight, one scales its rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A Linear that multiplies in the dtype of its input; weight and gradient stay fp32, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class StretchedLinear(nn.Module):
    """A Linear of the base whose rows are scaled while a DoRA is enabled.

    Other code depends on the names of its attributes: peft looks for `base_layer`, and offloading and sharding skip
    names with `.lora_`. It is not a hook, because compiled code does not check for hooks.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_stretch = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device), False)
        self.is_on = True
        # The term that each adapter adds to `lora_stretch`, by adapter name.
        self.changes: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out), with each output except the bias scaled by its row."""
        output = self.base_layer(x)
        if not self.is_on:
            return output
        stretched = output * self.lora_stretch
        if self.base_layer.bias is not None:
            # Offloading may keep the bias in host memory.
            stretched = stretched + (1 - self.lora_stretch) * self.base_layer.bias.to(output.device)
        return stretched.to(output.dtype)
