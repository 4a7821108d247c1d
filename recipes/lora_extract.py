"""Extracts an adapter from the difference between two checkpoints, one tensor at a time."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mochi_tune.adapters.files import Adapter
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.adapters.low_rank import approximate, relative
from mochi_tune.adapters.tools import Errors
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.recipes.lora_tools import Made, save_new
from mochi_tune.recipes.new_output import check_new_file
from mochi_tune.weights.files import has_part
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import WeightsPaths

# Prefixes of the names of a block's Linears.
_TARGETS = {"attention": ("attn.",), "attention_mlp": ("attn.", "mlp_x.", "mlp_y.")}


@dataclass(frozen=True)
class Extracted(Made):
    """An adapter made from two checkpoints.

    Attributes:
        not_held: tensors that differ but are not in the adapter, with the norm of the difference relative to that of
            the base's tensor.
    """

    not_held: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def main(base: Path, tuned: Path, out: Path, rank: int, targets: str = "attention_mlp") -> Extracted:
    """Approximates the difference between two checkpoints by an adapter.

    Args:
        base: weights folder that the adapter is for.
        tuned: weights folder of a model of the same sizes, in any layout.
        out: new .safetensors file.
        rank: rank of each layer, at least 1.
        targets: Linears of the blocks to extract, "attention" or "attention_mlp".

    Raises:
        ConfigError: a setting is not possible, or `out` exists.
        CheckpointError: a checkpoint cannot be read, the sizes differ, no layer differs, or a weight is not finite.
    """
    if targets not in _TARGETS:
        raise ConfigError(f"targets={targets} is not possible: use {' or '.join(_TARGETS)}.")
    if rank < 1:
        raise ConfigError(f"rank={rank} does not fit: it takes a whole number of at least 1.")
    check_new_file(out, ".safetensors")
    for key, path in (("base", base), ("tuned", tuned)):
        if not has_part(WeightsPaths(path), "dit"):
            raise CheckpointError(f"{key}={path} has no DiT: name a folder or a file of weights.")
    folders = WeightsFolder(base), WeightsFolder(tuned)
    dit = folders[0].dit_skeleton()
    shapes = _shapes(dit)
    if shapes != _shapes(folders[1].dit_skeleton()):
        raise CheckpointError(f"base={base} and tuned={tuned} are models of other sizes: use two of one size.")
    held = {
        f"{name}.weight": name for name in linear_shapes(dit) if name.split(".", 2)[2].startswith(_TARGETS[targets])
    }
    layers, left_out, norms, not_held = {}, {}, {}, {}
    for name, shape in shapes.items():
        change, size = _difference(folders, name, shape)
        norm = _norm(change)
        if not math.isfinite(norm):
            raise CheckpointError(f"{name} holds NaN or infinity in base={base} or tuned={tuned}: use other weights.")
        if norm and name in held:
            layers[held[name]], left_out[held[name]] = approximate(change, rank)
            norms[held[name]] = norm
        elif norm:
            not_held[name] = relative(norm, size)
    if not layers:
        raise CheckpointError(f"base={base} and tuned={tuned} are equal in each layer of targets={targets}.")
    errors = Errors.of(left_out, norms)
    sources = [{"base": base.name}, {"tuned": tuned.name, "fingerprint": folders[1].fingerprint("dit")}]
    adapter = Adapter(
        layers,
        {
            "base_fingerprint": folders[0].base_identity(),
            "num_blocks": str(dit.config.depth),
            "tool": "lora extract",
            "sources": json.dumps(sources),
            "relative_error": f"{errors.total:.3g}",
        },
    )
    save_new(out, adapter)
    note = f"; {len(not_held)} other tensors differ and are not held" if not_held else ""
    return Extracted(out, adapter, errors, note, not_held)


def _shapes(dit: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in dit.state_dict().items()}


def _difference(folders: Sequence[WeightsFolder], name: str, shape: tuple[int, ...]) -> tuple[Tensor, float]:
    """Returns a tensor of the second folder minus that of the first, in fp32, and the norm of the first."""
    base, tuned = torch.empty(shape), torch.empty(shape)
    for folder, out in zip(folders, (base, tuned), strict=True):
        folder.read_dit_tensor(name, out)
    return tuned.sub_(base), _norm(base)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
