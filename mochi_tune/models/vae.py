"""AsymmVAE, the causal video autoencoder of Mochi 1, with the parameter names of the official checkpoints.

Shape letters: B batch, C channels, F pixel frames, T frames inside the network, H W rows and columns inside it.

Convolutions are causal in time, so they can process a clip in chunks: a `cache` holds the frames before a chunk, and
the result is that of the whole clip. Without a cache, the input is the whole clip. Attention needs the whole clip.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.device import uses_triton
from mochi_tune.models.vae_layers import CausalConv, Downsample, FrameCache, FrameNorm, PointwiseConv, pointwise

HEAD_DIM = 32
# Maximum rows of one attention call: CUDA kernels put them on a grid axis, which has at most 65535.
MAX_ATTENTION_ROWS = 32768


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; the defaults are Mochi 1's. Field names are the official configuration's."""

    in_channels: int = 15
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 6)
    num_res_blocks: tuple[int, ...] = (3, 3, 4, 6, 3)
    latent_dim: int = 12
    temporal_reductions: tuple[int, ...] = (1, 2, 3)
    spatial_reductions: tuple[int, ...] = (2, 2, 2)
    has_attentions: tuple[bool, ...] = (False, True, True, True, True)


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; the defaults are Mochi 1's. Field names are the official configuration's."""

    out_channels: int = 3
    base_channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 6)
    num_res_blocks: tuple[int, ...] = (3, 3, 4, 6, 3)
    latent_dim: int = 12
    temporal_expansions: tuple[int, ...] = (1, 2, 3)
    spatial_expansions: tuple[int, ...] = (2, 2, 2)


def frames_to_pixels(frames: Tensor) -> Tensor:
    """Turns uint8 frames (B, F, H, W, 3) into fp32 pixels (B, 3, F, H, W) in [-1, 1].

    The formula must not change: the encoder's sines amplify the different rounding of an equivalent one.
    """
    # A tensor on the same device: CUDA multiplies by the rounded reciprocal of a Python number instead of dividing.
    half = torch.tensor(127.5, device=frames.device)
    return frames.permute(0, 4, 1, 2, 3).float() / half - 1.0


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """Turns decoded pixels (B, 3, F, H, W) into uint8 frames (B, F, H, W, 3), clamped and rounded."""
    unit = ((pixels.float() + 1) / 2).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def fourier_features(pixels: Tensor) -> Tensor:
    """Appends the sines and cosines of 2 pi 2^f times each colour, f = 6, 7; maps (B, 3, ...) to (B, 15, ...).

    Source: genmoai/mochi@0c86aeb vae/models.py (add_fourier_features).
    """
    assert pixels.dtype == torch.float32, f"the sines amplify rounding: pixels must be fp32, not {pixels.dtype}"
    angular = torch.tensor([2 * math.pi * 2**f for f in (6, 7)], dtype=torch.float32, device=pixels.device)
    colours = pixels.movedim(1, -1).contiguous()
    angles = (colours.unsqueeze(-1) * angular).flatten(-2)
    return torch.cat([colours, angles.sin(), angles.cos()], dim=-1).movedim(-1, 1)


class TemporalAttention(nn.Module):
    """Causal attention over time at each pixel, with L2-normed queries and keys.

    Source: genmoai/mochi@0c86aeb vae/models.py (Attention, AttentionBlock).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        batch, _, num_frames, height, width = x.shape
        qkv = self.qkv(x.movedim(1, -1))
        if uses_triton(qkv):
            from mochi_tune.models.vae_kernels import join_heads, split_heads

            attended = _attend_causally(*split_heads(qkv, HEAD_DIM))
            return self.out(join_heads(attended, (batch, num_frames, height, width))).movedim(-1, 1)
        qkv = qkv.unflatten(-1, (3, -1, HEAD_DIM))  # (B, T, H, W, 3, heads, 32)
        q, k, v = qkv.permute(4, 0, 2, 3, 5, 1, 6).flatten(1, 3)  # (rows, heads, T, 32) each
        q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) for t in (q, k))
        attended = _attend_causally(q, k, v).unflatten(0, (batch, height, width))
        return self.out(attended.permute(0, 4, 1, 2, 3, 5).flatten(4)).movedim(-1, 1)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention within each row of (rows, heads, T, 32), at most MAX_ATTENTION_ROWS rows at a time."""
    parts = zip(*(t.split(MAX_ATTENTION_ROWS) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts])


class AttentionBlock(nn.Module):
    """Adds temporal attention of the normed input to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels, silu=False)
        self.attn = TemporalAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        return x + self.attn(self.norm(x))


