"""What a run's settings say of its adapter: checked, and worked out layer by layer."""

from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mochi_tune.config.schema import LoraConfig, RunConfig
from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    from mochi_tune.adapters.lora import LayerSettings

# What settings by pattern take.
PATTERN_TYPES = {
    dict[str, int]: r"whole numbers by pattern, {'blocks\.0\..*': 8}",
    dict[str, float]: r"numbers by pattern, {'blocks\.0\..*': 0.5}",
}
PATTERN_KEYS = {f"lora.{entry.name}": entry.type for entry in fields(LoraConfig) if entry.type in PATTERN_TYPES}


def read_patterns(key: str, value: str) -> dict[str, Any]:
    """Reads a setting by pattern from the command line as YAML: Hydra's grammar has no quotes in a mapping's keys.

    Raises:
        ConfigError: it is no mapping of texts.
    """
    from yaml import YAMLError, safe_load

    try:
        patterns = safe_load(value)
    except YAMLError:
        patterns = None
    if not isinstance(patterns, dict) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{key}={value} does not fit: it takes {PATTERN_TYPES[PATTERN_KEYS[key]]}.")
    return patterns


def check_lora(config: RunConfig) -> None:
    """Checks the adapter's settings that are given by pattern, and what a DoRA needs.

    Raises:
        ConfigError: a value is out of its range, or DoRA's lengths would be those of shares of rows.
    """
    lora = config.lora
    for key, patterns, allowed, fits in (
        ("rank", lora.rank_pattern, "at least 1", lambda v: v >= 1),
        ("alpha", lora.alpha_pattern, "above 0 and finite", lambda v: 0 < v < float("inf")),
        ("dropout", lora.dropout_pattern, "from 0 to below 1", lambda v: 0 <= v < 1),
    ):
        for pattern, value in patterns.items():
            if not fits(value):
                raise ConfigError(f"lora.{key}_pattern: {pattern!r}: {value} is not possible: it must be {allowed}.")
    if lora.dora and config.parallel.strategy == "zero3":
        raise ConfigError(
            "lora.dora=true measures whole rows of the base, which parallel.strategy=zero3 cuts up: "
            "use parallel.strategy=zero2."
        )
    if lora.init_from is not None and not lora.init_from.strip():
        raise ConfigError("lora.init_from is empty: name a file, or null.")


def lora_settings(config: RunConfig, names: Iterable[str]) -> "dict[str, LayerSettings]":
    """Returns which of a model's layers are adapted, and how each of them.

    Raises:
        ConfigError: a pattern is none, matches no layer, or contradicts another one.
    """
    from mochi_tune.adapters.lora import layer_settings, select_layers

    lora = config.lora
    patterns = lora.rank_pattern, lora.alpha_pattern, lora.dropout_pattern
    layers = select_layers(names, lora.targets)
    return layer_settings(layers, lora.rank, lora.alpha, lora.dropout, *patterns, lora.rslora)
