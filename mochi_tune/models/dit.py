"""AsymmDiT, the diffusion transformer of Mochi 1, in the official checkpoint's parameter names.

Shape letters: B batch, C latent channels, T h w latent frames, rows, columns, N visual tokens, L text tokens,
D width (Dx visual, Dy text). x is the visual stream, y the text stream, c the conditioning.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.attention import AsymmetricAttention, RotaryTables
from mochi_tune.models.layers import (
    AttentionPool,
    FeedForward,
    FinalLayer,
    PatchEmbed,
    TimestepEmbedder,
    gated_residual,
    modulated_rms_norm,
)


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of an AsymmDiT; the defaults are Mochi 1's. Field names are the official configuration's."""

    depth: int = 48
    patch_size: int = 2
    num_heads: int = 24
    hidden_size_x: int = 3072
    hidden_size_y: int = 1536
    mlp_ratio_x: float = 4.0
    mlp_ratio_y: float = 4.0
    in_channels: int = 12
    qkv_bias: bool = False
    out_bias: bool = True
    patch_embed_bias: bool = True
    timestep_mlp_bias: bool = True
    timestep_scale: float = 1000.0
    t5_feat_dim: int = 4096


class Modulation(NamedTuple):
    """The effect of noise levels and pooled prompts on the blocks; it does not depend on the tokens.

    Attributes:
        c: the conditioning of each sample, (B, Dx).
        blocks: the outputs of mod_x and mod_y of each block, (B, 4 Dx) and (B, 4 Dy), or (B, Dy) in the last block.
    """

    c: Tensor
    blocks: tuple[tuple[Tensor, Tensor], ...]


class AsymmetricJointBlock(nn.Module):
    """One transformer block over both streams. The last block does not update the text stream.

    Source: genmoai/mochi@0c86aeb dit/joint_model/asymm_models_joint.py (AsymmetricJointBlock).
    """

    def __init__(self, config: DiTConfig, update_y: bool) -> None:
        super().__init__()
        dim_x, dim_y = config.hidden_size_x, config.hidden_size_y
        self.update_y = update_y
        self.mod_x = nn.Linear(dim_x, 4 * dim_x)
        self.mod_y = nn.Linear(dim_x, 4 * dim_y if update_y else dim_y)
        self.attn = AsymmetricAttention(dim_x, dim_y, config.num_heads, update_y, config.qkv_bias, config.out_bias)
        self.mlp_x = FeedForward(dim_x, config.mlp_ratio_x)
        if update_y:
            self.mlp_y = FeedForward(dim_y, config.mlp_ratio_y)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        modulation: tuple[Tensor, Tensor],
        rope: tuple[Tensor, Tensor],
        text_lengths: Sequence[int] | None,
    ) -> tuple[Tensor, Tensor]:
        """Maps x (B, N, Dx), y (B, L, Dy) to the next block's inputs; `modulation` is one of `Modulation.blocks`."""
        mod_x, mod_y = modulation
        scale_msa_x, gate_msa_x, scale_mlp_x, gate_mlp_x = mod_x.chunk(4, dim=-1)
        scale_msa_y, *mods_y = mod_y.chunk(4, dim=-1) if self.update_y else (mod_y,)
        attn_x, attn_y = self.attn(
            modulated_rms_norm(x, scale_msa_x), modulated_rms_norm(y, scale_msa_y), rope, text_lengths
        )
        x = gated_residual(x, attn_x, gate_msa_x)
        x = gated_residual(x, self.mlp_x(modulated_rms_norm(x, scale_mlp_x)), gate_mlp_x)
        if self.update_y:
            gate_msa_y, scale_mlp_y, gate_mlp_y = mods_y
            y = gated_residual(y, attn_y, gate_msa_y)
            y = gated_residual(y, self.mlp_y(modulated_rms_norm(y, scale_mlp_y)), gate_mlp_y)
        return x, y


