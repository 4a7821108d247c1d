"""Reads the alpha of each layer of an adapter file, from the metadata or the tensors of its layout."""

import json
import math
import re
from typing import Any

from torch import Tensor

from mochi_tune.adapters.layers import block_of, official_names, some
from mochi_tune.errors import CheckpointError

_MAX_ALPHA = 1e6
# peft takes any regular expression for a module's name; some of those would not end in a lifetime.
_PLAIN_PATTERN = re.compile(r"\^?(\.\*)?[\w.\\]*\$?")


def is_split(modules: dict) -> bool:
    """Whether modules have diffusers' names, with q, k and v apart."""
    return next(iter(modules)).startswith("transformer_")


def read_alphas(modules: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> dict[str, float]:
    """Finds each module's alpha where its layout keeps it, in the metadata or a tensor; without any it is the rank.

    Args:
        modules: of each module of the file the tensors "lora_A", "lora_B" and, in some layouts, "alpha".
        metadata: of the file. Only its ranks and alphas are read.

    Raises:
        CheckpointError: an alpha is missing or no number, the metadata names layers that the file lacks, or it is
            damaged.
    """
    ranks = {name: len(parts["lora_A"]) for name, parts in modules.items()}
    # Values of a file's metadata, of any type until they are checked below.
    alphas: dict[str, Any]
    if metadata.get("format") == "mochi-tune":
        alphas = _json(metadata, "alphas")
        if lacking := sorted(alphas.keys() - modules.keys()):
            raise CheckpointError(_lacks(lacking, len(alphas)))
    elif "kwargs" in metadata and not is_split(modules):
        alphas = _official_alphas(ranks, _json(metadata, "kwargs"))
    elif "lora_adapter_metadata" in metadata and is_split(modules):
        alphas = _peft_alphas(ranks, _json(metadata, "lora_adapter_metadata"))
    else:
        own = {name: parts["alpha"] for name, parts in modules.items() if "alpha" in parts}
        alphas = ranks | {name: alpha.item() if alpha.numel() == 1 else None for name, alpha in own.items()}
    if wrong := [name for name in modules if not _is_number(alphas.get(name))]:
        raise CheckpointError(f"no usable alpha for {some(wrong)}: its metadata is damaged, fetch the file again.")
    return {name: float(alphas[name]) for name in modules}


def _official_alphas(ranks: dict[str, int], kwargs: dict[str, Any]) -> dict[str, Any]:
    alphas: dict[str, Any] = {}
    for name, rank in ranks.items():
        group = "qkv_proj" if ".qkv_" in name else "out_proj" if ".proj_" in name else "no"
        if kwargs.get(f"{group}_lora_rank") != rank:
            raise CheckpointError(
                f"{name} has rank {rank}, but its metadata says {group}_lora_rank={kwargs.get(f'{group}_lora_rank')}: "
                "fetch the file again."
            )
        alphas[name] = kwargs.get(f"{group}_lora_alpha")
    # This format is all or nothing, so that layers that are not there have been lost.
    groups = [ours for group, ours in (("qkv", ".qkv_"), ("out", ".proj_")) if kwargs.get(f"{group}_proj_lora_rank")]
    num_blocks = 1 + max(block_of(name) for name in ranks)
    expected = [name for name in official_names(num_blocks) if any(ours in name for ours in groups)]
    if f"blocks.{num_blocks - 1}.attn.proj_y" in ranks:
        # The last block of a model has none.
        expected.append(f"blocks.{num_blocks}.attn.proj_x")
    if lacking := [name for name in expected if name not in ranks]:
        raise CheckpointError(_lacks(lacking, len(expected)))
    return alphas


def _lacks(lacking: list[str], num_expected: int) -> str:
    return f"incomplete, it lacks {len(lacking)} of {num_expected} layers, {some(lacking)}: fetch the file again."


def _peft_alphas(ranks: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """Applies peft's rules: a pattern that ends a module's name overrides lora_alpha; rsLoRA divides by sqrt(rank).

    Source: huggingface/peft@0.21.2 utils/other.py (get_pattern_key), tuners/lora/layer.py (update_layer).
    """
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    patterns = config.get("alpha_pattern") or {}
    alphas = {}
    for name, rank in ranks.items():
        try:
            match = next((pattern for pattern in patterns if _ends_in(name, pattern)), None)
            alpha: Any = config.get("lora_alpha") if match is None else patterns[match]
            alphas[name] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        except (re.error, TypeError, OverflowError) as error:
            raise CheckpointError(f"the alphas in `lora_adapter_metadata` are damaged: {error}.") from error
    return alphas


def _ends_in(name: str, pattern: str) -> bool:
    if not _PLAIN_PATTERN.fullmatch(pattern):
        raise re.error(f"{pattern[:40]!a} is more than the end of a module's name")
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _json(metadata: dict[str, str], key: str) -> dict:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"`{key}` in its metadata is not a JSON object, so alpha is unknown: fetch the file again."
        )
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_ALPHA
