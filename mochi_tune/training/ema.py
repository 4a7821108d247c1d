"""The moving average of an adapter, which is smoother than the adapter itself."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Average:
    """An exponential moving average of an adapter's parameters, fp32, on their device."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in parameters.items()}

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Takes in the parameters after a step, counted from 1.

        Early steps weigh more, or the average would long be that of the untrained adapter: the decay is at most
        (1 + step) / (10 + step).
        Source: tensorflow/tensorflow@v2.16.1 tensorflow/python/training/moving_averages.py (ExponentialMovingAverage).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        ours = list(self.tensors.values())
        torch._foreach_lerp_(ours, [parameters[name].detach() for name in self.tensors], 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts a saved average back."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
