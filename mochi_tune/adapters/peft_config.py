"""Reads the alphas of layers from a peft LoraConfig by peft's rules, or says why the adapter is not supported.

Source: huggingface/peft@0.21.2 tuners/lora/config.py, utils/other.py (get_pattern_key), tuners/lora/layer.py
(update_layer).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mochi_tune.errors import CheckpointError, printable

# peft accepts any regular expression as a module's name, and matching some of them would never end. Only numbers as \d+
# and a few choices as (a|b) that are not repeated are allowed.
_PLAIN_PATTERN = re.compile(r"\^?(\.\*)?([\w.\\]|\\d\+|\((\?:)?[\w.\\|]+\)(?![+*?{]))*\$?")
_MAX_LENGTH, _MAX_CHOICES, _MAX_BARS = 500, 3, 30
# Settings with which an adapter does not compute W + scale * B A.
_OTHER_KINDS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "layer_replication")
# Initialisations that change the base's weights.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def alphas_by_peft(
    where: str, modules: Mapping[str, Mapping[str, Tensor]], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the alpha of each module, with the scale of rsLoRA included.

    A pattern that matches the end of a module's name takes precedence over `lora_alpha`.

    Args:
        where: name of the config for messages.
        modules: tensors of each module by part.
        config: saved config of peft.

    Raises:
        CheckpointError: the adapter is not a LoRA or DoRA, or the config states other ranks than those of the tensors.
    """
    _check_kind(where, config, has_magnitudes=any("magnitude" in parts for parts in modules.values()))
    alphas = {}
    for name, parts in modules.items():
        rank = len(parts["lora_A"])
        try:
            stated = _by_pattern(where, name, config.get("rank_pattern"), config.get("r"))
            alpha = _by_pattern(where, name, config.get("alpha_pattern"), config.get("lora_alpha"))
            alphas[name] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        except (re.error, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"the alphas in {where} are damaged: {error}.") from error
        if stated is not None and stated != rank:
            raise CheckpointError(f"{name} has rank {rank}, and {where} says {stated!r:.20}: fetch the file again.")
    return alphas


def _check_kind(where: str, config: Mapping[str, Any], has_magnitudes: bool) -> None:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(f"{where} says peft_type={kind!r:.20}, and only LORA is supported: use a LoRA.")
    if other := [key for key in _OTHER_KINDS if config.get(key)]:
        raise CheckpointError(f"{where} sets {other[0]}, which changes what a LoRA computes: use a plain LoRA or DoRA.")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{where} says init_lora_weights={begun:.20}, which changes the base's weights too: save it with peft's "
            "path_initial_model_for_weight_conversion."
        )
    if "use_dora" in config and bool(config["use_dora"]) != has_magnitudes:
        has = "has" if has_magnitudes else "lacks"
        raise CheckpointError(
            f"{where} says use_dora={bool(config['use_dora'])!s:.5}, but the file {has} magnitudes: fetch it again."
        )


def _by_pattern(where: str, name: str, patterns: Any, default: Any) -> Any:
    return next((value for pattern, value in (patterns or {}).items() if _ends_in(where, name, pattern)), default)


def _ends_in(where: str, name: str, pattern: str) -> bool:
    re.compile(pattern)
    is_short = len(pattern) <= _MAX_LENGTH and pattern.count("(") <= _MAX_CHOICES and pattern.count("|") <= _MAX_BARS
    if not is_short or not _PLAIN_PATTERN.fullmatch(pattern):
        raise CheckpointError(
            f"{where} has the pattern {printable(pattern)[:80]}, and patterns may only have \\d+ for a number and "
            f"up to {_MAX_CHOICES} choices as (to_q|to_k): write the names of the modules out in it."
        )
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None
