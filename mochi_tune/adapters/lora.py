"""LoRA layers in a live AsymmDiT: selection, settings, creation, loading and reading. PEFT does the arithmetic.

Layers have official names, such as "blocks.0.attn.qkv_x". Adapter weights are fp32 whatever the dtype of the base,
because in bf16 the updates of a fine-tune would round to zero. They multiply in the dtype of the base.
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
TRAINED = "default"  # Name of the trainable adapter.
# peft's name of a parameter of the trainable adapter; our name is the group.
_PARAMETER = re.compile(r"(.+\.lora_(?:A|B|magnitude))(?:_vector)?\.default\.weight")


@dataclass(frozen=True)
class LayerSettings:
    """Settings of the adapter of one layer.

    Attributes:
        rank: number of components.
        alpha: strength; the adapter is scaled by alpha / rank, or by alpha / sqrt(rank) with rsLoRA.
        dropout: fraction of the adapter's inputs dropped in training, in [0, 1).
        rslora: whether to use rsLoRA.

    Source: rsLoRA, arXiv 2312.03732.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False

    @property
    def plain_alpha(self) -> float:
        """The alpha that gives the same scale without rsLoRA, as runtimes compute it."""
        return self.alpha * math.sqrt(self.rank) if self.rslora else self.alpha


