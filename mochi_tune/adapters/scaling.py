"""Factors on applied adapters that change while the model is in use, from one forward pass to the next."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.adapters.linears import StretchedLinear


class AdapterScaling:
    """Scales what adapters of `apply_adapter` add to the base.

    It writes to the adapters' own tensors: B, and for a DoRA the rows' stretch. So compiled code stays valid, as no
    module, shape or Python number changes, and nothing is computed more in a forward pass. A factor of 1 gives the
    original bits back.
    """

    def __init__(self, dit: nn.Module, names: Iterable[str]) -> None:
        """Keeps a copy of the tensors that it will write to, on their devices.

        Args:
            dit: with its adapters, in place on its devices.
            names: of the adapters that are to be scaled.
        """
        self.factors = dict.fromkeys(names, 1.0)
        # Each B with its original, by the adapter.
        self.halves: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.factors}
        # Each stretch with what every adapter adds to it, the unscaled ones too.
        self.stretches: list[tuple[Tensor, dict[str, Tensor]]] = []
        for module in dit.modules():
            if isinstance(module, StretchedLinear):
                stretch = module.lora_stretch.data
                self.stretches.append((stretch, {n: change.to(stretch.device) for n, change in module.changes.items()}))
            # Any: peft keeps the parts of its layers in dictionaries of modules of any kind.
            parts: Any = getattr(module, "lora_B", {})
            for name in self.halves.keys() & parts.keys():
                b = parts[name].weight.data
                self.halves[name].append((b, b.clone()))

    @torch.no_grad()
    def set(self, factors: Mapping[str, float]) -> None:
        """Scales each named adapter by a factor on its strength: 1 is as applied, 0 leaves the base, exactly.

        Those that are not named keep the factor that they have.
        """
        factors = {**self.factors, **factors}
        for name, factor in factors.items():
            if factor != self.factors[name]:
                for b, original in self.halves[name]:
                    torch.mul(original, factor, out=b)
        if factors != self.factors:
            for stretch, changes in self.stretches:
                stretch.fill_(1)
                for name, change in changes.items():
                    stretch += factors.get(name, 1.0) * change
        self.factors = factors
