"""Low-rank layers by official and by diffusers' names, and exact conversions between the two."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mochi_tune.errors import CheckpointError, ConfigError, some

if TYPE_CHECKING:
    from mochi_tune.adapters.lora import LayerSettings

# The layers of a block by official name, with the diffusers modules that hold their rows, in order.
DIFFUSERS_KINDS = {
    "attn.qkv_x": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn.qkv_y": ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj"),
    "attn.proj_x": ("attn1.to_out.0",),
    "attn.proj_y": ("attn1.to_add_out",),
    "mlp_x.w1": ("ff.net.0.proj",),
    "mlp_x.w2": ("ff.net.2",),
    "mlp_y.w1": ("ff_context.net.0.proj",),
    "mlp_y.w2": ("ff_context.net.2",),
    "mod_x": ("norm1.linear",),
    "mod_y": ("norm1_context.linear",),
}
# In diffusers, the text modulation of the last block is of another class, whose layer has another name.
LAST_MOD_Y = "norm1_context.linear_1"
# The official layer of each diffusers module, and the index of the part of its rows that the module holds.
OFFICIAL_KINDS = {part: (kind, i) for kind, parts in DIFFUSERS_KINDS.items() for i, part in enumerate(parts)}
OFFICIAL_KINDS[LAST_MOD_Y] = ("mod_y", 0)
# The Linears outside the blocks, with their names in diffusers.
OUTER_MODULES = {
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "t5_y_embedder.to_kv": "time_embed.pooler.to_kv",
    "t5_y_embedder.to_q": "time_embed.pooler.to_q",
    "t5_y_embedder.to_out": "time_embed.pooler.to_out",
    "t5_yproj": "time_embed.caption_proj",
    "final_layer.mod": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
OFFICIAL_OUTER = {module: name for name, module in OUTER_MODULES.items()}
# Layers that the last block lacks, because it does not update text.
TEXT_UPDATE_KINDS = ("attn.proj_y", "mlp_y.w1", "mlp_y.w2")
# Endings of layers whose output has two halves, in both layouts.
_OF_TWO_HALVES = (".w1", ".net.0.proj", "final_layer.mod", "norm_out.linear")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(0|[1-9]\d{0,2})\.(.+)")


@dataclass
class LoraLayer:
    """The low-rank change of one Linear, W' = W + alpha / rank * b @ a; a DoRA then scales each row to its magnitude.

    Attributes:
        a: (rank, in), the half at the input.
        b: (out, rank), the half at the output.
        alpha: strength; alpha = rank applies b @ a unscaled.
        magnitude: (out,), norm of each row of W' in a DoRA; None in a plain LoRA.

    Source: DoRA, arXiv 2402.09353, equation 5; a row here is a column there.
    """

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of components."""
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        """The factor of b @ a."""
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the Linear."""
        return self.b.shape[0], self.a.shape[1]


def block_of(name: str) -> int:
    """Returns N of "blocks.N.attn.qkv_x" or "transformer_blocks.N.attn1.to_q", or -1 outside the blocks."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else -1


def kind_of(name: str) -> str:
    """Returns "attn.qkv_x" of "blocks.N.attn.qkv_x", or the whole name outside the blocks."""
    match = _BLOCK.fullmatch(name)
    return match[2] if match else name


def is_official(name: str) -> bool:
    """Whether a Linear of the official model, with any number of blocks, has this name."""
    return name in OUTER_MODULES or (name.startswith("blocks.") and kind_of(name) in DIFFUSERS_KINDS)


def is_diffusers(name: str) -> bool:
    """Whether a Linear of diffusers' model, with any number of blocks, has this name."""
    return name in OFFICIAL_OUTER or (name.startswith("transformer_blocks.") and kind_of(name) in OFFICIAL_KINDS)


def is_attention_or_mlp(name: str) -> bool:
    """Whether training can adapt an official layer."""
    return block_of(name) >= 0 and kind_of(name).startswith(("attn.", "mlp_"))