def linear_shapes(dit: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (out, in) shape of every Linear that training can adapt; works on the meta device."""
    return {name: shape for name, shape in all_linear_shapes(dit).items() if is_attention_or_mlp(name)}


def all_linear_shapes(dit: nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (out, in) shape of every Linear, which adapters of other trainers can adapt; works on any device."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in dit.named_modules()
        if isinstance(module, nn.Linear)
    }


def select_layers(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Returns the layers whose full name matches one of the regular expressions.

    Raises:
        ConfigError: a pattern is not a regular expression or matches no layer, or there are no patterns.
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
    """Returns the settings of each layer: the value of the pattern that matches its name, else the common one.

    Args:
        layers: layers from `select_layers`.
        common: settings of layers that no pattern matches.
        rank_pattern: rank by regular expression; `alpha_pattern` and `dropout_pattern` likewise.

    Raises:
        ConfigError: a pattern is not a regular expression or matches no layer, or two contradict each other.
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
    """Returns metadata for an adapter file: the ranks and alphas of the settings, and whether they use rsLoRA."""
    metadata = {
        "rank": ",".join(str(rank) for rank in sorted({each.rank for each in settings.values()})),
        "alpha": ",".join(f"{alpha:g}" for alpha in sorted({each.alpha for each in settings.values()})),
    }
    return metadata | ({"rslora": "true"} if any(each.rslora for each in settings.values()) else {})


def apply_lora(dit: nn.Module, settings: Mapping[str, LayerSettings], seed: int, dora: bool = False) -> None:
    """Freezes the model and adds a trainable adapter, with random A and B = 0, so that the output does not change.

    Args:
        dit: model on its device. Adapters that it already has stay active and frozen.
        settings: settings of each layer to adapt, by name.
        seed: seed of the random A's.
        dora: whether to train the norm of each row of an adapted weight too, starting from its current norm.

    Raises:
        ConfigError: the model has no such layer, or already has a trainable adapter.
    """
    if unknown := settings.keys() - _adaptable(dit).keys():
        raise ConfigError(f"the model has no Linear {some(sorted(unknown))}: choose layers of `linear_shapes`.")
    if any(TRAINED in module.lora_A for module in _peft_layers(dit)):
        raise ConfigError("the model already has a trainable adapter: reload the model to add another one.")
    dit.requires_grad_(False)
    _inject(dit, TRAINED, {layer: (each.rank, each.plain_alpha) for layer, each in settings.items()}, dora, seed)
    for layer, each in settings.items():
        module = _peft_layer(dit, layer)
        if each.dropout:
            # peft has one dropout for all layers.
            module.lora_dropout[TRAINED] = nn.Dropout(each.dropout).train(dit.training)
        if dora:
            _measure_magnitude(module)
    _activate_all(dit)
    for parameter in lora_parameters(dit).values():
        parameter.requires_grad_(True)


@torch.no_grad()
def load_start_adapter(dit: nn.Module, layers: Mapping[str, LoraLayer]) -> None:
    """Copies an adapter into the trainable one, so that both give the same output.

    If the trainable rank is higher, the other components keep their random A and B = 0. B absorbs a different scale. If
    a plain LoRA continues as a DoRA, the magnitudes start at the norms of its adapted rows.

    Args:
        dit: model with the untrained adapter of `apply_lora`.
        layers: layers that passed `check_start`.
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
    """Freezes the model and adds an adapter to it, besides any others; the base weights do not change.

    Each adapter adds strength * (W' - W) to a weight W, where W' is the weight as trained.

    Args:
        dit: model whose weights are not sharded.
        layers: layers of the adapter, by name.
        name: name of the adapter, unique in the model.
        strength: factor of the change; 1 is as trained.

    Raises:
        ConfigError: `name` is not a valid module name, a layer already has an adapter of this name, or `strength` is
            not finite.
        CheckpointError: a layer is not in the model, has another size there or is damaged. The model is unchanged then.
    """
    _check_fit(dit, layers, name, strength)
    dit.requires_grad_(False)
    _inject(dit, name, {layer: (each.rank, strength * each.alpha) for layer, each in layers.items()})
    _fill(dit, layers, name, strength)
    _activate_all(dit)


def _check_fit(dit: nn.Module, layers: Mapping[str, LoraLayer], name: str, strength: float) -> None:
    """Refuses an adapter that `apply_adapter` cannot add; raises the same errors."""
    if not math.isfinite(strength):
        raise ConfigError(f"strength={strength} is not possible: use a finite number.")
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"an adapter cannot have the name {name!r}: use another word without dots, such as style.")
    shapes = _adaptable(dit)
    if unknown := [layer for layer in layers if layer not in shapes]:
        raise CheckpointError(
            f"the model has no Linear {some(unknown)}: use an adapter that was trained on it; mod_x and mod_y take one "
            "only before their weights move to host memory."
        )
    if taken := [layer for layer in layers if name in getattr(dit.get_submodule(layer), "lora_A", ())]:
        raise ConfigError(f"the model already has an adapter {name!r} in {some(taken)}: use another name.")
    for layer, each in layers.items():
        check_layer(layer, each)
        if each.shape != shapes[layer]:
            raise CheckpointError(
                f"{layer} is {each.shape} in the adapter and {shapes[layer]} in the model: use an adapter that was "
                "trained on it."
            )


def _adaptable(dit: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Returns the (out, in) shape of each Linear by name, including those that have adapters."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in dit.named_modules()
        if hasattr(module, "in_features")
    }


def change_adapters(dit: nn.Module, adapters: Mapping[str, tuple[Mapping[str, LoraLayer], float]]) -> None:
    """Replaces the weights and strengths of a model's adapters; the modules stay the same.

    Args:
        dit: model with exactly these adapters from `apply_adapter`.
        adapters: layers and strength by adapter name; the same layers and ranks as in the model.

    Raises:
        CheckpointError: an adapter in the model has other layers or ranks. The model is unchanged then.
    """
    for name, (layers, _) in adapters.items():
        modules: dict[str, Any] = {path: m for path, m in dit.named_modules() if name in getattr(m, "lora_A", ())}
        ranks = {path: module.r[name] for path, module in modules.items()}
        if wrong := [x for x in {**ranks, **layers} if x not in layers or ranks.get(x) != layers[x].rank]:
            raise CheckpointError(f"{name!r} has other layers or ranks than the model: {some(wrong)}.")
    for module in dit.modules():
        if isinstance(module, StretchedLinear):
            module.lora_stretch.data.fill_(1)
            module.changes.clear()
    for name, (layers, strength) in adapters.items():
        _fill(dit, layers, name, strength)


@torch.no_grad()  # Otherwise the graph of a DoRA's change would keep an fp32 copy of the weight.
def _fill(dit: nn.Module, layers: Mapping[str, LoraLayer], name: str, strength: float) -> None:
    """Copies an adapter's layers into the modules injected under its name."""
    for layer, each in layers.items():
        module = _peft_layer(dit, layer)
        module.scaling[name] = strength * each.alpha / each.rank
        a, b = module.lora_A[name].weight, module.lora_B[name].weight
        a.data.copy_(each.a)
        b.data.copy_(each.b)
        if each.magnitude is not None:
            # W' = factor * (W + scale * B A): nothing is trained here, so the factor can be multiplied into B.
            changed = _base_weight(module).to(b.device) + each.scale * b @ a
            factor = each.magnitude.to(b.device) / changed.norm(dim=1)
            b.data *= factor[:, None]
            if not isinstance(module.base_layer, StretchedLinear):
                module.base_layer = StretchedLinear(module.base_layer)
            module.base_layer.changes[name] = change = strength * (factor - 1)
            module.base_layer.lora_stretch.data += change


def switch_adapters(dit: nn.Module, on: bool) -> None:
    """Enables or disables all adapters; without them the model computes exactly what the base does."""
    for module in _peft_layers(dit):
        module.enable_adapters(on)
    for module in dit.modules():
        if isinstance(module, StretchedLinear):
            module.is_on = on


def lora_parameters(dit: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trainable adapter's parameters by name: LAYER.lora_A, LAYER.lora_B and LAYER.lora_magnitude."""
    matches = ((_PARAMETER.fullmatch(name), parameter) for name, parameter in dit.named_parameters())
    return {match[1]: parameter for match, parameter in matches if match}


def trained_layers(tensors: Mapping[str, Tensor], settings: Mapping[str, LayerSettings]) -> dict[str, LoraLayer]:
    """Returns the layers of a trained adapter from its tensors, which have the names of `lora_parameters`."""
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


def _inject(
    dit: nn.Module, name: str, layers: Mapping[str, tuple[int, float]], dora: bool = False, seed: int | None = None
) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        target_modules=list(layers),
        rank_pattern={f"^{re.escape(layer)}": rank for layer, (rank, _) in layers.items()},
        alpha_pattern={f"^{re.escape(layer)}": alpha for layer, (_, alpha) in layers.items()},
        use_dora=dora,
    )
    # peft draws random weights.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # peft warns of a second adapter, which is intended here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # peft warns that adapters on 8-bit weights cannot be merged, which is never done here.
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")
        if seed is not None:
            torch.manual_seed(seed)
        inject_adapter_in_model(config, dit, adapter_name=name)
    for layer in layers:
        module = _peft_layer(dit, layer)
        for part in (module.lora_A, module.lora_B, module.lora_magnitude_vector):
            if name in part:
                part[name].to(dtype=torch.float32, device=module.get_base_layer().weight.device)
        if not dora:
            # peft would copy every input to fp32. A DoRA needs that for the norms of its rows.
            module.cast_input_dtype_enabled = False
            for part in (module.lora_A, module.lora_B):
                cast = CastLinear(part[name].in_features, part[name].out_features, bias=False, device="meta")
                cast.weight = part[name].weight
                part[name] = cast


def _activate_all(dit: nn.Module) -> None:
    """Activates and freezes all adapters; injecting one had made it the only active one, in all layers."""
    for module in _peft_layers(dit):
        module.set_adapter(list(module.lora_A))
    dit.requires_grad_(False)


# The return type is Any because peft keeps the parts of its layers in dictionaries of modules of any kind.
def _peft_layer(dit: nn.Module, name: str) -> Any:
    return dit.get_submodule(name)


def _peft_layers(dit: nn.Module) -> list[Any]:
    return [module for module in dit.modules() if hasattr(module, "lora_A")]


def _base_weight(module: Any) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(module.get_base_layer()).detach().float()


@torch.no_grad()
def _measure_magnitude(module: Any) -> None:
    """Sets the trainable magnitudes to the current norms of the adapted rows, so that the output does not change.

    They are computed in fp32 by the code of the forward pass; peft would start from norms rounded to bf16.
    Source: huggingface/peft@0.21.2 tuners/lora/dora.py (update_layer, forward).
    """
    dora = module.lora_magnitude_vector[TRAINED]
    change = dora.get_lora_weight(module.lora_A[TRAINED], module.lora_B[TRAINED])
    dora.weight.copy_(dora.get_weight_norm(_base_weight(module), change, module.scaling[TRAINED]))
