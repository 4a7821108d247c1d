"""Bakes an adapter into the base weights and writes a new weights folder, one tensor at a time."""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mochi_tune.adapters.files import check_adapter, load_adapter
from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.lora import all_linear_shapes
from mochi_tune.adapters.tools import assumed_note, source_of
from mochi_tune.errors import CheckpointError, ConfigError, format_bytes
from mochi_tune.files import temporary_file, write_json
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.layers import hidden_width
from mochi_tune.recipes.new_output import check_new
from mochi_tune.weights.fill import fp32_parameters
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import Pieces, diffusers_map
from mochi_tune.weights.writing import stream_tensors

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_LAYOUTS = ("official", "diffusers")
# Parts of a weights folder besides the DiT, in either layout.
_OTHER_PARTS = (
    "encoder.safetensors", "decoder.safetensors", "vae_config.json", "vae", "text_encoder", "tokenizer", "scheduler",
    "model_index.json",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Settings of a bake.

    Attributes:
        strength: factor of the adapter's change; 1 is as trained.
        to: layout of the new DiT, "official" or "diffusers".
        dtype: dtype of the matrices, "bf16", "fp16" or "fp32"; norms' weights and `pos_frequencies` are always fp32.

    Raises:
        ConfigError: a setting is not possible.
    """

    strength: float = 1.0
    to: str = "official"
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        for key, value, allowed in (("to", self.to, _LAYOUTS), ("dtype", self.dtype, _DTYPES)):
            if value not in allowed:
                raise ConfigError(f"{key}={value} is not possible: use {' or '.join(allowed)}.")
        if not math.isfinite(self.strength):
            raise ConfigError(f"strength={self.strength} does not fit: use a number such as 0.8.")


@dataclass(frozen=True)
class Baked:
    """A new weights folder.

    Attributes:
        folder: the new folder.
        num_changed: number of the DiT's layers that the adapter changed.
        num_bytes: size of the DiT's file.
        others: names of the base's other parts in the folder.
        note: remark on an assumed alpha, see `assumed_note`.
    """

    folder: Path
    num_changed: int
    num_bytes: int
    others: list[str]
    note: str = ""

    def __str__(self) -> str:
        others = f", with the base's {', '.join(self.others)}" if self.others else ""
        size = f"DiT of {format_bytes(self.num_bytes)}"
        return f"{self.folder}: {self.num_changed} layers changed, {size}{others}{self.note}"


def main(adapter: Path | str, base: Path, out: Path, settings: Settings) -> Baked:
    """Writes base + strength * change as a new weights folder; computes in fp32 and rounds once.

    The base's other parts are linked into the folder, or copied if that is not possible.

    Args:
        adapter: an adapter file in any layout.
        base: weights folder that the adapter was trained on.
        out: new folder.
        settings: strength of the adapter, layout and dtype of the new DiT.

    Raises:
        ConfigError: `out` exists, diffusers has no model of these sizes, or the disk is too small.
        CheckpointError: the base or the adapter cannot be read, the adapter was trained on another base, or a value is
            too large for the dtype.
    """
    check_new(out)
    weights = WeightsFolder(base)
    dit = weights.dit_skeleton()
    config = dit.config if settings.to == "official" else diffusers_config(dit.config)
    loaded = load_adapter(adapter)
    identity = weights.base_identity()
    check_adapter(loaded, all_linear_shapes(dit), identity)
    plan = _plan(dit, settings)
    others = [name for name in _OTHER_PARTS if (base / name).exists()]
    with temporary_file(out) as temporary:
        temporary.mkdir(parents=True)
        _check_space(temporary, plan.num_bytes)
        for name in others:
            _link(base / name, temporary / name)
        values = {"official": "dit_config.json", "diffusers": "transformer/config.json"}[settings.to]
        path = {"official": "dit.safetensors", "diffusers": "transformer/diffusion_pytorch_model.safetensors"}
        (temporary / values).parent.mkdir(exist_ok=True)
        write_json(temporary / values, asdict(config) if isinstance(config, DiTConfig) else config)
        tensors = _tensors(weights, plan, loaded.layers, settings.strength)
        stream_tensors(temporary / path[settings.to], plan.layout, tensors)
        record = {"tool": "lora bake", **asdict(settings), "adapter": source_of(loaded), "base_fingerprint": identity}
        write_json(temporary / "baked.json", record)
        os.rename(temporary, out)
    return Baked(out, len(loaded.layers), plan.num_bytes, others, assumed_note(loaded))


def bake_weight(weight: Tensor, layer: LoraLayer, strength: float) -> Tensor:
    """Returns W + strength * (W' - W) in fp32, where W' is the weight with the adapter as trained.

    Source: DoRA, arXiv 2402.09353, equation 5; a row here is a column there.
    """
    change = (layer.b.float() @ layer.a.float()).mul_(layer.scale)
    if layer.magnitude is not None:
        change += weight
        change *= (layer.magnitude.float() / torch.linalg.vector_norm(change, dim=1))[:, None]
        change -= weight
    return change.mul_(strength).add_(weight)


def diffusers_config(config: DiTConfig) -> dict[str, object]:
    """Returns the config.json of a diffusers transformer of the same sizes.

    Source: huggingface/diffusers@v0.42.1 models/transformers/transformer_mochi.py (MochiTransformer3DModel.__init__,
    and the widths inside its feed-forward layers in MochiTransformerBlock).

    Raises:
        ConfigError: diffusers has no model of these sizes.
    """
    theirs = {
        "_class_name": "MochiTransformer3DModel",
        "patch_size": config.patch_size,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.hidden_size_x // config.num_heads,
        "num_layers": config.depth,
        "pooled_projection_dim": config.hidden_size_y,
        "in_channels": config.in_channels,
        "out_channels": None,
        "qk_norm": "rms_norm",
        "text_embed_dim": config.t5_feat_dim,
        "time_embed_dim": 256,
        "activation_fn": "swiglu",
        "max_sequence_length": 256,
    }
    held = DiTConfig(
        config.depth, config.patch_size, config.num_heads, config.hidden_size_x, config.hidden_size_y,
        in_channels=config.in_channels, t5_feat_dim=config.t5_feat_dim,
    )  # fmt: skip
    for dim in (config.hidden_size_x, config.hidden_size_y):
        if config != held or hidden_width(dim, 4.0) != 4 * dim * 2 // 3:
            raise ConfigError(
                f"to=diffusers does not fit: it has no MLP of width {hidden_width(dim, config.mlp_ratio_x)} at "
                f"{dim} features, or other biases than this model: use to=official."
            )
    return theirs


@dataclass(frozen=True)
class _Plan:
    """Content of the new DiT's file.

    Attributes:
        shapes: shape of each tensor by its official name, in the order of writing.
        mapping: pieces of each of these tensors in the new file.
        layout: dtype and shape of each piece by name, in the order of the file.
    """

    shapes: dict[str, tuple[int, ...]]
    mapping: dict[str, Pieces]
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]]

    @property
    def num_bytes(self) -> int:
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.layout.values())


def _plan(dit: AsymmDiT, settings: Settings) -> _Plan:
    fp32, tensors = fp32_parameters(dit), dit.state_dict()
    # `stream_tensors` needs the fp32 tensors first.
    shapes = {name: tuple(tensors[name].shape) for name in sorted(tensors, key=lambda name: name not in fp32)}
    mapping = {name: Pieces((name,)) for name in shapes} if settings.to == "official" else diffusers_map(dit)
    layout = {}
    for name, shape in shapes.items():
        pieces = mapping[name].names
        dtype = torch.float32 if name in fp32 else _DTYPES[settings.dtype]
        layout |= dict.fromkeys(pieces, (dtype, (shape[0] // len(pieces), *shape[1:])))
    return _Plan(shapes, mapping, layout)


def _tensors(
    weights: WeightsFolder, plan: _Plan, layers: dict[str, LoraLayer], strength: float
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of the new file in order; memory holds one official tensor and its change at a time."""
    for name, shape in plan.shapes.items():
        weight = torch.empty(shape)
        weights.read_dit_tensor(name, weight)
        # Checked before the adapter's change, which is not the cause.
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{name}: the base has NaN or infinity: fetch it again.")
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            weight = bake_weight(weight, layer, strength)
        for piece, part in plan.mapping[name].split(weight).items():
            rounded = part.to(plan.layout[piece][0])
            if not torch.isfinite(rounded).all():
                raise CheckpointError(f"{name}: {_why_not_finite(part, rounded.dtype, layer, strength)}.")
            yield piece, rounded


def _why_not_finite(part: Tensor, dtype: torch.dtype, layer: LoraLayer | None, strength: float) -> str:
    if torch.isfinite(part.to(torch.bfloat16)).all():
        return f"a value is too large for the dtype {str(dtype)[6:]}: use dtype=bf16"
    if layer is None:
        return "the base has a value that is too large for any dtype but fp32: use dtype=fp32"
    return f"a value is too large for any dtype with this adapter at strength={strength:g}: use a smaller one"


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConfigError(
            f"out: its disk has {free / 2**30:.1f} GiB free, and the DiT needs {num_bytes / 2**30:.1f} GiB: free some "
            "space, or choose another disk."
        )


def _link(source: Path, target: Path) -> None:
    """Links a file or the files of a folder, or copies them to another disk."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
    else:
        _link_file(source, target)


def _link_file(source: Path | str, target: Path | str) -> None:
    # The hub's cache holds symbolic links; link their targets.
    real = os.path.realpath(source)
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)
