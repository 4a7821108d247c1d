"""AsymmVAE, the causal video autoencoder of Mochi 1, in the official checkpoints' parameter names.

Shape letters: B batch, C channels, F pixel frames, T frames inside the network, H W rows and columns inside it.

Convolutions are causal in time, so a clip may go through them in chunks: a `cache` knows the frames before a chunk, and
the result is that of the whole clip. Without a cache, the input is the whole clip. Attention takes whole clips only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32
# CUDA attention kernels put rows on a grid axis of 65535 at most.
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


class FrameCache:
    """The last two frames of the previous chunk, layer by layer; a new one for each clip."""

    def __init__(self) -> None:
        self._past: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def previous_frames(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the two frames before the chunk x (B, C, T, H, W), and keeps the last two of x for the next call.

        Before a clip's first chunk its first frame is repeated.
        """
        past = self._past[layer] if layer in self._past else x[:, :, :1].expand(-1, -1, 2, -1, -1)
        # A copy, as a view would hold the whole chunk.
        self._past[layer] = torch.cat([past, x[:, :, -2:]], dim=2)[:, :, -2:].clone()
        return past

    def is_first_chunk(self, layer: nn.Module) -> bool:
        """Whether the chunk is the clip's first; each layer asks once a chunk."""
        first = layer not in self._begun
        self._begun.add(layer)
        return first


def frames_to_pixels(frames: Tensor) -> Tensor:
    """Turns uint8 frames (B, F, H, W, 3) into fp32 pixels (B, 3, F, H, W) in [-1, 1].

    Divided in fp32, exactly so: the encoder's sines amplify the rounding of any other form.
    """
    # A tensor on the same device: by a Python number, CUDA would multiply by its rounded reciprocal.
    half = torch.tensor(127.5, device=frames.device)
    return frames.permute(0, 4, 1, 2, 3).float() / half - 1.0


def pixels_to_frames(pixels: Tensor) -> Tensor:
    """Turns decoded pixels (B, 3, F, H, W) into uint8 frames (B, F, H, W, 3), clamped and rounded."""
    unit = ((pixels.float() + 1) / 2).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)


def fourier_features(pixels: Tensor) -> Tensor:
    """Appends the sines and cosines of 2 pi 2^f times each colour, f = 6, 7; (B, 3, ...) to (B, 15, ...).

    Source: genmoai/mochi@0c86aeb vae/models.py (add_fourier_features).
    """
    assert pixels.dtype == torch.float32, f"the sines amplify rounding: pixels must be fp32, not {pixels.dtype}"
    angular = torch.tensor([2 * math.pi * 2**f for f in (6, 7)], device=pixels.device)
    angles = (pixels.unsqueeze(2) * angular.view(-1, *[1] * (pixels.ndim - 2))).flatten(1, 2)
    return torch.cat([pixels, angles.sin(), angles.cos()], dim=1)


class FrameNorm(nn.GroupNorm):
    """GroupNorm of 32 groups over each frame by itself, computed in fp32 and followed by a SiLU where asked."""

    def __init__(self, channels: int, silu: bool = True) -> None:
        super().__init__(32, channels, eps=1e-5)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """Norms (B, C, T, H, W); frame by frame where a copy of the whole in fp32 would cost memory."""
        if x.dtype == torch.float32 or x.requires_grad:
            normed = self._norm(x.transpose(1, 2).flatten(0, 1).float()).to(x.dtype)
            return normed.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        out = torch.empty_like(x)
        for t in range(x.shape[2]):
            out[:, :, t] = self._norm(x[:, :, t].float())
        return out

    def _norm(self, frames: Tensor) -> Tensor:
        normed = F.group_norm(frames, self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return F.silu(normed) if self.silu else normed


class PointwiseConv(nn.Linear):
    """A 1x1x1 convolution over (B, C, T, H, W), stored as a Linear weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps the channels of (B, C, T, H, W)."""
        return F.conv3d(x, self.weight[:, :, None, None, None], self.bias)


class CausalConv(nn.Conv3d):
    """A 3x3x3 convolution that sees two frames of the past and none of the future; replicated at every border."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        num_missing = 2
        if cache is not None:
            x, num_missing = torch.cat([cache.previous_frames(self, x), x], dim=2), 0
        return super().forward(F.pad(x, (1, 1, 1, 1, num_missing, 0), mode="replicate"))


class TemporalAttention(nn.Module):
    """Causal attention over time alone, at each pixel, with L2-normed queries and keys.

    Source: genmoai/mochi@0c86aeb vae/models.py (Attention, AttentionBlock).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        batch, _, _, height, width = x.shape
        rows = x.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B H W, T, C)
        q, k, v = self.qkv(rows).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)  # (rows, heads, T, 32) each
        q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) for t in (q, k))
        parts = zip(*(t.split(MAX_ATTENTION_ROWS) for t in (q, k, v)), strict=True)
        attended = torch.cat([F.scaled_dot_product_attention(*part, is_causal=True) for part in parts])
        out = self.out(attended.transpose(1, 2).flatten(2))
        return out.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2)


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
    """A residual block of two causal convolutions, each after its norm, then attention where the level has it.

    Source: genmoai/mochi@0c86aeb vae/models.py (ResBlock).
    """

    def __init__(self, channels: int, attention: bool = False) -> None:
        super().__init__()
        # The official names are those of a Sequential of norm, SiLU, conv, norm, SiLU, conv.
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
        """The block without its attention."""
        h = self.stack["2"](self.stack["0"](x), cache)
        return x + self.stack["5"](self.stack["3"](h), cache)


class Downsample(nn.Conv3d):
    """A strided convolution that shrinks time by `temporal` and space by `spatial`, causal in time."""

    def __init__(self, in_channels: int, out_channels: int, temporal: int, spatial: int) -> None:
        kernel = (temporal, spatial, spatial)
        super().__init__(in_channels, out_channels, kernel, stride=kernel)

    def forward(self, x: Tensor, cache: FrameCache | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', H / spatial, W / spatial)."""
        if cache is None or cache.is_first_chunk(self):
            x = F.pad(x, (0, 0, 0, 0, self.stride[0] - 1, 0), mode="replicate")
        return super().forward(x)


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
        x = self.proj(x).unflatten(1, (-1, self.temporal, self.spatial, self.spatial))  # (B, C', t, s, s, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
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
        """Maps fp32 pixels (B, 3, F, H, W) to what the first residual block takes."""
        return self.layers[0](fourier_features(pixels).to(self.output_proj.weight.dtype))

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps what the last layer gave to mean and log-variance, fp32."""
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
        x = first(vae_latents.to(next(first.parameters()).dtype))
        for block in [*top, *self.blocks[1:-1], *self.blocks[-1].children()]:
            x = block(x, cache)
        return self.output_proj(F.silu(x))
