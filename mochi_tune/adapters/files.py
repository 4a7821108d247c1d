"""Reads and writes adapter files; every layout holds the same change of the weights.

| layout    | keys                                                      | where alpha is                            |
| --------- | --------------------------------------------------------- | ----------------------------------------- |
| native    | blocks.0.attn.qkv_x.lora_A, blocks.0.mlp_x.w1.lora_B      | `.alpha` tensors, and metadata `alphas`   |
| official  | the same, all attention layers and nothing else           | metadata `kwargs`: JSON, one for a group  |
| diffusers | transformer.transformer_blocks.0.attn1.to_q.lora_A.weight | in the weights, alpha = rank              |
| comfyui   | native keys                                               | in the weights, alpha = rank              |
| kohya     | lora_unet_blocks_0_attn_qkv_x.lora_down.weight, .lora_up  | `.alpha` tensors                          |

The module `keys` lists the keys that are read, and `alphas` the places of alpha. kohya's keys are official names with
underscores, by which ComfyUI finds its modules.
Source: Comfy-Org/ComfyUI@17358c8 comfy/lora.py (model_lora_keys_unet).

In memory, layers have official names and are fp32. Every export except the native one has alpha / rank multiplied into
B, so that a runtime computes the same weights whether or not it reads an alpha. ComfyUI reads the `.alpha` tensors of a
native file. The reference, which loads adapters with strict=False, ignores them.
Source: genmoai/mochi@0c86aeb src/genmo/mochi_preview/pipelines.py (DitModelFactory), demos/cli.py (strict_load).

The magnitudes of a DoRA are `LAYER.lora_magnitude` in native files and `MODULE.lora_magnitude_vector` in those of
diffusers. The official layout has none. ComfyUI's `dora_scale` divides by the norms of the base's rows, not of the
adapted rows: magnitude * |W| / |W + scale * B A|, by rows, would render exactly what was trained. Its open pull request
15458 divides by the adapted rows, which changes the meaning of a file. Until this is settled, none is written.
Source: comfyanonymous/ComfyUI@9c0cf36 comfy/weight_adapter/base.py (weight_decompose); Comfy-Org/ComfyUI pull 15458.
"""

import difflib
import json
import re
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch

from mochi_tune.adapters.alphas import ALPHA_KEYS, ASSUMED, is_ours, is_split, source_words
from mochi_tune.adapters.layers import (
    LAST_MOD_Y,
    TEXT_UPDATE_KINDS,
    LoraLayer,
    bake,
    block_of,
    check_layer,
    complete_layers,
    drop_padding,
    fuse_layers,
    is_attention_or_mlp,
    is_official,
    kind_of,
    official_names,
    pad_rank,
    round_tensor,
    some,
    split_layers,
)
from mochi_tune.adapters.modelspec import (
    COMPUTED_KEYS,
    HASH_KEY,
    has_official_shapes,
    kohya_metadata,
    modelspec,
    tensors_sha256,
)
from mochi_tune.adapters.other_bases import check_base, note_lookalike, stated_bases
from mochi_tune.adapters.reading import read_layers
from mochi_tune.adapters.resolve import find_adapter_file
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.files import save_tensors

__all__ = ["FORMATS", "Adapter", "LoraLayer", "check_adapter", "check_format", "load_adapter", "save_adapter"]

# Number of blocks of Mochi 1.
_OFFICIAL_BLOCKS = 48
FORMATS = ("official", "diffusers", "comfyui", "kohya", "native")
_OTHER_NAMES = {"genmo": "official", "mochi": "official", "peft": "diffusers", "hf": "diffusers", "a1111": "kohya"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Metadata of one layout, which a conversion does not carry over.
_LAYOUT_METADATA = ("format", *ALPHA_KEYS, *COMPUTED_KEYS)


@dataclass
class Adapter:
    """A LoRA, independent of the layout that it was read from.

    Attributes:
        layers: layers by official module name, such as "blocks.0.attn.qkv_x".
        metadata: facts about its origin, which every conversion carries over. `rank` is that of the training, and so
            are `alpha` and `rslora` until an export multiplies them into the weights.
        path, sha256: file that it was read from and the sha256 of what was read; None and "" without a file.
        alpha, alpha_source: alpha as the file states it, "4,8" if layers differ, and where; "" without a file.
    """

    layers: dict[str, LoraLayer]
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None
    alpha: str = ""
    alpha_source: str = ""
    sha256: str = ""

    def __str__(self) -> str:
        return f"adapter {self.path}" if self.path else "the adapter"

    @property
    def is_dora(self) -> bool:
        """Whether its layers have magnitudes."""
        return any(layer.magnitude is not None for layer in self.layers.values())

    @property
    def alpha_note(self) -> str:
        """The alpha and its source, in words for the user."""
        if self.alpha_source != ASSUMED:
            return f"alpha {self.alpha} ({source_words(self.alpha_source)})"
        return f"alpha is {ASSUMED}: adapter_alpha=N of `sample` and `export` sets another one"


class LaidOut(NamedTuple):
    """The content of an adapter file: the layers before rounding, by their names in the file; tensors and metadata."""

    layers: dict[str, LoraLayer]
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, str]


