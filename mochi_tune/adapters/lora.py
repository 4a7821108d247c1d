"""LoRA layers in a live AsymmDiT: choose, size, add, load, read back. PEFT does the arithmetic.

Layers go by their official names, "blocks.0.attn.qkv_x". Adapter weights are fp32 whatever the base's dtype is,
as in bf16 the updates of a fine-tune round to nothing; they multiply in the base's dtype.
"""

import difflib
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mochi_tune.adapters.layers import LoraLayer, check_layer, is_attention_or_mlp, kind_of
from mochi_tune.adapters.linears import CastLinear, StretchedLinear
from mochi_tune.errors import CheckpointError, ConfigError, some

Number = TypeVar("Number", int, float)
TRAINED = "default"  # The name of the adapter that is trained.
# A parameter of the trainable adapter, as peft names it; ours ends at the group.
_PARAMETER = re.compile(r"(.+\.lora_(?:A|B|magnitude))(?:_vector)?\.default\.weight")


@dataclass(frozen=True)
class LayerSettings:
    """How one layer is adapted.

    Attributes:
        rank: number of components.
        alpha: strength; the adapter is scaled by alpha / rank, by alpha / sqrt(rank) if rslora.
        dropout: share of the adapter's inputs dropped while training.
        rslora: whether the scale falls with the root of the rank only.

    Source: rsLoRA, arXiv 2312.03732.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scale by alpha / rank, which is what every runtime knows."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha


def linear_shapes(dit: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (out, in) shape of every Linear that training may adapt; works on the meta device."""
    return {name: shape for name, shape in all_linear_shapes(dit).items() if is_attention_or_mlp(name)}


def all_linear_shapes(dit: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (out, in) shape of every Linear, which adapters of other trainers may change; on any device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear)
    }


