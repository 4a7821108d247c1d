"""What an adapter file says of itself to other programs: the keys of ModelSpec, and kohya's.

Source: Stability-AI/ModelSpec@fe8dc60 README.md, which is version 1.0.1 and gives 1.0.0 as what files say;
kohya-ss/sd-scripts@48d368f library/train_util.py (SS_METADATA_KEY_*), networks/resize_lora.py ("Dynamic").
"""

import hashlib
import itertools
from collections.abc import Mapping

from torch import Tensor

from mochi_tune.adapters.layers import LoraLayer, kind_of
from mochi_tune.files import safetensors_parts

PREFIX = "modelspec."
HASH_KEY = f"{PREFIX}hash_sha256"
# What a user or a run says; every conversion carries these on.
GIVEN_KEYS = ("title", "author", "description", "license", "trigger_phrase", "resolution", "date", "tags")
# What depends on the file, and is never carried into another one.
COMPUTED_KEYS = (
    *(f"{PREFIX}{key}" for key in ("sai_model_spec", "architecture", "implementation")),
    HASH_KEY,
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_base_model_version"),
    *("sshs_model_hash", "sshs_legacy_hash"),
)
OFFICIAL_BASE = "genmo/mochi-1-preview"
_OFFICIAL_NAMES = ("mochi_1", "mochi-1", "mochi-1-preview", "mochi_1_preview", OFFICIAL_BASE)
# (out, in) of layers of Mochi 1, by which a file without a name of its base is known.
_OFFICIAL_SHAPES = {
    "attn.qkv_x": (9216, 3072), "attn.qkv_y": (9216, 1536), "attn.proj_x": (3072, 3072), "attn.proj_y": (1536, 3072),
    "mlp_x.w1": (16384, 3072), "mlp_x.w2": (3072, 8192), "mlp_y.w1": (8192, 1536), "mlp_y.w2": (1536, 4096),
}  # fmt: skip
# SwarmUI's identifier of Mochi 1. Source: mcmonkeyprojects/SwarmUI@652e068 src/Text2Image/T2IModelClassSorter.cs.
_ARCHITECTURE = "genmo-mochi-1"
# The code whose names the keys have.
_OFFICIAL_CODE, _DIFFUSERS_CODE = "https://github.com/genmoai/mochi", "https://github.com/huggingface/diffusers"


def official_base(metadata: Mapping[str, str], layers: Mapping[str, LoraLayer]) -> str | None:
    """Returns the hub's name of the base where an adapter is one of Mochi 1, else None.

    Args:
        metadata: of the adapter; its `base_model` decides where it has one.
        layers: of the adapter, by official name; where no base is named, their shapes decide.
    """
    name = metadata.get("base_model")
    is_official = name in _OFFICIAL_NAMES if name else has_official_shapes(layers)
    return OFFICIAL_BASE if is_official else None


def has_official_shapes(layers: Mapping[str, LoraLayer]) -> bool:
    """Whether the layers of the blocks are as large as in Mochi 1."""
    known = [(kind_of(name), layer) for name, layer in layers.items() if kind_of(name) in _OFFICIAL_SHAPES]
    return bool(known) and all(_OFFICIAL_SHAPES[kind] == layer.shape for kind, layer in known)


def modelspec(metadata: Mapping[str, str], layers: Mapping[str, LoraLayer], to: str) -> dict[str, str]:
    """Returns the ModelSpec keys of a file, but for the hash.

    `prediction_type` and `timestep_range` are left out: programs read them as Stable Diffusion's.

    Args:
        metadata: of the adapter. Those of GIVEN_KEYS in it are kept; the title is by default the run's name.
        layers: of the adapter, by official name.
        to: layout of the file.
    """
    architecture = _ARCHITECTURE if has_official_shapes(layers) else metadata.get("base_model", "mochi")
    given = {f"{PREFIX}{key}": metadata.get(f"{PREFIX}{key}") for key in GIVEN_KEYS}
    return {
        f"{PREFIX}sai_model_spec": "1.0.0",
        f"{PREFIX}architecture": f"{architecture}/lora",
        f"{PREFIX}implementation": _DIFFUSERS_CODE if to == "diffusers" else _OFFICIAL_CODE,
        f"{PREFIX}title": metadata.get("name") or "LoRA",
        **{key: value for key, value in given.items() if value},
    }


def kohya_metadata(
    metadata: Mapping[str, str], layers: Mapping[str, LoraLayer], written: Mapping[str, LoraLayer]
) -> dict[str, str]:
    """Returns what tools of kohya's format show: rank and alpha of the file, its kind, and its base.

    Args:
        metadata: of the adapter.
        layers: of the adapter, by official name.
        written: the same as they are in the file.
    """

    def shown(values: set[float]) -> str:
        # kohya's word for a file whose layers differ.
        return f"{values.pop():g}" if len(values) == 1 else "Dynamic"

    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": shown({layer.rank for layer in written.values()}),
        "ss_network_alpha": shown({layer.alpha for layer in written.values()}),
        "ss_base_model_version": _ARCHITECTURE if has_official_shapes(layers) else metadata.get("base_model", "mochi"),
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Returns ModelSpec's hash of a file's content: 0x, and the sha256 of all bytes behind its header."""
    digest = hashlib.sha256()
    for part in itertools.islice(safetensors_parts(tensors, None), 1, None):
        digest.update(part)
    return f"0x{digest.hexdigest()}"
