"""Parses an adapter file of any layout: layers under the file's own names, and its metadata.

`files.load_adapter` calls this, and gives the layers their official names.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mochi_tune.adapters.alphas import read_alphas
from mochi_tune.adapters.layers import DIFFUSERS_KINDS, OFFICIAL_KINDS, LoraLayer, check_layer, kind_of, some
from mochi_tune.errors import CheckpointError
from mochi_tune.files import check_header

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
        alphas = read_alphas(modules, metadata)
        layers = {}
        for name, parts in modules.items():
            magnitude = parts["magnitude"].float() if "magnitude" in parts else None
            layers[name] = LoraLayer(parts["lora_A"].float(), parts["lora_B"].float(), alphas[name], magnitude)
            check_layer(name, layers[name])
    except CheckpointError as error:
        raise CheckpointError(f"adapter {path}: {error}") from error
    return layers, metadata


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"adapter {path} is not a file: give the path of a .safetensors file.")
    refusal = (
        f"adapter {path} is not safetensors, and pickles (.pt, .bin, .ckpt) can run code, so they are never opened"
    )
    if path.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{refusal}: convert it to safetensors first.")
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{refusal}, or it is damaged ({error}): convert it, or fetch it again.") from error


def _group_keys(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sorts the tensors by module; every key must be known, and every module has both halves.

    A DoRA has magnitudes in every module: where one lacks them, its rows' lengths are not known.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        module = match["module"] if match else ""
        part = match["half"] or ("magnitude" if match["magnitude"] else "alpha") if match else ""
        kinds = OFFICIAL_KINDS if module.startswith("transformer_") else DIFFUSERS_KINDS
        fits = tensor.dtype in _DTYPES and (part == "alpha" or tensor.ndim == (1 if part == "magnitude" else 2))
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