def check_layer(name: str, layer: LoraLayer) -> None:
    """Refuses a layer that is not a finite low-rank change of the Linear with its name.

    Raises:
        CheckpointError: the sizes do not fit each other or the name, or there are no elements, NaN or infinity.
    """
    a, b = layer.a, layer.b
    check_sizes(name, a.shape, b.shape)
    magnitude = torch.ones(len(b)) if layer.magnitude is None else layer.magnitude
    if magnitude.shape != (len(b),):
        raise CheckpointError(f"{name}: its magnitudes have shape {tuple(magnitude.shape)}, not ({len(b)},).")
    if not all(torch.isfinite(tensor).all() for tensor in (a, b, magnitude)):
        raise CheckpointError(
            f"{name}: its weights have NaN or infinity, the training diverged: use an earlier checkpoint."
        )


def check_sizes(name: str, a: Sequence[int], b: Sequence[int]) -> None:
    """Refuses shapes of lora_A and lora_B that do not fit each other or the name of the layer.

    Raises:
        CheckpointError: they do not fit.
    """
    row_parts = 3 if ".qkv_" in name else 2 if name.endswith(_OF_TWO_HALVES) else 1
    if len(a) != 2 or len(b) != 2 or 0 in (*a, *b) or a[0] != b[1] or b[0] % row_parts:
        raise CheckpointError(f"{name}: lora_A {tuple(a)} and lora_B {tuple(b)} do not fit each other or this layer.")


