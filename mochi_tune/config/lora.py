"""The settings of the adapter, layer by layer."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from mochi_tune.config.schema import LoraConfig

if TYPE_CHECKING:
    from mochi_tune.adapters.lora import LayerSettings


def lora_settings(lora: LoraConfig, names: Iterable[str]) -> "dict[str, LayerSettings]":
    """Returns the settings of each adapted layer, by name.

    Raises:
        ConfigError: a pattern is not a regular expression, matches no layer, or contradicts another one.
    """
    from mochi_tune.adapters.lora import LayerSettings, layer_settings, select_layers

    patterns = lora.rank_pattern, lora.alpha_pattern, lora.dropout_pattern
    layers = select_layers(names, lora.targets)
    return layer_settings(layers, LayerSettings(lora.rank, lora.alpha, lora.dropout, lora.rslora), *patterns)