def check_format(to: str) -> None:
    """Refuses an unknown layout, and names the one that is probably meant.

    Raises:
        ConfigError: `to` is not one of FORMATS.
    """
    if to not in FORMATS:
        near = _OTHER_NAMES.get(to) or next(iter(difflib.get_close_matches(to, FORMATS, n=1)), "one of these")
        raise ConfigError(f"to={to} is not an adapter format; those are {', '.join(FORMATS)}: use {near}.")


def check_adapter(adapter: Adapter, shapes: dict[str, tuple[int, int]], base_fingerprint: str | None) -> None:
    """Refuses an adapter that was trained on another base.

    Args:
        adapter: adapter to be applied.
        shapes: (out, in) of every Linear of the base, by official name.
        base_fingerprint: fingerprint of the base's weights; compared if the adapter states one.

    Raises:
        CheckpointError: the base has no such layer or another size of it, or the fingerprints differ.
    """
    wrong = []
    for name, layer in adapter.layers.items():
        if name not in shapes:
            wrong.append(f"the base has no {name}")
        elif layer.shape != tuple(shapes[name]):
            wrong.append(f"{name} is {_size(layer.shape)}, in the base {_size(shapes[name])}")
    trained_on = adapter.metadata.get("base_fingerprint")
    # The fingerprint of a base in fp8 or fp16, "F8_E4M3:...", is that of rounded weights, unlike those of other dtypes.
    if (
        trained_on
        and base_fingerprint
        and trained_on != base_fingerprint
        and dtype_of(trained_on) == dtype_of(base_fingerprint)
    ):
        wrong.insert(0, f"base_fingerprint is {short(trained_on)}, this base's is {short(base_fingerprint)}")
    if wrong:
        raise CheckpointError(
            f"{adapter} was trained on another base: {some(wrong, '; ')}: use the weights that it was trained on."
        )


def short(fingerprint: str) -> str:
    """Returns the first digits of a fingerprint, enough to tell it from others, with its dtype if it has one."""
    dtype, colon, digits = fingerprint.rpartition(":")
    return dtype + colon + digits[:12]


def load_adapter(path: Path | str, alpha: float | None = None) -> Adapter:
    """Loads an adapter of any layout, which its keys and metadata identify.

    Components that are 0 in both halves, which exports add as padding, are dropped. `fuse_layers` turns the separate
    q, k and v of diffusers into fused layers.

    Args:
        path: a file, a folder, or "hub:owner/name", see `find_adapter_file`.
        alpha: alpha of all layers of a file that states none; None means alpha = rank.

    Raises:
        CheckpointError: the file does not exist, is not safetensors (pickles are never opened) or is an adapter of
            another model or kind, keys are unknown or missing, alphas contradict each other or do not fit, weights are
            not finite, or all weights are 0.
    """
    path = find_adapter_file(path)
    trained, metadata, source, sha256 = read_layers(path, alpha)
    check_base(f"adapter {path}", stated_bases(metadata, path.parent))
    is_export = is_ours(metadata) and metadata.get("format") != "mochi-tune"
    # The weights of an export include alpha / rank. The metadata of other programs need not describe the layers.
    untrue = ("alpha", "rslora") if is_export else () if is_ours(metadata) else ("rank", "alpha", "targets")
    carried = {key: value for key, value in metadata.items() if key not in (*_LAYOUT_METADATA, *untrue)}
    try:
        layers = fuse_layers(trained) if is_split(trained) else trained
        carried |= _depth_by_names(trained, metadata)
    except CheckpointError as error:
        raise CheckpointError(f"adapter {path}: {error}") from error
    layers = {name: kept for name, layer in layers.items() if (kept := drop_padding(layer)).rank}
    if not layers:
        raise CheckpointError(f"adapter {path} holds nothing but zeros, so it changes nothing: use another file.")
    note_lookalike(f"adapter {path}", metadata, layers)
    described = _describe(layers, trained if is_split(trained) else layers)
    # The padding of an export has been dropped, and its alpha with it.
    own = _describe(layers, layers) if is_export else described
    return Adapter(layers, {**own, **carried}, path, described["alpha"], source, sha256)