class AsymmDiT(nn.Module):
    """Predicts the velocity, latents - noise, of noisy latents with a prompt.

    Source: genmoai/mochi@0c86aeb dit/joint_model/asymm_models_joint.py (AsymmDiTJoint).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim_x = config.hidden_size_x
        self.x_embedder = PatchEmbed(config.in_channels, dim_x, config.patch_size, config.patch_embed_bias)
        self.t_embedder = TimestepEmbedder(dim_x, config.timestep_scale, config.timestep_mlp_bias)
        self.t5_y_embedder = AttentionPool(config.t5_feat_dim, dim_x)
        self.t5_yproj = nn.Linear(config.t5_feat_dim, config.hidden_size_y)
        head_dim = dim_x // config.num_heads
        self.pos_frequencies = nn.Parameter(torch.empty(3, config.num_heads, head_dim // 2))
        if not self.pos_frequencies.is_meta:
            # On the meta device the draw has no effect, but makes torch import its compiler.
            nn.init.normal_(self.pos_frequencies)
        self.rope = RotaryTables()
        self.blocks = nn.ModuleList(
            AsymmetricJointBlock(config, update_y=i < config.depth - 1) for i in range(config.depth)
        )
        self.final_layer = FinalLayer(dim_x, config.patch_size, config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return self.t5_yproj.weight.dtype

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        modulation: Modulation | None = None,
    ) -> Tensor:
        """Predicts the velocity at the noise level sigma.

        The result of a row depends neither on the other rows nor on the padding of its prompt.

        Args:
            latents: noisy, DiT space, (B, C, T, h, w).
            sigma: (B,) in [0, 1], on any device; 1 is pure noise.
            prompt_embeds: T5 features, (B, L, t5_feat_dim).
            prompt_mask: (B, L), true where a token is valid. A mask on the CPU avoids a device synchronization.
            modulation: precomputed by `modulation_of` from the `condition` of the same sigma and prompts. If given,
                sigma is not read.

        Returns:
            The velocity, (B, C, T, h, w), in the dtype of the matrices.
        """
        prompt_embeds, mask, text_lengths = pack_prompts(prompt_embeds, prompt_mask)
        prompt_embeds = prompt_embeds.to(self.dtype)
        if modulation is None:
            modulation = self.modulation_of(self._condition(sigma, prompt_embeds, mask))
        p = self.config.patch_size
        grid = (latents.shape[2], latents.shape[3] // p, latents.shape[4] // p)
        x = self.x_embedder(latents)
        y = self.t5_yproj(prompt_embeds)
        rope = self.rope(self.pos_frequencies, grid)
        for block, mods in zip(self.blocks, modulation.blocks, strict=True):
            x, y = block(x, y, mods, rope, text_lengths)
        return self.final_layer(x, modulation.c, grid)

    def condition(self, sigma: Tensor, prompt_embeds: Tensor, prompt_mask: Tensor) -> Tensor:
        """Returns the conditioning (B, D), the input of `modulation_of`; arguments as for `forward`."""
        prompt_embeds, mask, _ = pack_prompts(prompt_embeds, prompt_mask)
        return self._condition(sigma, prompt_embeds.to(self.dtype), mask)

    def modulation_of(self, c: Tensor) -> Modulation:
        """Computes the modulation of every block from the conditioning (B, D)."""
        layers = ((block.get_submodule("mod_x"), block.get_submodule("mod_y")) for block in self.blocks)
        return Modulation(c, tuple((mod_x(c), mod_y(c)) for mod_x, mod_y in layers))

    def _condition(self, sigma: Tensor, prompt_embeds: Tensor, mask: Tensor) -> Tensor:
        return condition(self.t_embedder, self.t5_y_embedder, sigma.to(prompt_embeds.device), prompt_embeds, mask)


def condition(
    t_embedder: nn.Module, t5_y_embedder: nn.Module, sigma: Tensor, prompt_embeds: Tensor, mask: Tensor
) -> Tensor:
    """Computes the conditioning (B, D) of noise levels and packed prompts with the two embedders of a model."""
    return F.silu(t_embedder(sigma) + t5_y_embedder(prompt_embeds, mask))


def pack_prompts(prompt_embeds: Tensor, prompt_mask: Tensor) -> tuple[Tensor, Tensor, list[int] | None]:
    """Drops padding so that the text stream is as long as the longest prompt.

    Text tokens have no position, so the valid tokens of each row can be moved to its front.

    Args:
        prompt_embeds: (B, L, D), any finite values where padded.
        prompt_mask: (B, L).

    Returns:
        Embeddings (B, L', D) with the valid tokens first, their mask (B, L'), and the number of valid tokens of each
        row, or None if all rows have L'.
    """
    mask, device = prompt_mask.bool(), prompt_embeds.device
    text_lengths = mask.sum(1).tolist()
    length = max(text_lengths)
    if sum(text_lengths) == mask.numel():
        return prompt_embeds, torch.ones(mask.shape, dtype=torch.bool, device=device), None
    front, order = mask.sort(dim=1, descending=True, stable=True)
    # Without blocking: the host does not wait for this small copy.
    order = order[:, :length].to(device, non_blocking=True)
    packed = prompt_embeds.gather(1, order.unsqueeze(-1).expand(-1, -1, prompt_embeds.shape[-1]))
    is_even = min(text_lengths) == length
    return packed, front[:, :length].to(device, non_blocking=True), None if is_even else text_lengths
