"""Low-rank layers under official and under diffusers' names, and the exact way from one to the other."""

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mochi_tune.errors import CheckpointError, some

# An official layer of a block, and the diffusers modules that hold its rows in order.
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
# The last block's text modulation is of another class in diffusers, and its layer has another name.
LAST_MOD_Y = "norm1_context.linear_1"
# The way back: a diffusers module's official layer, and which part of its rows it holds.
OFFICIAL_KINDS = {part: (kind, i) for kind, parts in DIFFUSERS_KINDS.items() for i, part in enumerate(parts)}
OFFICIAL_KINDS[LAST_MOD_Y] = ("mod_y", 0)
# The Linears outside of the blocks, and diffusers' names of them.
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
# The last block does not update text, so it has none of these.
TEXT_UPDATE_KINDS = ("attn.proj_y", "mlp_y.w1", "mlp_y.w2")
# Layers whose output is two halves, whatever the layout.
_OF_TWO_HALVES = (".w1", ".net.0.proj", "final_layer.mod", "norm_out.linear")
_BLOCK = re.compile(r"(?:transformer_)?blocks\.(0|[1-9]\d{0,2})\.(.+)")


@dataclass
class LoraLayer:
    """The low-rank change of one Linear: W' = W + alpha / rank * b @ a, whose rows a DoRA then gives its own lengths.

    Attributes:
        a: (rank, in), the half next to the input.
        b: (out, rank), the half next to the output.
        alpha: strength; alpha = rank applies b @ a as it is.
        magnitude: (out,), the length of each row of W' in a DoRA; None in a plain LoRA, which leaves them as they come.

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
    """Returns N of "blocks.N.attn.qkv_x" or "transformer_blocks.N.attn1.to_q"; -1 outside of the blocks."""
    match = _BLOCK.fullmatch(name)
    return int(match[1]) if match else -1


def kind_of(name: str) -> str:
    """Returns what follows the block, "attn.qkv_x" of "blocks.N.attn.qkv_x"; outside of the blocks the whole name."""
    match = _BLOCK.fullmatch(name)
    return match[2] if match else name


def is_official(name: str) -> bool:
    """Whether a name is that of a Linear in the official model, of whatever number of blocks."""
    return name in OUTER_MODULES or (name.startswith("blocks.") and kind_of(name) in DIFFUSERS_KINDS)


def is_diffusers(name: str) -> bool:
    """Whether a name is that of a Linear in diffusers' model, of whatever number of blocks."""
    return name in OFFICIAL_OUTER or (name.startswith("transformer_blocks.") and kind_of(name) in OFFICIAL_KINDS)


def is_attention_or_mlp(name: str) -> bool:
    """Whether an official layer is one that the training adapts."""
    return block_of(name) >= 0 and kind_of(name).startswith(("attn.", "mlp_"))


def check_layer(name: str, layer: LoraLayer) -> None:
    """Refuses a layer that is no finite low-rank change of the Linear that its name says.

    Raises:
        CheckpointError: sizes that do not fit each other or the name, no elements, NaN or infinity.
    """
    a, b = layer.a, layer.b
    row_parts = 3 if ".qkv_" in name else 2 if name.endswith(_OF_TWO_HALVES) else 1
    if a.ndim != 2 or b.ndim != 2 or not a.numel() or a.shape[0] != b.shape[1] or not len(b) or len(b) % row_parts:
        raise CheckpointError(
            f"{name}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are no pair for this layer."
        )
    magnitude = torch.ones(len(b)) if layer.magnitude is None else layer.magnitude
    if magnitude.shape != (len(b),):
        raise CheckpointError(f"{name}: {tuple(magnitude.shape)} magnitudes are not one for each of its {len(b)} rows.")
    if not all(torch.isfinite(tensor).all() for tensor in (a, b, magnitude)):
        raise CheckpointError(
            f"{name}: its weights hold NaN or infinity, the training had diverged: use an earlier one."
        )


def bake(layer: LoraLayer) -> LoraLayer:
    """Multiplies alpha / rank into b, so that the scale is 1; b is fp32."""
    return replace(layer, b=(layer.b.double() * layer.scale).float(), alpha=float(layer.rank))


def pad_rank(layer: LoraLayer, rank: int) -> LoraLayer:
    """Adds components of zeros up to `rank` (at least the layer's own), at the same scale."""
    more = rank - layer.rank
    a = torch.cat([layer.a, layer.a.new_zeros(more, layer.a.shape[1])])
    b = torch.cat([layer.b, layer.b.new_zeros(layer.b.shape[0], more)], dim=1)
    return replace(layer, a=a, b=b, alpha=layer.scale * rank)


