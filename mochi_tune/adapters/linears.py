"""Linears that stand in for others where an adapter is: one that casts its weight, one that scales its rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastLinear(nn.Linear):
    """A Linear that multiplies in the dtype of its input; its weight and its gradient stay fp32, as under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., in) to (..., out)."""
        return F.linear(x, self.weight.to(x.dtype))


class StretchedLinear(nn.Module):
    """A base's Linear whose rows are scaled while a DoRA is on.

    Other code depends on its names: peft looks for `base_layer`; what moves or shards a base leaves `.lora_` in place.
    A hook instead would be missed by compiled code, which does not check for hooks.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        self.lora_stretch = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device), False)
        self.is_on = True
        # What each adapter adds to `lora_stretch`, by its name.
        self.changes: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Returns the Linear's output, everything but the bias scaled by row, in the output's dtype."""
        output = self.base_layer(x)
        if not self.is_on:
            return output
        stretched = output * self.lora_stretch
        if self.base_layer.bias is not None:
            # The base's weights, its bias among them, may be in host memory.
            stretched = stretched + (1 - self.lora_stretch) * self.base_layer.bias.to(output.device)
        return stretched.to(output.dtype)
