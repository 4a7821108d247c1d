"""An exponential moving average (EMA) of an adapter's parameters."""

from collections.abc import Mapping

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class EMA:
    """The moving average of the parameters of an adapter, in fp32 on their device."""

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().float().clone() for name, tensor in parameters.items()}

    def update(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """Updates the average with the parameters after a step, which counts from 1.

        The decay is at most (1 + step) / (10 + step), so that the untrained adapter soon loses its weight in the
        average.
        Source: tensorflow/tensorflow@v2.16.1 tensorflow/python/training/moving_averages.py (ExponentialMovingAverage).
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, current = list(self.tensors.values()), [parameters[name].detach() for name in self.tensors]
        get_ema_multi_avg_fn(decay)(averages, current, step)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores a saved average."""
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