class ResBlock(nn.Module):
    """A residual block of two causal convolutions, each after a norm, followed by attention if the level has it.

    Source: genmoai/mochi@0c86aeb vae/models.py (ResBlock).
    """

    def __init__(self, channels: int, attention: bool = False) -> None:
        super().__init__()
        # The official names come from a Sequential of norm, SiLU, conv, norm, SiLU, conv.
        self.stack = nn.ModuleDict(
            {"0": FrameNorm(channels), "2": CausalConv(channels), "3": FrameNorm(channels), "5": CausalConv(channels)}
        )
        if attention:
            self.attn_block = AttentionBlock(channels)
        self.attention = attention

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        x = self.convolve(x, cache)
        return self.attn_block(x) if self.attention else x

    def convolve(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Applies the block without its attention."""
        h = self.stack["2"](x, self.stack["0"], cache)
        h = self.stack["5"](h, self.stack["3"], cache)
        return h.add_(x)


class DownsampleBlock(nn.Module):
    """A downsample and the residual blocks at the smaller size."""

    def __init__(self, down: Downsample, num_res_blocks: int, attention: bool) -> None:
        super().__init__()
        res_blocks = [ResBlock(down.out_channels, attention) for _ in range(num_res_blocks)]
        self.layers = nn.ModuleList([down, *res_blocks])

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the next level."""
        for layer in self.layers:
            x = layer(x)
        return x


class UpsampleBlock(nn.Module):
    """The residual blocks of a level and the upsample to the next one.

    Source: genmoai/mochi@0c86aeb vae/models.py (CausalUpsampleBlock, DepthToSpaceTime).
    """

    def __init__(self, channels: int, out_channels: int, num_res_blocks: int, temporal: int, spatial: int) -> None:
        super().__init__()
        self.temporal, self.spatial = temporal, spatial
        self.blocks = nn.ModuleList(ResBlock(channels) for _ in range(num_res_blocks))
        self.proj = PointwiseConv(channels, out_channels * temporal * spatial**2)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', spatial * H, spatial * W)."""
        for block in self.blocks:
            x = block(x, cache)
        parts = (-1, self.temporal, self.spatial, self.spatial)
        weight, bias, tokens = self.proj.weight, self.proj.bias, x.movedim(1, -1)
        if 2 * x[:, 0].numel() < x.shape[1]:
            # On a small grid the weight is larger than the features.
            x = F.linear(tokens, weight, bias).unflatten(-1, parts).movedim(4, -1)
        else:
            # The weight's rows are reordered so that a pixel's channels are contiguous: the copy below is then faster.
            weight, bias = (tensor.unflatten(0, parts).movedim(0, 3) for tensor in (weight, bias))  # (t, s, s, C', ...)
            x = F.linear(tokens, weight.flatten(0, 3), bias.flatten()).unflatten(-1, bias.shape)
        x = x.permute(0, 1, 4, 2, 5, 3, 6, 7).flatten(5, 6).flatten(3, 4).flatten(1, 2).movedim(-1, 1)
        return x[:, :, self.temporal - 1 :] if cache is None or cache.is_first_chunk(self) else x


class Encoder(nn.Module):
    """Turns pixels into the posterior of their VAE latents.

    Source: genmoai/mochi@0c86aeb vae/models.py (Encoder).
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.base_channels * m for m in config.channel_multipliers]
        attentions = config.has_attentions
        layers: list[nn.Module] = [PointwiseConv(config.in_channels, channels[0])]
        layers += [ResBlock(channels[0], attentions[0]) for _ in range(config.num_res_blocks[0])]
        for i, (temporal, spatial) in enumerate(
            zip(config.temporal_reductions, config.spatial_reductions, strict=True)
        ):
            down = Downsample(channels[i], channels[i + 1], temporal, spatial)
            layers.append(DownsampleBlock(down, config.num_res_blocks[i + 1], attentions[i + 1]))
        layers += [ResBlock(channels[-1], attentions[-1]) for _ in range(config.num_res_blocks[-1])]
        self.layers = nn.ModuleList(layers)
        self.output_norm = FrameNorm(channels[-1])
        self.output_proj = PointwiseConv(channels[-1], 2 * config.latent_dim, bias=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes fp32 pixels (B, 3, F, H, W) to mean and log-variance of the VAE latents, fp32 (B, 12, T, h, w)."""
        x = self.embed(pixels)
        for layer in self.layers[1:]:
            x = layer(x)
        return self.posterior(x)

    def embed(self, pixels: Tensor) -> Tensor:
        """Maps fp32 pixels (B, 3, F, H, W) to the input of the first residual block."""
        return self.layers[0](fourier_features(pixels).to(self.output_proj.weight.dtype))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps the output of the last layer to mean and log-variance, fp32."""
        mean, logvar = self.output_proj(self.output_norm(x)).float().chunk(2, dim=1)
        return mean, logvar


class Decoder(nn.Module):
    """Turns VAE latents into pixels.

    Source: genmoai/mochi@0c86aeb vae/models.py (Decoder).
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        channels = [config.base_channels * m for m in config.channel_multipliers][::-1]
        num_res_blocks = config.num_res_blocks[::-1]
        top = [nn.Conv3d(config.latent_dim, channels[0], 1)]
        blocks: list[nn.Module] = [nn.ModuleList(top + [ResBlock(channels[0]) for _ in range(num_res_blocks[0])])]
        expansions = zip(config.temporal_expansions[::-1], config.spatial_expansions[::-1], strict=True)
        for i, (temporal, spatial) in enumerate(expansions):
            blocks.append(UpsampleBlock(channels[i], channels[i + 1], num_res_blocks[i + 1], temporal, spatial))
        blocks.append(nn.ModuleList(ResBlock(channels[-1]) for _ in range(num_res_blocks[-1])))
        self.blocks = nn.ModuleList(blocks)
        self.output_proj = PointwiseConv(channels[-1], config.out_channels)

    def forward(self, vae_latents: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Decodes VAE latents (B, 12, T, h, w) to pixels (B, 3, F, H, W), not clamped, in the weights' dtype."""
        first, *top = self.blocks[0].children()
        assert isinstance(first, nn.Conv3d)
        x = pointwise(vae_latents.to(first.weight.dtype), first.weight.flatten(1), first.bias)
        for block in [*top, *self.blocks[1:-1], *self.blocks[-1].children()]:
            x = block(x, cache)
        return self.output_proj(F.silu(x))
