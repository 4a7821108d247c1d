"""Reads the alpha of each layer of an adapter file: from its tensors, its metadata or the config next to it.

All places that state alphas are read and must agree:

1. `.alpha` tensors: kohya's tools, ComfyUI, `train`.
2. The file's metadata: `alphas` (`train`), `kwargs` (the reference), `lora_adapter_metadata` (diffusers),
   `ss_network_alpha` (kohya), or a plain `lora_alpha` or `network_alpha`.
3. The config in its folder: `adapter_config.json` (peft), `lora_config.json` (FastVideo).

Source: kohya-ss/sd-scripts@48d368f train_network.py (ss_network_dim, ss_network_alpha); hao-ai-lab/FastVideo@191d1be
fastvideo/utils/checkpoint.py (save_lora_checkpoint); huggingface/diffusers@0.42.1 loaders/lora_base.py.
"""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mochi_tune.adapters.layers import block_of, is_diffusers, official_names
from mochi_tune.adapters.peft_config import alphas_by_peft
from mochi_tune.errors import CheckpointError, some

ASSUMED = "assumed to be the rank, as nothing states it"
# File names of the configs of peft and FastVideo.
PEFT_CONFIG, FASTVIDEO_CONFIG = "adapter_config.json", "lora_config.json"
# Metadata keys for alphas and their ranks; a conversion does not carry them over.
ALPHA_KEYS = ("alphas", "kwargs", "lora_adapter_metadata", "ss_network_alpha", "ss_network_dim", "lora_alpha",
              "lora_rank", "network_alpha", "network_dim")  # fmt: skip
_SINGLE_ALPHAS = (("ss_network_alpha", "ss_network_dim"), ("lora_alpha", "lora_rank"), ("network_alpha", "network_dim"))
# Layouts without an alpha: it is multiplied into the weights.
BAKED = ("diffusers", "comfyui")
_GIVEN = "adapter_alpha="
_MAX_ALPHA = 1e6
# Relative tolerance of alphas written as text or in fp32.
_TOLERANCE = 1e-6

Modules = Mapping[str, Mapping[str, Tensor]]


class Statement(NamedTuple):
    """The alphas that one place states: its name for messages, the alpha of each module, and their precision."""

    where: str
    alphas: dict[str, Any]
    tolerance: float = _TOLERANCE


def is_split(modules: Mapping[str, Any]) -> bool:
    """Whether modules have diffusers' names, with separate q, k and v."""
    return is_diffusers(next(iter(modules)))


def is_ours(metadata: Mapping[str, str]) -> bool:
    """Whether mochi-tune wrote a file; configs next to such a file are ignored."""
    return metadata.get("created_by", "").startswith("mochi-tune ")


def read_alphas(
    modules: Modules, metadata: Mapping[str, str], configs: Mapping[str, dict[str, Any]], given: float | None = None
) -> tuple[dict[str, float], str]:
    """Finds the alpha of each module.

    Args:
        modules: tensors of each module by part: "lora_A", "lora_B" and, in some layouts, "alpha".
        metadata: metadata of the file.
        configs: configs next to the file, by file name.
        given: alpha that the user gives for a file that states none.

    Returns:
        The alphas by module, and the places that state them in words.

    Raises:
        CheckpointError: two places differ, a rank is not as stated, an alpha is missing or not a number, or the
            metadata is damaged or names layers that the file lacks.
    """
    ranks = {name: len(parts["lora_A"]) for name, parts in modules.items()}
    statements = [
        statement
        for read in (_from_tensors, _from_metadata, _from_configs)
        for statement in read(modules, ranks, metadata, configs)
    ]
    if not statements and metadata.get("format") in BAKED and is_ours(metadata):
        statements = [Statement("this program's export, which has it in the weights", dict(ranks))]
    for statement in statements:
        if wrong := [name for name in modules if not _is_number(statement.alphas.get(name))]:
            raise CheckpointError(
                f"no usable alpha for {some(wrong)} in {statement.where}: it is damaged, fetch the file again."
            )
    if given is not None:
        statements.append(Statement(f"{_GIVEN}{given:g}", dict.fromkeys(ranks, given)))
    if not statements:
        return {name: float(rank) for name, rank in ranks.items()}, ASSUMED
    _check_same(statements)
    # The places agree within their precision; take the most precise one.
    exact = min(statements, key=lambda statement: statement.tolerance)
    return {name: float(exact.alphas[name]) for name in ranks}, " and ".join(each.where for each in statements)


