"""Changes the strengths of applied adapters between forward passes, and removes adapters."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.adapters.linears import StretchedLinear
from mochi_tune.errors import ConfigError


class AdapterScaling:
    """Scales the changes of adapters that `apply_adapter` added.

    It writes to the tensors of the adapters: B, and for a DoRA the scale of the rows. No module, shape or Python number
    changes, so compiled code stays valid, and a forward pass computes nothing more. A factor of 1 restores the original
    bits.
    """

    def __init__(self, dit: nn.Module, names: Iterable[str]) -> None:
        """Copies the tensors that it will write to, on their devices.

        Args:
            dit: model with its adapters, on its devices.
            names: names of the adapters to scale.
        """
        self.factors = dict.fromkeys(names, 1.0)
        # Each B with a copy of its original, by adapter name.
        self.halves: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.factors}
        # Each `lora_stretch` with the terms of all adapters, including those that are not scaled.
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
        """Sets the factors of adapters, by name: 1 is as applied, 0 gives exactly the base.

        Adapters that are not named keep their factor.
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


def remove_adapter(dit: nn.Module, name: str) -> None:
    """Removes an adapter that `apply_adapter` added. Without any adapter, the model has the base's modules again.

    The other adapters must have the strengths with which they were applied: set all factors of an `AdapterScaling` to
    1 before, and make a new one afterwards.

    Raises:
        ConfigError: the model has no adapter of this name.
    """
    # Any: peft keeps the parts of its layers in dictionaries of modules of any kind.
    adapted: dict[str, Any] = {path: module for path, module in dit.named_modules() if hasattr(module, "lora_A")}
    if not any(name in module.lora_A for module in adapted.values()):
        names = sorted({each for module in adapted.values() for each in module.lora_A})
        raise ConfigError(f"the model has no adapter {name!r}; it has {', '.join(names) or 'none'}.")
    for path, module in adapted.items():
        if name in module.lora_A:
            module.delete_adapter(name)
        stretched = module.base_layer
        if isinstance(stretched, StretchedLinear) and stretched.changes.pop(name, None) is not None:
            # Summed anew, so that no rounding error stays.
            stretched.lora_stretch.data.fill_(1)
            for change in stretched.changes.values():
                stretched.lora_stretch.data += change.to(stretched.lora_stretch.device)
            if not stretched.changes:
                module.base_layer = stretched.base_layer
        if not module.lora_A:
            dit.set_submodule(path, module.base_layer)
    getattr(dit, "peft_config", {}).pop(name, None)
