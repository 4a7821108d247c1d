"""Reads weights in fp8 with their scales, in the layouts of ComfyUI; names the quantized formats that are not read.

| layout            | scale                 | also                                                                 |
| ----------------- | --------------------- | -------------------------------------------------------------------- |
| plain             | none, it is 1         |                                                                      |
| scaled            | LAYER.scale_weight    | `scaled_fp8`, an empty tensor that marks the file; LAYER.scale_input |
| mixed             | LAYER.weight_scale    | LAYER.comfy_quant, JSON as bytes; LAYER.input_scale                  |

A scale is one number, or one per row. Scales of activations are ignored.
Source: Comfy-Org/ComfyUI comfy/utils.py (convert_old_quants), comfy/ops.py (mixed_precision_ops).

Other formats are recognised by the names of their tensors.
Source: kijai/ComfyUI-MochiWrapper mz_gguf_loader.py; bitsandbytes functional.py (QuantState), nn/modules.py
(Linear8bitLt); the Linears of AutoGPTQ, AutoAWQ, optimum-quanto and nunchaku.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.headers import FP8_DTYPES, TensorHeader

_SCALES = (".scale_weight", ".weight_scale")
_OF_ACTIVATIONS = (".scale_input", ".input_scale")
_MARKER, _NOTE = "scaled_fp8", ".comfy_quant"
# Layers that ComfyUI never scales.
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight", "relative_attention_bias.weight")
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
# Formats that are not read, by the ends of their tensors' names after that of the layer.
_UNREAD = {
    "GGUF's blocks": r"\.(Q\d\w*)_qweight",
    "4 bits of bitsandbytes": r"\.weight\.(nested_)?(absmax|quant_map)|\.weight\.quant_state\.\w+",
    "8 bits of bitsandbytes": r"\.(weight\.)?SCB",
    "GPTQ or AWQ": r"\.(qweight|qzeros)",
    "quanto": r"\.weight\._(data|scale)",
    "SVDQuant": r"\.wscales",
}
# How a part in full precision takes less memory.
_SMALLER = {
    "dit": "; model.precision=nf4, fp8 or int8 quantizes it while loading",
    "text_encoder": "; memory.t5_dtype=int8 quantizes it while loading",
}


def take_scales(found: Mapping[str, TensorHeader], formats: Mapping[str, str]) -> dict[str, TensorHeader]:
    """Assigns the scales to the fp8 tensors, and removes the entries that describe how tensors are stored.

    Such entries without an fp8 tensor stay, so that the comparison with the model refuses them.

    Args:
        found: headers by their names without the prefix of the part.
        formats: formats of quantized layers, see `read_formats`.

    Raises:
        CheckpointError: a format is not supported, or an fp8 tensor lacks its scale in a file with scales.
    """
    kept, scales = dict(found), {}
    is_scaled = any(header.dtype in FP8_DTYPES for name, header in found.items() if name != _MARKER)
    is_scaled = is_scaled and kept.pop(_MARKER, None) is not None
    for name, header in found.items():
        layer, ending = _split(name)
        is_fp8 = f"{layer}.weight" in found and found[f"{layer}.weight"].dtype in FP8_DTYPES
        if ending in _SCALES and is_fp8 and _fits(header.shape, found[f"{layer}.weight"].shape):
            scales[f"{layer}.weight"] = kept.pop(name)
        elif (ending == _NOTE and f"{layer}.weight" in found) or (ending in _OF_ACTIVATIONS and is_fp8):
            del kept[name]
    for layer, named in formats.items():
        if named not in _FORMATS:
            raise CheckpointError(
                f"{layer}.weight is stored as {named}, which is not supported: use a file in bf16, fp16, fp32 or fp8."
            )
    lacking = [f"{layer}.weight" for layer in formats if f"{layer}.weight" not in scales]
    if is_scaled or scales:
        fp8 = [name for name, header in kept.items() if header.dtype in FP8_DTYPES and name.endswith(".weight")]
        lacking += [name for name in fp8 if name not in scales and not name.endswith(_EMBEDDINGS)]
    if lacking:
        raise CheckpointError(
            f"{len(set(lacking))} tensors are in fp8 without a scale ({lacking[0]}): fetch their file again."
        )
    return {name: header._replace(scale=scales.get(name)) for name, header in kept.items()}


def names_before_quantization(names: Iterable[str]) -> set[str]:
    """Returns the names that the weights had before they were stored in a format that is not read."""
    ends = "|".join(_UNREAD.values())
    return {re.sub(rf"({ends})$", ".weight", name) for name in names}


def check_quantized(where: Path, part: str, found: Mapping[str, TensorHeader]) -> None:
    """Refuses tensors in a quantized format that is not read, by its name.

    Args:
        where: file or folder of the tensors, for the message.
        part: "dit", "encoder", "decoder" or "text_encoder".
        found: headers of the part, without the scales that `take_scales` has assigned.

    Raises:
        CheckpointError: there are such tensors.
    """
    kinds = {name: kind for name in found for kind, end in _UNREAD.items() if re.search(f"({end})$", name)}
    for name in found:
        layer, ending = _split(name)
        weight = found.get(f"{layer}.weight")
        if ending in _SCALES and weight is not None and weight.dtype in ("I8", "U8"):
            kinds[name] = "integers with scales"
    for name, kind in kinds.items():
        raise CheckpointError(
            f"{where} is quantized ({kind}, by {name}), which can be neither read nor trained on: use the file in bf16 "
            f"or fp8{_SMALLER.get(part, '')}."
        )


def read_formats(path: Path, names: Mapping[str, TensorHeader]) -> dict[str, str]:
    """Returns the formats of a file's quantized layers from its metadata and notes, by the names in the file.

    Raises:
        CheckpointError: a note is not JSON with a format.
    """
    with safe_open(path, "pt") as file:
        notes: dict[str, Any] = {
            name.removesuffix(_NOTE): bytes(file.get_tensor(name).flatten().to(torch.uint8).tolist())
            for name in names
            if name.endswith(_NOTE) and names[name].path == path
        }
        of_file = (file.metadata() or {}).get("_quantization_metadata")
    try:
        notes = {layer: json.loads(note) for layer, note in notes.items()}
        if of_file is not None:
            notes = dict(json.loads(of_file)["layers"]) | notes
        return {layer: str(note["format"]) for layer, note in notes.items()}
    except (ValueError, TypeError, LookupError, RecursionError):
        raise CheckpointError(f"{path}: its note on quantized layers cannot be read: fetch the file again.") from None


def read_tensor(header: TensorHeader) -> Tensor:
    """Reads a tensor to the CPU; multiplies fp8 by its scale, in fp32."""
    with header.opened() as file:
        tensor = file.get_tensor(header.name)
    if header.dtype not in FP8_DTYPES:
        return tensor
    scale = read_scale(header)
    return tensor.float() if scale is None else tensor.float().mul_(scale)


def read_scale(header: TensorHeader) -> Tensor | None:
    """Reads the scale of an fp8 tensor, fp32 () or (out, 1); returns None if it has none."""
    if header.scale is None:
        return None
    with header.scale.opened() as file:
        scale = file.get_tensor(header.scale.name).float()
    return scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)


def _split(name: str) -> tuple[str, str]:
    layer, dot, ending = name.rpartition(".")
    return layer, dot + ending


def _fits(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    return scale in ((), (1,)) or scale in (weight[:1], (*weight[:1], 1))