def _depth_by_names(trained: dict[str, LoraLayer], metadata: dict[str, str]) -> dict[str, str]:
    """Returns metadata with the base's number of blocks if a diffusers name of the last block reveals it, else {}."""
    depths = {str(block_of(name) + 1) for name in trained if kind_of(name) == LAST_MOD_Y}
    if not depths:
        return {}
    if len(depths | ({metadata["num_blocks"]} if "num_blocks" in metadata else set())) > 1:
        raise CheckpointError(f"{LAST_MOD_Y} is only in the last block, and others have it: fetch the file again.")
    return {"num_blocks": depths.pop()}


def save_adapter(
    path: Path | str, adapter: Adapter, to: str = "native", dtype: torch.dtype = torch.float32
) -> dict[str, LoraLayer]:
    """Writes an adapter file atomically, and returns its layers; see `lay_out`.

    Args:
        path: file to write or replace; its folder exists.
        adapter: the adapter.
        to: the layout, as in `lay_out`, which also has the errors.
        dtype: dtype of the tensors.
    """
    layers, tensors, metadata = lay_out(adapter, to, dtype)
    save_tensors(Path(path), tensors, metadata, durable=True)
    return layers


def lay_out(adapter: Adapter, to: str, dtype: torch.dtype) -> LaidOut:
    """Returns the content of an adapter's file; the change of the weights is the same in every layout.

    Args:
        adapter: adapter with layers on any device and in any float dtype.
        to: layout, one of FORMATS; the number of layers, their ranks and alphas can differ from those of the adapter.
        dtype: dtype of the tensors in the file; fp32 values, which include alpha / rank, are rounded to it once.

    Raises:
        ConfigError: `to` is unknown.
        CheckpointError: a layer is damaged or does not fit the layout or the dtype, or the adapter has no layers.
    """
    check_format(to)
    unknown = [name for name in adapter.layers if not is_official(name)]
    if unknown or not adapter.layers:
        raise CheckpointError(
            f"{adapter} cannot be written, its layers are {some(unknown) or 'none'}: "
            "the formats know the Linear layers of the official model."
        )
    for name, layer in adapter.layers.items():
        check_layer(name, layer)
    layers, layout_metadata = _lay_out(adapter, to)
    keys = ("lora_A", "lora_B", "lora_magnitude")
    if to == "diffusers":
        keys = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    elif to == "kohya":
        keys = ("lora_down.weight", "lora_up.weight", "")
    tensors = {}
    for name, layer in layers.items():
        for key, tensor in zip(keys, (layer.a, layer.b, layer.magnitude), strict=True):
            if tensor is not None:
                tensors[f"{name}.{key}"] = round_tensor(name, tensor, dtype)
        if to in ("kohya", "native"):
            tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    carried = {key: value for key, value in adapter.metadata.items() if key not in _LAYOUT_METADATA}
    if to != "native":
        carried = {key: value for key, value in carried.items() if key != "rslora"}
        layout_metadata["alpha"] = _describe(layers, layers)["alpha"]
    metadata = {**_describe(adapter.layers, adapter.layers), **carried, **layout_metadata}
    metadata |= modelspec(metadata, adapter.layers, to) | {HASH_KEY: tensors_sha256(tensors)}
    metadata |= {"format": "mochi-tune" if to == "native" else to, "created_by": f"mochi-tune {version('mochi-tune')}"}
    return LaidOut(layers, tensors, metadata)


def _lay_out(adapter: Adapter, to: str) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    """Returns the layers with the names and ranks of a layout, and the metadata of that layout."""
    if to == "native":
        layers = adapter.layers
        metadata = {"alphas": json.dumps({name: layer.alpha for name, layer in layers.items()})}
        num_blocks, kwargs = _num_blocks(adapter), _official_kwargs(layers)
        # If the official loader can read the layers as they are, the file has the metadata that it needs.
        if num_blocks and kwargs and layers.keys() == set(official_names(num_blocks)):
            metadata["kwargs"] = kwargs
        return layers, metadata
    if adapter.is_dora and to != "diffusers":
        raise CheckpointError(
            f"{adapter} is a DoRA, and {to} has no form that renders what was trained: use to=diffusers, or train with "
            "lora.dora=false."
        )
    if to == "official":
        return _lay_out_official(adapter)
    if to == "diffusers":
        # One rank for all modules: before 0.42, diffusers takes the rank of the first module as alpha of all.
        rank = max(layer.rank for layer in adapter.layers.values())
        modules = split_layers(adapter.layers, _depth_for_names(adapter))
        return {f"transformer.{name}": pad_rank(module, rank) for name, module in modules.items()}, {}
    layers = {name: bake(layer) for name, layer in adapter.layers.items()}
    if to == "kohya":
        layers = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in layers.items()}
        return layers, kohya_metadata(adapter.metadata, adapter.layers, layers)
    return layers, {}


