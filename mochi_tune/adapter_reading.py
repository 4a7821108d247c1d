"""What an adapter file of any layout holds: layers under the file's own names, and its metadata."""

import json
import math
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mochi_tune.errors import CheckpointError
from mochi_tune.models.lora_layout import DIFFUSERS_KINDS, OFFICIAL_KINDS, LoraLayer, check_layer, kind_of, some

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:transformer\.|diffusion_model\.)?(?P<module>(?:transformer_)?blocks\.(?:0|[1-9]\d{0,2})\..+?)"
    r"\.(?:(?P<half>lora_[AB])(?:\.weight)?|(?P<magnitude>lora_magnitude)(?:_vector(?:\.weight)?)?|(?P<alpha>alpha))"
)


def read_layers(path: Path) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """Returns a file's layers in fp32, by the module names of its layout, and its metadata.

    Raises:
        CheckpointError: no such file, not safetensors (a pickle is never opened), unknown or missing keys, an alpha
            that is missing or does not fit, or non-finite weights.
    """
    tensors, metadata = _read(path)
    try:
        modules = _group_keys(tensors)
        alphas = _read_alphas(modules, metadata)
        layers = {}
        for name, parts in modules.items():
            magnitude = parts["magnitude"].float() if "magnitude" in parts else None
            layers[name] = LoraLayer(parts["lora_A"].float(), parts["lora_B"].float(), alphas[name], magnitude)
            check_layer(name, layers[name])
    except CheckpointError as error:
        raise CheckpointError(f"adapter {path}: {error}") from error
    return layers, metadata


def is_split(modules: dict) -> bool:
    """Whether the names are diffusers', which split q, k and v."""
    return next(iter(modules)).startswith("transformer_")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"adapter {path} is not a file: give the path of a .safetensors file.")
    refusal = (
        f"adapter {path} is not safetensors, and pickles (.pt, .bin, .ckpt) can run code, so they are never opened"
    )
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{refusal}: convert it to safetensors first.")
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{refusal}, or it is damaged ({error}): convert it, or fetch it again.") from error


def _group_keys(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sorts the tensors by module; every key must find its place, and every module has both halves.

    A DoRA has magnitudes in every module: where one lacks them, its rows' lengths are not known.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = match["module"] if match else ""
        part = match["half"] or ("magnitude" if match["magnitude"] else "alpha") if match else ""
        kinds = OFFICIAL_KINDS if module.startswith("transformer_") else DIFFUSERS_KINDS
        fits = tensor.is_floating_point() and (part == "alpha" or tensor.ndim == (1 if part == "magnitude" else 2))
        if kind_of(module) in kinds and fits and part not in modules.get(module, {}):
            modules.setdefault(module, {})[part] = tensor
        else:
            unknown.append(key)
    if not modules:
        raise CheckpointError(
            f"of no known format, its keys are {some(unknown) or 'none'}: they must be like "
            "blocks.0.attn.qkv_x.lora_A or transformer.transformer_blocks.0.attn1.to_q.lora_A.weight."
        )
    if unknown:
        raise CheckpointError(f"{len(unknown)} of its keys fit no layer of Mochi, or one twice: {some(unknown)}.")
    needed = ["lora_A", "lora_B"] + (["magnitude"] if any("magnitude" in parts for parts in modules.values()) else [])
    if missing := [f"{name}.{part}" for name, parts in modules.items() for part in needed if part not in parts]:
        raise CheckpointError(f"incomplete, it lacks {some(missing)}: fetch the file again.")
    if len({name.startswith("transformer_") for name in modules}) > 1:
        raise CheckpointError(f"it mixes official and diffusers names, {min(modules)} and {max(modules)}.")
    return modules


def _read_alphas(modules: dict[str, dict[str, Tensor]], metadata: dict[str, str]) -> dict[str, float]:
    """Finds each module's alpha where its layout keeps it, in the metadata or a tensor; without any it is the rank."""
    ranks = {name: len(parts["lora_A"]) for name, parts in modules.items()}
    if metadata.get("format") == "mochi-tune":
        alphas = _json(metadata, "alphas")
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


def _official_alphas(ranks: dict[str, int], kwargs: dict) -> dict[str, float]:
    alphas = {}
    for name, rank in ranks.items():
        group = "qkv_proj" if ".qkv_" in name else "out_proj" if ".proj_" in name else "no"
        if kwargs.get(f"{group}_lora_rank") != rank:
            raise CheckpointError(
                f"{name} has rank {rank}, but its metadata says {group}_lora_rank={kwargs.get(f'{group}_lora_rank')}: "
                "fetch the file again."
            )
        alphas[name] = kwargs.get(f"{group}_lora_alpha")
    return alphas


def _peft_alphas(ranks: dict[str, int], config: dict) -> dict[str, float]:
    """Applies peft's rules: a pattern that ends a module's name overrides lora_alpha; rsLoRA divides by sqrt(rank).

    Source: huggingface/peft@0.21.2 utils/other.py (get_pattern_key), tuners/lora/layer.py (update_layer).
    """
    config = {key.removeprefix("transformer."): value for key, value in config.items()}
    patterns = config.get("alpha_pattern") or {}
    alphas = {}
    for name, rank in ranks.items():
        try:
            match = next((pattern for pattern in patterns if re.fullmatch(rf"(.*\.)?({pattern})", name)), None)
            alpha = config.get("lora_alpha") if match is None else patterns[match]
            alphas[name] = alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        except (re.error, TypeError) as error:
            raise CheckpointError(f"the alphas in `lora_adapter_metadata` are damaged: {error}.") from error
    return alphas


def _json(metadata: dict[str, str], key: str) -> dict:
    try:
        value = json.loads(metadata.get(key, ""))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(
            f"`{key}` in its metadata is not a JSON object, so alpha is unknown: fetch the file again."
        )
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
