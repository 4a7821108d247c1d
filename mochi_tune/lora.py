"""LoRA layers in a live AsymmDiT: choose, add, load, read back. PEFT does the arithmetic.

Layers go by their official names, "blocks.0.attn.qkv_x". Adapter weights are fp32 whatever the base's dtype is:
in bf16 the updates of a fine-tune round to nothing.
"""

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mochi_tune.errors import ConfigError


def linear_shapes(dit: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (out, in) shape of every Linear of the blocks that may be adapted; works on the meta device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(r"blocks\.\d+\.(attn|mlp_[xy])\.\w+", name)
    }


def select_layers(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Returns the layers whose whole name matches any of the regular expressions.

    Raises:
        ConfigError: a pattern is no regular expression, or matches no layer.
    """
    names = list(names)
    chosen = set()
    for pattern in patterns:
        try:
            matched = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise ConfigError(f"lora.targets: {pattern!r} is not a regular expression ({error}).") from None
        if not matched:
            kinds = sorted({re.sub(r"blocks\.\d+\.", "", name) for name in names})
            near = difflib.get_close_matches(pattern, [f"blocks.0.{kind}" for kind in kinds], n=1, cutoff=0.3)
            hint = f", for example {near[0]!r}" if near else ""
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no layer; layers are blocks.N.{{{', '.join(kinds)}}}{hint}."
            )
        chosen.update(matched)
    if not chosen:
        raise ConfigError("lora.targets is empty: use lora=attention or lora=attention_mlp, or give patterns.")
    return [name for name in names if name in chosen]


def apply_lora(dit: nn.Module, layers: Sequence[str], rank: int, alpha: float, dropout: float, seed: int) -> None:
    """Freezes the model and adds a trainable adapter: A random from `seed`, B zero, so that nothing changes yet."""
    dit.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(dit, "default", dict.fromkeys(layers, (rank, alpha)), dropout)


def apply_adapter(dit: nn.Module, layers: Mapping[str, tuple[Tensor, Tensor, float]], name: str) -> None:
    """Freezes the model and adds an adapter's layers beside those already there; the base weights stay as they are.

    Args:
        dit: the model.
        layers: for each layer A (r, in), B (out, r) and the scale of their product, any strength included.
        name: tells several adapters apart.
    """
    dit.requires_grad_(False)
    _inject(dit, name, {layer: (a.shape[0], scale * a.shape[0]) for layer, (a, _, scale) in layers.items()}, 0.0)
    for layer, (a, b, _) in layers.items():
        module = dit.get_submodule(layer)
        module.lora_A[name].weight.data.copy_(a)
        module.lora_B[name].weight.data.copy_(b)
    for module in dit.modules():
        if hasattr(module, "lora_A"):
            # Injecting one adapter makes it the only active one, in layers of other adapters too.
            module.set_adapter(list(module.lora_A))
    dit.requires_grad_(False)


def switch_adapters(dit: nn.Module, on: bool) -> None:
    """Lets the adapters play their part, or leaves the base alone, exactly."""
    for module in dit.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(on)


def lora_parameters(dit: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable adapter's parameters by name: "blocks.0.attn.qkv_x.lora_A" and so on."""
    return {
        name.removesuffix(".default.weight"): parameter
        for name, parameter in dit.named_parameters()
        if name.endswith((".lora_A.default.weight", ".lora_B.default.weight"))
    }


def _inject(dit: nn.Module, name: str, layers: Mapping[str, tuple[int, float]], dropout: float) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(layer)}": rank for layer, (rank, _) in layers.items()},
        alpha_pattern={f"^{re.escape(layer)}": alpha for layer, (_, alpha) in layers.items()},
        lora_dropout=dropout,
    )
    with warnings.catch_warnings():
        # A second adapter on one model is what several LoRAs at once are; peft warns of it.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # Adapters on 8-bit weights cannot be merged; ours stay beside them.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        inject_adapter_in_model(config, dit, adapter_name=name)
    for layer in layers:
        module = dit.get_submodule(layer)
        for half in (module.lora_A[name], module.lora_B[name]):
            half.to(dtype=torch.float32, device=module.base_layer.weight.device)
