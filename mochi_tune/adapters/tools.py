"""Measures, merges, resizes and compares adapters, one layer at a time."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mochi_tune.adapters.alphas import ASSUMED
from mochi_tune.adapters.files import Adapter, dtype_of, short
from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.low_rank import (
    Limit,
    change_norm,
    effective_rank,
    inner_product,
    relative,
    singular_values,
    stack_layers,
    truncate_layer,
)
from mochi_tune.adapters.modelspec import HASH_KEY
from mochi_tune.adapters.notes import layer_bar
from mochi_tune.errors import CheckpointError, ConfigError, some
from mochi_tune.files import file_sha256

# Maximum relative difference of layers that count as the same; fp32 rounds to 6e-8.
_SAME = 1e-6
# Metadata keys that do not apply to a file made from this one.
_OWN = ("rank", "alpha", "rslora", "targets", "tool", "sources", "relative_error", HASH_KEY)


@dataclass(frozen=True)
class LayerFacts:
    """Measurements of one layer.

    Attributes:
        rank: number of components.
        alpha: strength; alpha = rank applies B A unscaled.
        norm: Frobenius norm of the change of the weights; in a DoRA, before the rows are scaled to their magnitudes.
        rank_90: number of singular values that hold 90 % of the sum of all squares; `rank_99` likewise.
    """

    rank: int
    alpha: float
    norm: float
    rank_90: int
    rank_99: int


@dataclass(frozen=True)
class Errors:
    """Errors of an approximation.

    Attributes:
        layers: relative error of each layer: norm of the difference divided by the norm of the exact change.
        total: relative error of all layers together.
    """

    layers: dict[str, float]
    total: float

    @classmethod
    def of(cls, left_out: Mapping[str, float], norms: Mapping[str, float]) -> "Errors":
        """Computes the errors from the norms of what was left out and of the exact changes, by layer."""
        layers = {name: relative(left_out[name], norms[name]) for name in left_out}
        return cls(layers, relative(math.hypot(*left_out.values()), math.hypot(*norms.values())))

    @property
    def worst(self) -> str:
        """The layer with the largest relative error."""
        return max(self.layers, key=self.layers.__getitem__)

    def __str__(self) -> str:
        return f"relative error {self.total:.2g}, at most {self.layers[self.worst]:.2g} in {self.worst}"


@dataclass(frozen=True)
class Comparison:
    """Differences between two adapters.

    Attributes:
        only_first: layers that only the first adapter has; `only_second` likewise.
        differences: norm of the difference between the changes of each common layer, relative to the larger norm.
        cosines: cosine between the changes of each common layer; 0 if one of them is 0.
        difference: as `differences`, of all layers together; a missing layer counts as a change of 0.
        cosine: as `cosines`, of all layers together.
        note: remark on assumed alphas, see `assumed_note`.
    """

    only_first: list[str]
    only_second: list[str]
    differences: dict[str, float]
    cosines: dict[str, float]
    difference: float
    cosine: float
    note: str = ""

    @property
    def is_same(self) -> bool:
        """Whether both adapters make the same change of the weights, up to fp32 rounding."""
        return not (self.only_first or self.only_second) and max(self.differences.values()) <= _SAME


def block_and_kind(name: str) -> tuple[int | None, str]:
    """Returns the block and the kind of a layer, (0, "attn.qkv_x"), or None and the whole name outside the blocks."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def measure_layers(adapter: Adapter) -> dict[str, LayerFacts]:
    """Measures each layer in fp64; returns them in the order of the blocks, with those outside the blocks last."""
    facts = {}
    for name in layer_bar("measure", sorted(adapter.layers, key=_order)):
        layer = adapter.layers[name]
        values = singular_values(layer)
        ranks = (effective_rank(values, 0.9), effective_rank(values, 0.99))
        facts[name] = LayerFacts(layer.rank, layer.alpha, float(values.norm()), *ranks)
    return facts


def kind_norms(layers: Mapping[str, LayerFacts]) -> dict[str, float]:
    """Returns the norm of the change of all layers of each kind together."""
    norms: dict[str, float] = {}
    for name, facts in layers.items():
        kind = block_and_kind(name)[1]
        norms[kind] = math.hypot(norms.get(kind, 0.0), facts.norm)
    return norms


