"""Metadata of adapter files for other programs: the keys of ModelSpec and of kohya.

Source: Stability-AI/ModelSpec@fe8dc60 README.md, which is version 1.0.1 and gives 1.0.0 as what files say;
kohya-ss/sd-scripts@48d368f library/train_util.py (SS_METADATA_KEY_*), networks/resize_lora.py ("Dynamic").
"""

import hashlib
import itertools
from collections.abc import Mapping

from torch import Tensor

from mochi_tune.adapters.layers import LoraLayer, kind_of
from mochi_tune.files import safetensors_parts

_PREFIX = "modelspec."
HASH_KEY = f"{_PREFIX}hash_sha256"
# Keys that a user or a run sets; every conversion carries them over.
_GIVEN_KEYS = ("title", "author", "description", "license", "trigger_phrase", "resolution", "date", "tags")
# Keys that depend on the file; a conversion does not carry them over.
COMPUTED_KEYS = (
    *(f"{_PREFIX}{key}" for key in ("sai_model_spec", "architecture", "implementation")),
    HASH_KEY,
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_base_model_version"),
    *("sshs_model_hash", "sshs_legacy_hash"),
)
_OFFICIAL_BASE = "genmo/mochi-1-preview"
_OFFICIAL_NAMES = ("mochi_1", "mochi-1", "mochi-1-preview", "mochi_1_preview", _OFFICIAL_BASE)
# (out, in) of the layers of Mochi 1, which identify a file that does not name its base.
_OFFICIAL_SHAPES = {
    "attn.qkv_x": (9216, 3072), "attn.qkv_y": (9216, 1536), "attn.proj_x": (3072, 3072), "attn.proj_y": (1536, 3072),
    "mlp_x.w1": (16384, 3072), "mlp_x.w2": (3072, 8192), "mlp_y.w1": (8192, 1536), "mlp_y.w2": (1536, 4096),
}  # fmt: skip
# SwarmUI's identifier of Mochi 1. Source: mcmonkeyprojects/SwarmUI@652e068 src/Text2Image/T2IModelClassSorter.cs.
_ARCHITECTURE = "genmo-mochi-1"
# Repositories whose names the keys of a file have.
_OFFICIAL_CODE, _DIFFUSERS_CODE = "https://github.com/genmoai/mochi", "https://github.com/huggingface/diffusers"


def official_base(metadata: Mapping[str, str], layers: Mapping[str, LoraLayer]) -> str | None:
    """Returns the name on the hub of Mochi 1 if it is the base of an adapter, else None.

    Args:
        metadata: metadata of the adapter; `base_model` names the base.
        layers: layers of the adapter by official name; their shapes decide if the metadata names no base.
    """
    name = metadata.get("base_model")
    is_official = name in _OFFICIAL_NAMES if name else has_official_shapes(layers)
    return _OFFICIAL_BASE if is_official else None


def has_official_shapes(layers: Mapping[str, LoraLayer]) -> bool:
    """Whether the layers of the blocks have the sizes of Mochi 1."""
    known = [(kind_of(name), layer) for name, layer in layers.items() if kind_of(name) in _OFFICIAL_SHAPES]
    return bool(known) and all(_OFFICIAL_SHAPES[kind] == layer.shape for kind, layer in known)


def modelspec(metadata: Mapping[str, str], layers: Mapping[str, LoraLayer], to: str) -> dict[str, str]:
    """Returns the ModelSpec metadata of a file without the hash.

    It has no `prediction_type` and `timestep_range`, because programs interpret them as those of Stable Diffusion.

    Args:
        metadata: metadata of the adapter. Its ModelSpec keys are kept; the title is by default the name of the run.
        layers: layers of the adapter by official name.
        to: layout of the file.
    """
    architecture = _ARCHITECTURE if has_official_shapes(layers) else metadata.get("base_model", "mochi")
    given = {f"{_PREFIX}{key}": metadata.get(f"{_PREFIX}{key}") for key in _GIVEN_KEYS}
    return {
        f"{_PREFIX}sai_model_spec": "1.0.0",
        f"{_PREFIX}architecture": f"{architecture}/lora",
        f"{_PREFIX}implementation": _DIFFUSERS_CODE if to == "diffusers" else _OFFICIAL_CODE,
        f"{_PREFIX}title": metadata.get("name") or "LoRA",
        **{key: value for key, value in given.items() if value},
    }


def kohya_metadata(
    metadata: Mapping[str, str], layers: Mapping[str, LoraLayer], written: Mapping[str, LoraLayer]
) -> dict[str, str]:
    """Returns the metadata that tools of kohya's format show: rank, alpha, kind of network and base.

    Args:
        metadata: metadata of the adapter.
        layers: layers of the adapter by official name.
        written: the layers as they are in the file.
    """

    def shown(values: set[float]) -> str:
        # kohya's value for a file whose layers differ.
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": shown({layer.rank for layer in written.values()}),
        "ss_network_alpha": shown({layer.alpha for layer in written.values()}),
        "ss_base_model_version": _ARCHITECTURE if has_official_shapes(layers) else metadata.get("base_model", "mochi"),
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns ModelSpec's hash of a file: "0x" and the sha256 of all bytes after the header."""
    digest = hashlib.sha256()
    for part in itertools.islice(safetensors_parts(tensors, None), 1, None):
        digest.update(part)
    return f"0x{digest.hexdigest()}"