def drop_padding(layer: LoraLayer) -> LoraLayer:
    """Takes out the components that are 0 in both halves; a layer of zeros comes back with rank 0, a DoRA's with 1."""
    used = layer.a.any(dim=1) | layer.b.any(dim=0)
    if layer.magnitude is not None and not used.any():
        used[0] = True
    if used.all():
        return layer
    return replace(layer, a=layer.a[used], b=layer.b[:, used], alpha=layer.scale * int(used.sum()))


def split_layers(layers: dict[str, LoraLayer], num_blocks: int | None = None) -> dict[str, LoraLayer]:
    """Turns official layers into diffusers' modules, baked: each part has the layer's A, and its rows of the rest.

    Args:
        layers: by official name.
        num_blocks: of the base, where a layer is a `mod_y`.
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
    """Turns diffusers' modules into official layers.

    Where q, k and v carry one and the same A, they fold into the fused layer at their own rank; otherwise it holds all
    their components, up to three times the rank. Only some of q, k and v may be adapted, if alike in every block of the
    stream: the others' rows are then 0.

    Raises:
        CheckpointError: a q, k or v is missing that other blocks have, or in a DoRA any, or the three differ in size,
            or a block has a text modulation of both kinds.
    """
    groups: dict[str, list[LoraLayer | None]] = {}
    for name, module in modules.items():
        block = block_of(name)
        kind, i = OFFICIAL_KINDS[kind_of(name)] if block >= 0 else (OFFICIAL_OUTER[name], 0)
        official = f"blocks.{block}.{kind}" if block >= 0 else kind
        group = groups.setdefault(official, [None] * (len(DIFFUSERS_KINDS[kind]) if block >= 0 else 1))
        if group[i] is not None:
            raise CheckpointError(f"{official} is in it twice, {name} is one of them: fetch the file again.")
        group[i] = module
    _check_same_choice(groups)
    fused = {}
    for name, (first, *others) in groups.items():
        if others:
            fused[name] = _fuse_thirds(name, [first, *others])
        else:
            assert first is not None, "a group has the module that it was made for"
            fused[name] = _swap_halves(name, first)
    return fused


def _swap_halves(name: str, layer: LoraLayer) -> LoraLayer:
    """Exchanges the halves of a SwiGLU's first Linear (gate, value) and of the final modulation (shift, scale)."""
    if not name.endswith(_OF_TWO_HALVES):
        return layer
    half = layer.b.shape[0] // 2
    magnitude = None if layer.magnitude is None else layer.magnitude.roll(half)
    return replace(layer, b=layer.b.roll(half, dims=0), magnitude=magnitude)


def _check_same_choice(groups: dict[str, list[LoraLayer | None]]) -> None:
    """Refuses a module that only some blocks lack; a choice, such as to_q and to_v, is the same in every block."""
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
    """Stacks q, k and v: one A when they share it, else all their A's under a block-diagonal B."""
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
            raise CheckpointError(f"{name}: a DoRA of only some of q, k and v has no form here: adapt all three.")
        magnitude = torch.cat([third.magnitude for third in present if third.magnitude is not None])
    if all(torch.equal(third.a, first.a) for third in present):
        b = torch.cat([third.b if third else torch.zeros_like(first.b) for third in thirds])
        return LoraLayer(first.a, b, first.alpha, magnitude)
    a = torch.cat([third.a for third in present])
    b = torch.block_diag(*[third.b if third else first.b.new_zeros(first.b.shape[0], 0) for third in thirds])
    return LoraLayer(a, b, first.scale * len(a), magnitude)


def official_names(num_blocks: int) -> list[str]:
    """Lists every layer of an official adapter, which are the attention's."""
    kinds = [kind for kind in DIFFUSERS_KINDS if kind.startswith("attn.")]
    names = [f"blocks.{i}.{kind}" for i in range(num_blocks) for kind in kinds]
    return [name for name in names if block_of(name) < num_blocks - 1 or kind_of(name) not in TEXT_UPDATE_KINDS]


def complete_layers(layers: dict[str, LoraLayer], num_blocks: int) -> dict[str, LoraLayer]:
    """Bakes attention layers and fills in zeros, to one rank for all qkv and one for all projections.

    Args:
        layers: some of official_names(num_blocks).
        num_blocks: of the base.
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
    """Returns (out, in) of every kind, worked out from any of them; by default text is half as wide, as in Mochi 1."""
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
