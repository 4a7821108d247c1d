"""Refuses adapters of other models by the base that they name; their keys and shapes can be the same as Mochi's.

The attention layers of CogVideoX-5b have the names and sizes of those of Mochi's visual stream, in 42 blocks.
Source: huggingface/diffusers@v0.42.1 models/transformers/cogvideox_transformer_3d.py (CogVideoXBlock), and
huggingface.co/THUDM/CogVideoX-5b transformer/config.json (48 heads of 64, 42 layers).
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mochi_tune.adapters.alphas import PEFT_CONFIG, is_ours
from mochi_tune.adapters.layers import LoraLayer, block_of, kind_of
from mochi_tune.adapters.modelspec import has_official_shapes
from mochi_tune.adapters.notes import notify
from mochi_tune.errors import CheckpointError, printable
from mochi_tune.files import read_json

_FAMILIES = {
    "CogVideoX": r"cogvideo",
    "Wan": r"wan(?=video|x?([\W\d_]|$))",
    "HunyuanVideo": r"hunyuan",
    "FLUX": r"flux",
    "Stable Diffusion": r"stable[-_ ]?diffusion|sdxl|sd[-_ ]?v?[123](?!\d)",
    "LTX-Video": r"ltx",
    "Qwen-Image": r"qwen",
    "Z-Image": r"z[-_ ]?image",
    "SkyReels": r"skyreels",
    "Open-Sora": r"open[-_ ]?sora",
    "PixArt": r"pixart",
    "HiDream": r"hidream",
}
_MOCHI = "mochi"
_PEFT_KEY = "base_model_name_or_path"
# Metadata keys of ModelSpec and of kohya's tools that name the base.
_NAMING_KEYS = ("modelspec.architecture", "ss_base_model_version")
_COGVIDEOX_BLOCKS = 42


def check_base(adapter: str, names: Mapping[str, str]) -> None:
    """Refuses an adapter if all bases that it names are known to be other models than Mochi.

    Args:
        adapter: name of the adapter for the message.
        names: names of the bases, by the place that states them.

    Raises:
        CheckpointError: there are such bases, and all are other models.
    """
    families = {where: _family(name) for where, name in names.items()}
    if families and all(families.values()):
        where, family = next(iter(families.items()))
        raise CheckpointError(
            f"{adapter} is one of {family}, {where} says {printable(names[where])[:80]}: use an adapter of Mochi 1."
        )


def stated_bases(metadata: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Returns the bases that a file and the peft config next to it name, by place.

    Args:
        metadata: metadata of the file. For a file of mochi-tune the result is empty.
        folder: folder of the file.
    """
    if is_ours(metadata):
        return {}
    stated = {f"its metadata `{key}`": metadata[key] for key in _NAMING_KEYS if metadata.get(key)}
    config = read_json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).exists() else {}
    try:
        saved = json.loads(metadata.get("lora_adapter_metadata", ""))
    except (ValueError, RecursionError):
        saved = None
    places = {f"its metadata `{_PEFT_KEY}`": metadata, "its metadata `lora_adapter_metadata`": saved}
    for where, values in (places | {f"{PEFT_CONFIG} next to it": config}).items():
        for key in (_PEFT_KEY, f"transformer.{_PEFT_KEY}") if isinstance(values, Mapping) else ():
            name = values.get(key)
            # The path of a local model does not name the base.
            if isinstance(name, str) and re.fullmatch(r"\w[^/\\:]*(/[^/\\]+)?", name):
                stated[where] = name.rpartition("/")[2]
    return stated


def hub_bases(tags: Iterable[str] | None) -> dict[str, str]:
    """Returns the bases that a repository's tags name, "base_model:OWNER/NAME" or "base_model:adapter:OWNER/NAME"."""
    named = [tag.rpartition(":")[2] for tag in tags or () if tag.startswith("base_model:")]
    return {f"its page on the hub, of {name},": name.rpartition("/")[2] for name in named}


def note_lookalike(adapter: str, metadata: Mapping[str, str], layers: Mapping[str, LoraLayer]) -> None:
    """Gives a notice if an adapter that does not name Mochi could be one of CogVideoX-5b."""
    blocks = {block_of(name) for name in layers}
    has_text = any("_y" in kind_of(name) for name in layers)
    if blocks != set(range(_COGVIDEOX_BLOCKS)) or has_text or not has_official_shapes(layers):
        return
    if not any(_MOCHI in value.lower() for value in metadata.values()):
        notify(
            f"{adapter} has the blocks 0 to 41 and no text layers, as an adapter of CogVideoX-5b has, and nothing "
            "names its base: make sure that it is one of Mochi 1"
        )


def _family(name: str) -> str | None:
    """Returns the family of models that a name belongs to, or None for Mochi and for unknown names."""
    text = name.lower()
    if _MOCHI in text:
        return None
    return next((family for family, words in _FAMILIES.items() if re.search(rf"(?<![a-z])({words})", text)), None)