def _lay_out_official(adapter: Adapter) -> tuple[dict[str, LoraLayer], dict[str, str]]:
    if others := [name for name in adapter.layers if ".attn." not in name]:
        what = "MLP" if all(map(is_attention_or_mlp, others)) else "such"
        raise CheckpointError(
            f"the official format has no {what} layers, {adapter} has {some(others)}: use to=diffusers or to=comfyui."
        )
    num_blocks = _num_blocks(adapter)
    if num_blocks is None:
        raise CheckpointError(
            f"the official format holds every block of the base, and {adapter} has no num_blocks in its metadata: "
            "export the file that was trained, or use to=diffusers or to=comfyui."
        )
    if alien := sorted(adapter.layers.keys() - set(official_names(num_blocks))):
        raise CheckpointError(
            f"{adapter} has {some(alien)}, but a base of num_blocks={num_blocks} has not: correct it."
        )
    layers = complete_layers(adapter.layers, num_blocks)
    kwargs = _official_kwargs(layers)
    assert kwargs is not None, "complete layers have one rank and alpha a group"
    return layers, {"kwargs": kwargs, "num_blocks": str(num_blocks)}


def _official_kwargs(layers: dict[str, LoraLayer]) -> str | None:
    """Returns the official loader's settings, or None where the ranks or alphas within a group differ."""
    kwargs = {}
    for group, ours in (("qkv", ".qkv_"), ("out", ".proj_")):
        pairs = {(layer.rank, layer.alpha) for name, layer in layers.items() if ours in name}
        if len(pairs) != 1:
            return None
        rank, alpha = pairs.pop()
        kwargs |= {f"{group}_proj_lora_rank": rank, f"{group}_proj_lora_alpha": alpha}
        kwargs[f"{group}_proj_lora_dropout"] = 0.0
    return json.dumps(kwargs)


def _depth_for_names(adapter: Adapter) -> int | None:
    """Returns the base's depth if diffusers' names depend on it, as those of text modulations do, else None."""
    if not any(kind_of(name) == "mod_y" for name in adapter.layers):
        return None
    if "num_blocks" not in adapter.metadata:
        raise CheckpointError(
            f"{adapter} has text modulations (mod_y), whose name in diffusers differs in the last block, but no "
            "num_blocks in its metadata: use to=comfyui."
        )
    return _num_blocks(adapter)


def _num_blocks(adapter: Adapter) -> int | None:
    """Returns the base's depth from the metadata, else that of Mochi 1 for layers of its sizes, else from the names.

    It is None if the names show that the base has more blocks than the adapter.
    """
    stated = adapter.metadata.get("num_blocks")
    if stated is None and has_official_shapes(adapter.layers):
        # An adapter of Mochi 1 may have only some of its blocks.
        return _OFFICIAL_BLOCKS
    if stated is None:
        last = max(block_of(name) for name in adapter.layers)
        updates_text = any(block_of(name) == last and kind_of(name) in TEXT_UPDATE_KINDS for name in adapter.layers)
        return None if updates_text else last + 1
    if not re.fullmatch(r"[1-9]\d{0,2}", stated):
        raise CheckpointError(f"{adapter} says num_blocks={stated}, which must be 1 to 999: correct its metadata.")
    return int(stated)


def _describe(layers: dict[str, LoraLayer], trained: dict[str, LoraLayer]) -> dict[str, str]:
    """Returns metadata computed from layers; the adapter's own metadata takes precedence."""
    ranks = sorted({layer.rank for layer in trained.values()})
    alphas = sorted({layer.alpha for layer in trained.values()})
    targets = sorted({kind_of(name) for name in layers})
    return {
        "rank": ",".join(map(str, ranks)),
        "alpha": ",".join(f"{alpha:g}" for alpha in alphas),
        "targets": ",".join(targets),
    }


def dtype_of(fingerprint: str) -> str:
    """Returns the dtype that a fingerprint starts with, or "" if it has none."""
    return fingerprint.rpartition(":")[0]


def _size(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"
