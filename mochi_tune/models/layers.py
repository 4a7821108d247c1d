"""Norms, feed-forward and embedders of the AsymmDiT.

Shape letters: B batch, N visual tokens, L text tokens, D width, T latent frames, h w latent rows and columns.
Norms and the sinusoid are computed in fp32, whatever the dtype of the matrices.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.device import uses_triton


def at_least_fp32(x: Tensor) -> Tensor:
    """Returns x in fp32, or unchanged if it is in fp64, which tests use."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Divides x by the root mean square of its last axis and scales it, in fp32; the output has the dtype of x.

    Without gradients it multiplies in place, which uses less memory and gives the same numbers.
    Source: genmoai/mochi@0c86aeb dit/joint_model/mod_rmsnorm.py (x * rsqrt(mean(x^2) + eps)).
    """
    if uses_triton(x):
        from mochi_tune.models import dit_kernels

        return dit_kernels.rms_norm(x, scale, eps)
    wide, scale = at_least_fp32(x), at_least_fp32(scale)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if torch.is_grad_enabled():
        return (wide * factor * scale).to(x.dtype)
    normed = wide * factor if wide is x else wide.mul_(factor)
    return normed.mul_(scale).to(x.dtype)


def modulated_rms_norm(x: Tensor, scale: Tensor) -> Tensor:
    """Norms tokens x (B, n, D) and scales them by 1 + scale (B, D); the output has the dtype of x.

    Source: genmoai/mochi@0c86aeb dit/joint_model/mod_rmsnorm.py.
    """
    return rms_norm(x, 1 + at_least_fp32(scale).unsqueeze(1), 1e-6)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Adds the normed branch, gated by tanh(gate) (B, D), to the stream x (B, n, D).

    Source: genmoai/mochi@0c86aeb dit/joint_model/residual_tanh_gated_rmsnorm.py.
    """
    gated = rms_norm(branch, torch.tanh(at_least_fp32(gate)).unsqueeze(1), 1e-6)
    return x + gated if torch.is_grad_enabled() or gated.dtype != x.dtype else gated.add_(x)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight, stored and computed in fp32; the output has the dtype of the input."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Norms the last axis of x (..., D)."""
        return rms_norm(x, self.weight, self.eps)


def hidden_width(dim: int, ratio: float) -> int:
    """Returns the width inside a feed-forward layer: 2/3 * ratio * D, rounded up to a multiple of 256."""
    return -(-int(2 * int(ratio * dim) / 3) // 256) * 256


class FeedForward(nn.Module):
    """SwiGLU: w2(SiLU(a) * b) with [a | b] = w1(x).

    Source: genmoai/mochi@0c86aeb dit/joint_model/layers.py (FeedForward).
    """

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = hidden_width(dim, ratio)
        self.w1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D) to (..., D)."""
        inside = self.w1(x)
        if uses_triton(inside):
            from mochi_tune.models import dit_kernels

            return self.w2(dit_kernels.swiglu(inside))
        a, b = inside.chunk(2, dim=-1)
        return self.w2(F.silu(a) * b)


class TimestepEmbedder(nn.Module):
    """Embeds sigma as the sinusoid of (1 - sigma) * scale through a two-layer MLP.

    Source: genmoai/mochi@0c86aeb dit/joint_model/layers.py (TimestepEmbedder).
    """

    FREQUENCIES = 128

    def __init__(self, dim: int, scale: float, bias: bool) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.FREQUENCIES, dim, bias=bias), nn.SiLU(), nn.Linear(dim, dim, bias=bias)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """Maps sigma (B,) in [0, 1] to (B, D)."""
        index = torch.arange(self.FREQUENCIES, dtype=torch.float32, device=sigma.device)
        freqs = torch.exp(-math.log(10000) * index / self.FREQUENCIES)
        angles = ((1 - sigma.float()) * self.scale)[:, None] * freqs
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(self.dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base's matrices, which an adapter's may differ from."""
        weight = self.mlp[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype


class PatchEmbed(nn.Module):
    """Turns patches of latents into visual tokens, frame by frame, in the order (T, row, column)."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, bias: bool) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Maps latents (B, C, T, h, w) to tokens (B, N, D)."""
        num_rows, _, num_frames = latents.shape[:3]
        x = self.proj(latents.transpose(1, 2).flatten(0, 1).to(self.proj.weight.dtype))
        return x.flatten(2).transpose(1, 2).reshape(num_rows, num_frames * x.shape[2] * x.shape[3], -1)


class AttentionPool(nn.Module):
    """Pools the features of a prompt to one vector: their mean attends to itself and to the features.

    Source: genmoai/mochi@0c86aeb dit/joint_model/utils.py (AttentionPool, pool_tokens).
    """

    NUM_HEADS = 8

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        self.to_kv = nn.Linear(dim, 2 * dim)
        self.to_q = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, output_dim)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Maps features (B, L, D) and their mask (B, L), true where valid, to (B, output_dim)."""
        num_valid = mask.sum(1, keepdim=True).clamp(min=1)
        mean = (features * mask.unsqueeze(-1)).sum(1, keepdim=True) / num_valid.unsqueeze(-1).to(features.dtype)
        tokens = torch.cat([mean, features], dim=1)  # (B, 1 + L, D)
        q = self._heads(self.to_q(mean))
        k, v = (self._heads(t) for t in self.to_kv(tokens).chunk(2, dim=-1))
        always = mask.new_ones(mask.shape[0], 1)
        key_mask = torch.cat([always, mask], dim=1)[:, None, None, :]
        pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=key_mask)
        return self.to_out(pooled.transpose(1, 2).flatten(2).squeeze(1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.NUM_HEADS, -1)).transpose(1, 2)


class FinalLayer(nn.Module):
    """Turns visual tokens back into latents: modulated LayerNorm, Linear, patches with the channel as the last axis.

    Source: genmoai/mochi@0c86aeb dit/joint_model/asymm_models_joint.py (FinalLayer).
    """

    def __init__(self, dim: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.mod = nn.Linear(dim, 2 * dim)
        self.linear = nn.Linear(dim, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Maps tokens x (B, N, D) of a grid (T, R, C) to latents (B, C, T, h, w); c is the conditioning (B, D)."""
        shift, scale = at_least_fp32(self.mod(c)).unsqueeze(1).chunk(2, dim=-1)
        normed = F.layer_norm(at_least_fp32(x), x.shape[-1:], eps=1e-6)
        patches = self.linear((normed * (1 + scale) + shift).to(x.dtype))
        p = self.patch_size
        patches = patches.unflatten(1, grid).unflatten(-1, (p, p, -1))  # (B, T, R, C, p, p, channels)
        return patches.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