def source_words(source: str) -> str:
    """Returns where alphas are stated, in few words: all places in the file are "the file".

    Args:
        source: the places, as `read_alphas` returns them.
    """
    if source == ASSUMED or source.startswith(_GIVEN):
        return source if source == ASSUMED else f"set by {source}"
    places = dict.fromkeys("the file" if place.startswith("its ") else place for place in source.split(" and "))
    return f"stated in {' and '.join(places)}"


def _check_same(statements: list[Statement]) -> None:
    first = statements[0]
    for other in statements[1:]:
        tolerance = max(first.tolerance, other.tolerance)
        for name, alpha in first.alphas.items():
            if name in other.alphas and abs(alpha - other.alphas[name]) > tolerance * abs(alpha):
                raise CheckpointError(
                    f"{first.where} and {other.where} differ, alpha is {alpha:g} and {other.alphas[name]:g} for "
                    f"{name}: keep only what is right."
                )


def _from_tensors(modules: Modules, *_: object) -> list[Statement]:
    own = {name: parts["alpha"] for name, parts in modules.items() if "alpha" in parts}
    if not own:
        return []
    alphas = {name: alpha.item() if alpha.numel() == 1 else None for name, alpha in own.items()}
    # 16-bit floats round an alpha such as 22.627.
    rounding = max(torch.finfo(alpha.dtype).eps if alpha.is_floating_point() else 0.0 for alpha in own.values())
    return [Statement("its .alpha tensors", alphas, max(rounding, 2 * _TOLERANCE))]


def _from_metadata(modules: Modules, ranks: dict[str, int], metadata: Mapping[str, str], _: object) -> list[Statement]:
    statements = []
    if metadata.get("format") == "mochi-tune":
        alphas = _json(metadata, "alphas")
        if lacking := sorted(alphas.keys() - modules.keys()):
            raise CheckpointError(_lacks(lacking, len(alphas)))
        statements.append(Statement("its metadata `alphas`", alphas))
    if "kwargs" in metadata and not is_split(modules):
        statements.append(Statement("its metadata `kwargs`", _official_alphas(ranks, _json(metadata, "kwargs"))))
    if "lora_adapter_metadata" in metadata:
        where, config = "its metadata `lora_adapter_metadata`", _json(metadata, "lora_adapter_metadata")
        config = {key.removeprefix("transformer."): value for key, value in config.items()}
        statements.append(Statement(where, alphas_by_peft(where, modules, config)))
    for alpha_key, rank_key in _SINGLE_ALPHAS:
        alpha, rank = _number(metadata, alpha_key), _number(metadata, rank_key)
        _check_rank(f"its metadata `{rank_key}`", ranks, rank)
        if alpha is not None:
            statements.append(Statement(f"its metadata `{alpha_key}`", dict.fromkeys(ranks, alpha)))
    return statements


def _from_configs(
    modules: Modules, ranks: dict[str, int], _: object, configs: Mapping[str, dict[str, Any]]
) -> list[Statement]:
    statements = []
    if (config := configs.get(PEFT_CONFIG)) is not None:
        where = f"{PEFT_CONFIG} next to it"
        statements.append(Statement(where, alphas_by_peft(where, modules, config)))
    if (config := configs.get(FASTVIDEO_CONFIG)) is not None:
        where, settings = f"{FASTVIDEO_CONFIG} next to it", config.get("lora_params")
        if not isinstance(settings, dict):
            raise CheckpointError(
                f"{where} has no `lora_params`, as FastVideo writes it: remove it, or fetch it again."
            )
        _check_rank(where, ranks, settings.get("lora_rank"))
        statements.append(Statement(where, dict.fromkeys(ranks, settings.get("lora_alpha"))))
    return statements


def _check_rank(where: str, ranks: dict[str, int], stated: Any) -> None:
    for name, rank in ranks.items():
        if stated is not None and stated != rank:
            raise CheckpointError(f"{name} has rank {rank}, and {where} says {stated!r:.20}: fetch the file again.")


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
    # This format holds all layers of a group, so missing layers have been lost.
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


def _number(metadata: Mapping[str, str], key: str) -> float | None:
    """Returns a value of the metadata as a number, or None if it has no such key or no single value."""
    text = metadata.get(key)
    # kohya's tools write these if layers differ.
    if text in (None, "", "None", "Dynamic"):
        return None
    try:
        return float(text)
    except ValueError:
        raise CheckpointError(f"its metadata `{key}` is not a number but {text!r:.20}: fetch the file again.") from None


def _json(metadata: Mapping[str, str], key: str) -> dict:
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