def select_layers(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Returns the layers whose whole name matches any of the regular expressions.

    Raises:
        ConfigError: a pattern is no regular expression, or matches no layer.
    """
    names = list(names)
    chosen = {name for pattern in patterns for name in _matching("lora.targets", names, pattern)}
    if not chosen:
        raise ConfigError("lora.targets is empty: use lora=attention or lora=attention_mlp, or give patterns.")
    return [name for name in names if name in chosen]


def layer_settings(
    layers: Sequence[str],
    common: LayerSettings,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout_pattern: Mapping[str, float] | None = None,
) -> dict[str, LayerSettings]:
    """Returns the settings of each chosen layer: a pattern's value where one matches its name, else the common one.

    Args:
        layers: from `select_layers`.
        common: of all layers that no pattern names.
        rank_pattern: regular expression -> rank; `alpha_pattern` and `dropout_pattern` likewise.

    Raises:
        ConfigError: a pattern is no regular expression or matches no chosen layer, or two differ about a layer.
    """
    ranks = _by_pattern("lora.rank_pattern", layers, rank_pattern or {})
    alphas = _by_pattern("lora.alpha_pattern", layers, alpha_pattern or {})
    dropouts = _by_pattern("lora.dropout_pattern", layers, dropout_pattern or {})
    return {
        layer: replace(
            common,
            rank=ranks.get(layer, common.rank),
            alpha=alphas.get(layer, common.alpha),
            dropout=dropouts.get(layer, common.dropout),
        )
        for layer in layers
    }


def settings_metadata(settings: Mapping[str, LayerSettings]) -> dict[str, str]:
    """Returns an adapter file's metadata of its layers' settings: ranks and alphas as they were given, and rsLoRA."""
    metadata = {
        "rank": ",".join(str(rank) for rank in sorted({each.rank for each in settings.values()})),
        "alpha": ",".join(f"{alpha:g}" for alpha in sorted({each.alpha for each in settings.values()})),
    }
    return metadata | ({"rslora": "true"} if any(each.rslora for each in settings.values()) else {})


def apply_lora(dit: nn.Module, settings: Mapping[str, LayerSettings], seed: int, dora: bool = False) -> None:
    """Freezes the model and adds a trainable adapter: A random from `seed`, B zero, so that nothing changes yet.

    Args:
        dit: the model, on its device; adapters that it has already stay as they are, and are not trained.
        settings: of each layer that is adapted.
        seed: of the A's.
        dora: whether the length of each row of an adapted weight is trained too, starting at its length now.

    Raises:
        ConfigError: the model has a trainable adapter already.
    """
    if any(TRAINED in module.lora_A for module in _peft_layers(dit)):
        raise ConfigError("the model has a trainable adapter already: load the model anew for another one.")
    dit.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(dit, TRAINED, {layer: (each.rank, each.plain_alpha) for layer, each in settings.items()}, dora)
    for layer, each in settings.items():
        module = _peft_layer(dit, layer)
        if each.dropout:
            # peft knows one dropout for all layers.
            module.lora_dropout[TRAINED] = nn.Dropout(each.dropout).train(dit.training)
        if dora:
            _measure_magnitude(module)
    _activate_all(dit)
    for parameter in lora_parameters(dit).values():
        parameter.requires_grad_(True)


def check_start(layers: Mapping[str, LoraLayer], settings: Mapping[str, LayerSettings], dora: bool, file: str) -> None:
    """Refuses an adapter that a training with these settings cannot start from, by its sizes alone.

    Args:
        layers: of the adapter, which belongs to the base.
        settings: of each layer that is trained.
        dora: whether magnitudes are trained.
        file: the adapter's name for the text.

    Raises:
        ConfigError: the layers are not the same, a rank is too small for the file's, or a DoRA goes on as a plain LoRA.
    """
    if other := [name for name in layers if not is_attention_or_mlp(name)]:
        raise ConfigError(
            f"lora.init_from: {file} has {some(other)}, and training adapts attention and MLP layers only: start "
            "from a file of such layers."
        )
    if alien := [name for name in layers if name not in settings]:
        raise ConfigError(f"lora.init_from: {file} has {some(alien)}, which lora.targets leave out: add them there.")
    if missing := [name for name in settings if name not in layers]:
        raise ConfigError(
            f"lora.init_from: {file} has no {some(missing)}, which lora.targets choose: choose only what the file has."
        )
    if large := [name for name, layer in layers.items() if layer.rank > settings[name].rank]:
        name, rank = large[0], max(layer.rank for layer in layers.values())
        raise ConfigError(
            f"lora.init_from: {file} has rank {layers[name].rank} in {name}, which would be trained at rank "
            f"{settings[name].rank}: use lora.rank={rank} or more, or a lora.rank_pattern for such layers."
        )
    if any(layer.magnitude is not None for layer in layers.values()) and not dora:
        raise ConfigError(f"lora.init_from: {file} is a DoRA: use lora.dora=true.")


@torch.no_grad()
def load_start_adapter(dit: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Copies an adapter into the trainable one, so that the model computes what it computes with that adapter.

    Where the trainable rank is larger, the other components stay as they are: A random, B zero. A scale that differs
    goes into B. As a DoRA, a plain LoRA starts with the lengths that its rows have.

    Args:
        dit: with the adapter of `apply_lora`, untrained.
        layers: that `check_start` lets pass.
    """
    for name, layer in layers.items():
        module = _peft_layer(dit, name)
        module.lora_A[TRAINED].weight[: layer.rank] = layer.a
        b = layer.b.double() * (layer.scale / module.scaling[TRAINED])
        module.lora_B[TRAINED].weight[:, : layer.rank] = b.to(layer.b.dtype)
        if layer.magnitude is not None:
            module.lora_magnitude_vector[TRAINED].weight.copy_(layer.magnitude)
        elif module.lora_magnitude_vector:
            _measure_magnitude(module)


def apply_adapter(dit: nn.Module, layers: Mapping[str, LoraLayer], name: str, strength: float = 1.0) -> None:
    """Freezes the model and adds an adapter's layers beside those already there; the base weights stay as they are.

    Each adapter adds strength * (W' - W) to a weight W, where W' is what it was trained to be.

    Args:
        dit: the model; its weights are not sharded.
        layers: of the adapter.
        name: of the adapter, unique in the model.
        strength: 1 is as trained.

    Raises:
        ConfigError: torch cannot take the name, or a layer has an adapter of this name.
        CheckpointError: a layer is not in the model, has other sizes there or is damaged; the model is as it was.
    """
    _check_fit(dit, layers, name)
    dit.requires_grad_(False)
    _inject(dit, name, {layer: (each.rank, strength * each.alpha) for layer, each in layers.items()}, dora=False)
    _fill(dit, layers, name, strength)
    _activate_all(dit)


def _check_fit(dit: nn.Module, layers: Mapping[str, LoraLayer], name: str) -> None:
    """Refuses what `apply_adapter` cannot add; layers that other adapters change already are as wide as before."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"an adapter cannot have the name {name!r}: use another word without dots, such as style.")
    shapes = {
        layer: (module.out_features, module.in_features)
        for layer, module in dit.named_modules()
        if layer in layers and hasattr(module, "in_features")
    }
    if unknown := [layer for layer in layers if layer not in shapes]:
        raise CheckpointError(
            f"the model has no Linear {some(unknown)}: use an adapter that was trained on it; mod_x and mod_y take one "
            "only before their weights leave for host memory."
        )
    if taken := [layer for layer in layers if name in getattr(dit.get_submodule(layer), "lora_A", ())]:
        raise ConfigError(f"the model has an adapter {name!r} in {some(taken)} already: use another name.")
    for layer, each in layers.items():
        check_layer(layer, each)
        if each.shape != shapes[layer]:
            raise CheckpointError(
                f"{layer} is {each.shape} in the adapter and {shapes[layer]} in the model: use an adapter that was "
                "trained on it."
            )


def change_adapters(dit: nn.Module, adapters: Mapping[str, tuple[Mapping[str, LoraLayer], float]]) -> None:
    """Puts other numbers or strengths into the adapters of a model, which then computes what it would with them alone.

    Args:
        dit: with an adapter of each of these names, and no other one, from `apply_adapter`.
        adapters: layers and strength by name; the same layers, of the same ranks, as those that are there.
    """
    for module in dit.modules():
        if isinstance(module, StretchedLinear):
            module.lora_stretch.data.fill_(1)
    for name, (layers, strength) in adapters.items():
        _fill(dit, layers, name, strength)


@torch.no_grad()  # What a DoRA's change is worked out from, an fp32 weight, would be kept with the change.
def _fill(dit: nn.Module, layers: Mapping[str, LoraLayer], name: str, strength: float) -> None:
    """Copies an adapter's layers into those that were injected by its name."""
    for layer, each in layers.items():
        module = _peft_layer(dit, layer)
        module.scaling[name] = strength * each.alpha / each.rank
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        a.data.copy_(each.a)
        b.data.copy_(each.b)
        if each.magnitude is not None:
            # W' = factor * (W + scale * B A): a row of B is as fixed now as the rest, and takes its factor.
            changed = _base_weight(module).to(b.device) + each.scale * b @ a
            factor = each.magnitude.to(b.device) / changed.norm(dim=1)
            b.data *= factor[:, None]
            if not isinstance(module.base_layer, StretchedLinear):
                module.base_layer = StretchedLinear(module.base_layer)
            module.base_layer.changes[name] = change = strength * (factor - 1)
            module.base_layer.lora_stretch.data += change


def switch_adapters(dit: nn.Module, on: bool) -> None:
    """Switches all adapters on or off; without them the model computes exactly what the base does."""
    for module in _peft_layers(dit):
        module.enable_adapters(on)
    for module in dit.modules():
        if isinstance(module, StretchedLinear):
            module.is_on = on


def lora_parameters(dit: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable adapter's parameters by name, "blocks.0.attn.qkv_x.lora_A", .lora_B and .lora_magnitude."""
    matches = ((_PARAMETER.fullmatch(name), parameter) for name, parameter in dit.named_parameters())
    return {match[1]: parameter for match, parameter in matches if match}


def trained_layers(tensors: Mapping[str, Tensor], settings: Mapping[str, LayerSettings]) -> dict[str, LoraLayer]:
    """Returns an adapter's layers of its tensors, which go by the names of `lora_parameters`."""
    return {
        name: LoraLayer(
            tensors[f"{name}.lora_A"],
            tensors[f"{name}.lora_B"],
            each.plain_alpha,
            tensors.get(f"{name}.lora_magnitude"),
        )
        for name, each in settings.items()
    }


def _matching(setting: str, names: Sequence[str], pattern: str) -> list[str]:
    try:
        matched = [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{setting}: {pattern!r} is not a regular expression ({error}).") from None
    if matched:
        return matched
    kinds = sorted({kind_of(name) for name in names})
    near = difflib.get_close_matches(pattern.replace("\\", ""), names, n=1, cutoff=0.3)
    hint = f", for example {near[0]!r}" if near else ""
    which = "layer; layers" if setting == "lora.targets" else "chosen layer; chosen"
    raise ConfigError(f"{setting}: {pattern!r} matches no {which} are blocks.N.{{{', '.join(kinds)}}}{hint}.")


def _by_pattern(setting: str, layers: Sequence[str], patterns: Mapping[str, Number]) -> dict[str, Number]:
    found: dict[str, str] = {}
    for pattern, value in patterns.items():
        for layer in _matching(setting, layers, pattern):
            before = found.setdefault(layer, pattern)
            if patterns[before] != value:
                raise ConfigError(
                    f"{setting}: {layer} gets {patterns[before]} by {before!r} and {value} by {pattern!r}: "
                    "let one of them match it only."
                )
    return {layer: patterns[pattern] for layer, pattern in found.items()}


def _inject(dit: nn.Module, name: str, layers: Mapping[str, tuple[int, float]], dora: bool) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(layer)}": rank for layer, (rank, _) in layers.items()},
        alpha_pattern={f"^{re.escape(layer)}": alpha for layer, (_, alpha) in layers.items()},
        use_dora=dora,
    )
    with warnings.catch_warnings():
        # A second adapter on one model is what several LoRAs at once are; peft warns of it.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # Adapters on 8-bit weights cannot be merged; ours stay beside them.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        inject_adapter_in_model(config, dit, adapter_name=name)
    for layer in layers:
        module = _peft_layer(dit, layer)
        for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
            if name in part:
                part[name].to(dtype=torch.float32, device=module.get_base_layer().weight.device)
        if not dora:
            # peft would make an fp32 copy of every input. A DoRA has one: the lengths of rows ask for it.
            module.cast_input_dtype_enabled = False
            for part in (module.lora_A, module.lora_B):
                cast = CastLinear(part[name].in_features, part[name].out_features, bias=False, device="meta")
                cast.weight = part[name].weight
                part[name] = cast


def _activate_all(dit: nn.Module) -> None:
    """Activates all adapters, frozen: injecting one makes it the only active one, in layers of other adapters too."""
    for module in _peft_layers(dit):
        module.set_adapter(list(module.lora_A))
    dit.requires_grad_(False)


# Typed Any, here and below: peft keeps the parts of its layers in dictionaries of modules of any kind.
def _peft_layer(dit: nn.Module, name: str) -> Any:
    return dit.get_submodule(name)


def _peft_layers(dit: nn.Module) -> list[Any]:
    return [module for module in dit.modules() if hasattr(module, "lora_A")]


def _base_weight(module: Any) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module.get_base_layer()).detach().float()


@torch.no_grad()
def _measure_magnitude(module: Any) -> None:
    """Sets the trainable magnitudes to the lengths that the adapted rows have now, so that they change nothing.

    Measured in fp32 by the code that measures them in each forward pass: peft starts from lengths rounded to bf16.
    Source: huggingface/peft@0.21.2 tuners/lora/dora.py (update_layer, forward).
    """
    dora = module.lora_magnitude_vector[TRAINED]
    change = dora.get_lora_weight(module.lora_A[TRAINED], module.lora_B[TRAINED])
    dora.weight.copy_(dora.get_weight_norm(_base_weight(module), change, module.scaling[TRAINED]))