def merge_adapters(
    adapters: Sequence[Adapter],
    strengths: Sequence[float],
    limit: Limit | None = None,
    release_layers: bool = False,
) -> tuple[Adapter, Errors | None]:
    """Merges adapters into one that changes the weights by the sum of their changes, each times its strength.

    Args:
        adapters: two or more, of one base.
        strengths: one for each adapter.
        limit: reduces each merged layer by SVD; None adds up the ranks, which is exact.
        release_layers: whether to remove each layer from `adapters` once it is merged, so that memory does not hold
            the inputs and the sum at the same time. It leaves the adapters without layers.

    Returns:
        The merged adapter, without layers in which the changes cancel out, and its errors if ranks were reduced.

    Raises:
        ConfigError: there are fewer than two adapters or not one strength for each, a strength is 0, not finite or too
            large, or all changes cancel out.
        CheckpointError: the adapters belong to different bases, differ in the size of a layer, or one is a DoRA.
    """
    if len(adapters) < 2 or len(strengths) != len(adapters):
        raise ConfigError(
            f"a merge takes two adapters or more and one strength each, got {len(adapters)} and {len(strengths)}: "
            "use for example strengths=[0.8,0.5]."
        )
    if wrong := [strength for strength in strengths if not math.isfinite(strength) or not strength]:
        raise ConfigError(f"strengths: {wrong[0]:g} does not fit: use numbers other than 0, or leave the adapter out.")
    for adapter in adapters:
        _refuse_dora(adapter, "merged")
    _check_one_base(adapters)
    remaining = [dict(adapter.layers) for adapter in adapters]
    if release_layers:
        for adapter in adapters:
            adapter.layers.clear()
    layers, left_out, norms = {}, {}, {}
    for name in layer_bar("merge", [name for each in remaining for name in each]):
        held = [(each.pop(name), x) for each, x in zip(remaining, strengths, strict=True) if name in each]
        if len({layer.shape for layer, _ in held}) > 1:
            raise CheckpointError(f"{name} has another size in each of {_names(adapters)}: merge adapters of one base.")
        whole, norm = _sum(name, held)
        if norm:
            layers[name], left_out[name] = (whole, 0.0) if limit is None else truncate_layer(whole, limit)
            norms[name] = norm
    if not layers:
        raise ConfigError(
            f"strengths={list(strengths)}: {_names(adapters)} cancel out, so that nothing is left: use other strengths."
        )
    sources = [source_of(each, strength) for each, strength in zip(adapters, strengths, strict=True)]
    metadata = common_metadata(adapters) | {"tool": "lora merge", "sources": json.dumps(sources)}
    return (Adapter(layers, metadata), None) if limit is None else _reduced(layers, metadata, left_out, norms)


def resize_adapter(adapter: Adapter, limit: Limit) -> tuple[Adapter, Errors]:
    """Reduces the rank of each layer by SVD, which gives the best approximation.

    Raises:
        ConfigError: no layer has a higher rank than the limit.
        CheckpointError: the adapter is a DoRA.
    """
    _refuse_dora(adapter, "resized")
    highest = max(layer.rank for layer in adapter.layers.values())
    if limit.rank is not None and limit.rank >= highest:
        raise ConfigError(
            f"rank={limit.rank} is not below that of any layer of {adapter}, which has {highest} at most: "
            "use a lower rank."
        )
    metadata = {key: value for key, value in adapter.metadata.items() if key not in _OWN}
    metadata |= {"tool": "lora resize", "sources": json.dumps([source_of(adapter)])}
    layers, left_out, norms = {}, {}, {}
    for name in layer_bar("resize", adapter.layers):
        layer = adapter.layers[name]
        layers[name], left_out[name] = truncate_layer(layer, limit)
        norms[name] = change_norm(layer)
    return _reduced(layers, metadata, left_out, norms)


def compare_adapters(first: Adapter, second: Adapter) -> Comparison:
    """Compares the changes that two adapters make, layer by layer.

    The changes of two DoRAs are compared before the rows are scaled, and so are the magnitudes. The difference of a
    layer is the larger of the two.

    Raises:
        CheckpointError: only one of them is a DoRA, or a layer differs in size.
    """
    if first.is_dora != second.is_dora:
        raise CheckpointError(
            f"{first if first.is_dora else second} is a DoRA and the other adapter is not: what a DoRA changes depends "
            "on the base's weights, compare what `lora bake` makes of both."
        )
    common = [name for name in first.layers if name in second.layers]
    if wrong := [name for name in common if first.layers[name].shape != second.layers[name].shape]:
        raise CheckpointError(f"{some(wrong)}: other sizes in {second}: compare adapters of one base.")
    differences, cosines = {}, {}
    norms: tuple[dict[str, float], dict[str, float]] = {}, {}
    apart, product = 0.0, 0.0
    for name in layer_bar("compare", (*first.layers, *second.layers)):
        for adapter, norm in zip((first, second), norms, strict=True):
            if name in adapter.layers:
                norm[name] = change_norm(adapter.layers[name])
        if name not in common:
            continue
        pair = first.layers[name], second.layers[name]
        inner = inner_product(*pair)
        gap = math.sqrt(max(norms[0][name] ** 2 + norms[1][name] ** 2 - 2 * inner, 0.0))
        differences[name] = max(relative(gap, max(norms[0][name], norms[1][name])), _magnitude_difference(*pair))
        cosines[name] = _cosine(inner, norms[0][name], norms[1][name])
        apart, product = apart + gap**2, product + inner
    whole = math.hypot(*norms[0].values()), math.hypot(*norms[1].values())
    only = [
        [name for name in one.layers if name not in other.layers] for one, other in ((first, second), (second, first))
    ]
    apart += sum(norms[i][name] ** 2 for i in (0, 1) for name in only[i])
    magnitudes = (_magnitude_difference(first.layers[name], second.layers[name]) for name in common)
    difference = max(relative(math.sqrt(apart), max(whole)), max(magnitudes, default=0.0))
    return Comparison(only[0], only[1], differences, cosines, difference, _cosine(product, *whole))