def round_tensor(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a layer's tensor on the CPU, rounded to `dtype`; no copy if it already is.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    rounded = tensor.detach().to("cpu", dtype).contiguous()
    if not torch.isfinite(rounded).all():
        raise CheckpointError(
            f"{name} holds {tensor.abs().max().item():.3g}, and the largest number of {str(dtype)[6:]} is "
            f"{torch.finfo(dtype).max:.3g}: use dtype=bf16 or dtype=fp32."
        )
    return rounded


def bake(layer: LoraLayer) -> LoraLayer:
    """Multiplies alpha / rank into b, so that the scale is 1; the new b is fp32."""
    return replace(layer, b=(layer.b.double() * layer.scale).float(), alpha=float(layer.rank))


def pad_rank(layer: LoraLayer, rank: int) -> LoraLayer:
    """Pads a layer with zeros to `rank`, which is at least its own; the scale stays the same."""
    more = rank - layer.rank
    a = torch.cat([layer.a, layer.a.new_zeros(more, layer.a.shape[1])])
    b = torch.cat([layer.b, layer.b.new_zeros(layer.b.shape[0], more)], dim=1)
    return replace(layer, a=a, b=b, alpha=layer.scale * rank)


def drop_padding(layer: LoraLayer) -> LoraLayer:
    """Removes the components that are 0 in both halves; a layer of zeros gets rank 0, or 1 in a DoRA."""
    used = layer.a.any(dim=1) | layer.b.any(dim=0)
    if layer.magnitude is not None and not used.any():
        used[0] = True
    if used.all():
        return layer
    return replace(layer, a=layer.a[used], b=layer.b[:, used], alpha=layer.scale * int(used.sum()))


def split_layers(layers: dict[str, LoraLayer], num_blocks: int | None = None) -> dict[str, LoraLayer]:
    """Converts official layers to diffusers' modules, with the scale baked in.

    Each module of a layer has its A, and its own rows of B and of the magnitudes.

    Args:
        layers: layers by official name.
        num_blocks: number of blocks of the base; needed for `mod_y` layers.
    """
    modules = {}
    for name, layer in layers.items():
        names = _diffusers_modules(name, num_blocks)
        layer = _swap_halves(name, bake(layer))
        magnitudes = [None] * len(names) if layer.magnitude is None else layer.magnitude.chunk(len(names))
        for module, b, magnitude in zip(names, layer.b.chunk(len(names)), magnitudes, strict=True):
            modules[module] = LoraLayer(layer.a, b, layer.alpha, magnitude)
    return modules


def _diffusers_modules(name: str, num_blocks: int | None) -> list[str]:
    block, kind = block_of(name), kind_of(name)
    if block < 0:
        return [OUTER_MODULES[name]]
    parts = (LAST_MOD_Y,) if kind == "mod_y" and block + 1 == num_blocks else DIFFUSERS_KINDS[kind]
    return [f"transformer_blocks.{block}.{part}" for part in parts]


def fuse_layers(modules: dict[str, LoraLayer]) -> dict[str, LoraLayer]:
    """Converts diffusers' modules to official layers.

    If q, k and v have the same A, the fused layer has their rank. Otherwise it holds all their components, up to three
    times the rank. A file may adapt only some of q, k and v if every block of the stream does the same; the rows of the
    others are then 0.

    Raises:
        CheckpointError: a block lacks a q, k or v that others have, a DoRA lacks any of them, the three differ in size,
            or a block has a text modulation of both kinds.
    """
    groups: dict[str, list[LoraLayer | None]] = {}
    for name, module in modules.items():
        block = block_of(name)
        kind, i = OFFICIAL_KINDS[kind_of(name)] if block >= 0 else (OFFICIAL_OUTER[name], 0)
        official = f"blocks.{block}.{kind}" if block >= 0 else kind
        group = groups.setdefault(official, [None] * (len(DIFFUSERS_KINDS[kind]) if block >= 0 else 1))
        if group[i] is not None:
            raise CheckpointError(f"{official} is in it twice, once as {name}: fetch the file again.")
        group[i] = module
    _check_same_choice(groups)
    fused = {}
    for name, (first, *others) in groups.items():
        if others:
            fused[name] = _fuse_thirds(name, [first, *others])
        else:
            assert first is not None, "every group has at least one module"
            fused[name] = _swap_halves(name, first)
    return fused


def _swap_halves(name: str, layer: LoraLayer) -> LoraLayer:
    """Swaps the output halves of a SwiGLU's first Linear (gate, value) and of the final modulation (shift, scale)."""
    if not name.endswith(_OF_TWO_HALVES):
        return layer
    half = layer.b.shape[0] // 2
    magnitude = None if layer.magnitude is None else layer.magnitude.roll(half)
    return replace(layer, b=layer.b.roll(half, dims=0), magnitude=magnitude)


def _check_same_choice(groups: dict[str, list[LoraLayer | None]]) -> None:
    """Refuses modules that only some blocks have; the choice of q, k and v must be the same in every block."""
    used = {(kind_of(name), i) for name, parts in groups.items() for i, part in enumerate(parts) if part}
    missing = [
        f"transformer_blocks.{block_of(name)}.{DIFFUSERS_KINDS[kind_of(name)][i]}"
        for name, parts in groups.items()
        for i, part in enumerate(parts)
        if not part and (kind_of(name), i) in used
    ]
    if missing:
        raise CheckpointError(f"other blocks adapt these, which are missing: {some(missing)}: fetch the file again.")


def _fuse_thirds(name: str, thirds: list[LoraLayer | None]) -> LoraLayer:
    """Fuses q, k and v: with their common A if they share it, else with all their A's and a block-diagonal B."""
    present = [third for third in thirds if third]
    if len({third.shape for third in present}) > 1:
        raise CheckpointError(f"{name}: its q, k and v differ in size: fetch the file again.")
    if len({third.scale for third in present}) > 1:
        thirds = [third and bake(third) for third in thirds]
        present = [third for third in thirds if third]
    first = present[0]
    magnitude = None
    if first.magnitude is not None:
        if len(present) < 3:
            raise CheckpointError(f"{name}: a DoRA of only some of q, k and v is not supported: adapt all three.")
        magnitude = torch.cat([third.magnitude for third in present if third.magnitude is not None])
    if all(torch.equal(third.a, first.a) for third in present):
        b = torch.cat([third.b if third else torch.zeros_like(first.b) for third in thirds])
        return LoraLayer(first.a, b, first.alpha, magnitude)
    a = torch.cat([third.a for third in present])
    b = torch.block_diag(*[third.b if third else first.b.new_zeros(first.b.shape[0], 0) for third in thirds])
    return LoraLayer(a, b, first.scale * len(a), magnitude)


def official_names(num_blocks: int) -> list[str]:
    """Lists the layers of a complete official adapter, which are those of the attention."""
    kinds = [kind for kind in DIFFUSERS_KINDS if kind.startswith("attn.")]
    names = [f"blocks.{i}.{kind}" for i in range(num_blocks) for kind in kinds]
    return [name for name in names if block_of(name) < num_blocks - 1 or kind_of(name) not in TEXT_UPDATE_KINDS]


def complete_layers(layers: dict[str, LoraLayer], num_blocks: int) -> dict[str, LoraLayer]:
    """Bakes attention layers, and adds zeros so that all layers exist with one rank for qkv and one for projections.

    Args:
        layers: some of the layers of official_names(num_blocks).
        num_blocks: number of blocks of the base.
    """
    shapes = _attention_shapes(layers)
    complete = {}
    for group in (".qkv_", ".proj_"):
        names = [name for name in official_names(num_blocks) if group in name]
        rank = max((layers[name].rank for name in names if name in layers), default=1)
        for name in names:
            num_out, num_in = shapes[kind_of(name)]
            layer = layers.get(name) or LoraLayer(torch.zeros(1, num_in), torch.zeros(num_out, 1), 1.0)
            complete[name] = pad_rank(bake(layer), rank)
    return complete


def _attention_shapes(layers: dict[str, LoraLayer]) -> dict[str, tuple[int, int]]:
    """Returns (out, in) of every kind, computed from the layers; by default text is half as wide, as in Mochi 1."""
    dim_x = dim_y = 0
    for name, layer in layers.items():
        num_out, num_in = layer.shape
        dim_x = num_out // 3 if name.endswith(".qkv_y") else num_in
        dim_y = num_in if name.endswith(".qkv_y") else num_out if name.endswith(".proj_y") else dim_y
    dim_y = dim_y or dim_x // 2
    return {
        "attn.qkv_x": (3 * dim_x, dim_x),
        "attn.qkv_y": (3 * dim_x, dim_y),
        "attn.proj_x": (dim_x, dim_x),
        "attn.proj_y": (dim_y, dim_x),
    }


def check_start(
    layers: Mapping[str, LoraLayer], settings: Mapping[str, "LayerSettings"], dora: bool, file: str
) -> None:
    """Refuses an adapter that training with these settings cannot start from; compares sizes only.

    Args:
        layers: layers of the adapter, which fits the base.
        settings: settings of each layer to train, by name.
        dora: whether magnitudes are trained.
        file: name of the adapter for the message.

    Raises:
        ConfigError: the layers differ, a rank is below that of the file, or the adapter is a DoRA and `dora` is False.
    """
    if other := [name for name in layers if not is_attention_or_mlp(name)]:
        raise ConfigError(
            f"lora.init_from: {file} has {some(other)}, and training adapts attention and MLP layers only: start "
            "from a file of such layers."
        )
    if alien := [name for name in layers if name not in settings]:
        raise ConfigError(f"lora.init_from: {file} has {some(alien)}, which lora.targets leave out: add them there.")
    if missing := [name for name in settings if name not in layers]:
        raise ConfigError(
            f"lora.init_from: {file} has no {some(missing)}, which lora.targets choose: choose only what the file has."
        )
    if large := [name for name, layer in layers.items() if layer.rank > settings[name].rank]:
        name, rank = large[0], max(layer.rank for layer in layers.values())
        raise ConfigError(
            f"lora.init_from: {file} has rank {layers[name].rank} in {name}, which would be trained at rank "
            f"{settings[name].rank}: use lora.rank={rank} or more, or a lora.rank_pattern for such layers."
        )
    if any(layer.magnitude is not None for layer in layers.values()) and not dora:
        raise ConfigError(f"lora.init_from: {file} is a DoRA: use lora.dora=true.")