def common_metadata(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Returns the metadata that adapters have in common.

    Facts about the base must not contradict each other; all other metadata must be the same in every adapter.
    """
    common = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.metadata):
        values = [adapter.metadata.get(key) for adapter in adapters]
        stated = {value for value in values if value is not None}
        if key not in _OWN and len(stated) == 1 and (None not in values or key in ("base_fingerprint", "num_blocks")):
            common[key] = stated.pop()
    return common


def source_of(adapter: Adapter, strength: float | None = None) -> dict[str, Any]:
    """Returns how a new file describes a source. Run and step tell files of one name apart."""
    source: dict[str, Any] = {key: adapter.metadata[key] for key in ("name", "step") if key in adapter.metadata}
    if adapter.path is not None:
        source["file"] = adapter.path.name
        # Of the file that was read, which another program may have replaced since.
        if adapter.sha256 or adapter.path.is_file():
            source["sha256"] = adapter.sha256 or file_sha256(adapter.path)
    return source if strength is None else source | {"strength": strength}


def assumed_note(*adapters: Adapter) -> str:
    """Returns the end of a line that names the adapters with an assumed alpha; "" if all files state theirs."""
    files = ", ".join(str(each.path) for each in adapters if each.alpha_source == ASSUMED)
    return f"; the alpha of {files} is {ASSUMED}" if files else ""


def _sum(name: str, held: Sequence[tuple[LoraLayer, float]]) -> tuple[LoraLayer, float]:
    """Returns the sum of layers, each times its strength, and its norm, which is 0 where the changes cancel out."""
    whole = stack_layers([layer for layer, _ in held], [strength for _, strength in held])
    if not torch.isfinite(whole.b).all():
        largest = max((strength for _, strength in held), key=abs)
        raise ConfigError(f"strengths: {largest:g} is too large for {name}, in fp32: use a smaller number.")
    norm = change_norm(whole)
    # If the changes cancel out, only rounding is left.
    is_left = norm > _SAME * math.hypot(*(strength * change_norm(layer) for layer, strength in held))
    return whole, norm if is_left else 0.0


def _reduced(
    layers: dict[str, LoraLayer], metadata: dict[str, str], left_out: dict[str, float], norms: dict[str, float]
) -> tuple[Adapter, Errors]:
    """Returns an adapter of reduced layers, and its errors from the norms of what was left out."""
    errors = Errors.of(left_out, norms)
    return Adapter(layers, metadata | {"relative_error": f"{errors.total:.3g}"}), errors


def _check_one_base(adapters: Sequence[Adapter]) -> None:
    for key in ("base_fingerprint", "num_blocks"):
        stated = [(each, each.metadata[key]) for each in adapters if key in each.metadata]
        kinds = {dtype_of(value) for _, value in stated}
        # The fingerprint of a base depends on the dtype of its file, so only those of one dtype are compared.
        if len({value for _, value in stated}) > len(kinds):
            said = "; ".join(f"{each} has {short(value)}" for each, value in stated)
            raise CheckpointError(f"the adapters were trained on different bases, by their {key}: {said}.")


def _refuse_dora(adapter: Adapter, what: str) -> None:
    if adapter.is_dora:
        raise CheckpointError(
            f"{adapter} is a DoRA and cannot be {what}: the scaling of its rows is no low-rank change and depends on "
            "the base: use a plain LoRA, or `lora bake`."
        )


def _order(name: str) -> tuple[float, str]:
    block, kind = block_and_kind(name)
    return (math.inf if block is None else block), kind


def _cosine(inner: float, norm: float, other: float) -> float:
    return inner / (norm * other) if norm and other else 0.0


def _magnitude_difference(layer: LoraLayer, other: LoraLayer) -> float:
    if layer.magnitude is None or other.magnitude is None:
        return 0.0
    first, second = layer.magnitude.double(), other.magnitude.double()
    return relative(float((first - second).norm()), max(float(first.norm()), float(second.norm())))


def _names(adapters: Sequence[Adapter]) -> str:
    return some([str(adapter.path or "the adapter") for adapter in adapters])
