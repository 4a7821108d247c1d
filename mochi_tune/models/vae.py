"""AsymmVAE, the causal video autoencoder of Mochi 1, in the official checkpoints' parameter names.

Shape letters: B batch, C channels, F pixel frames, T frames inside the network, H W rows and columns inside it.

Everything is causal in time, so a clip may go through in chunks: each layer keeps what it needs of the past in a
`carry`, a dict that the caller makes empty before the first chunk and hands to every following one. The result is
that of the whole clip. Without a carry, the input is the whole clip.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.latents import TEMPORAL_FACTOR

Carry = dict[nn.Module, object]

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

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        past = None if carry is None else carry.get(self)
        if carry is not None:
            first = x[:, :, :1].expand(-1, -1, 2, -1, -1) if past is None else past
            carry[self] = torch.cat([first, x[:, :, -2:]], dim=2)[:, :, -2:].clone()
        if past is not None:
            x = torch.cat([past, x], dim=2)
        x = F.pad(x, (1, 1, 1, 1, 0 if past is not None else 2, 0), mode="replicate")
        return super().forward(x)


class TemporalAttention(nn.Module):
    """Causal attention over time alone, at each pixel, with L2-normed queries and keys.

    Source: genmoai/mochi@0c86aeb vae/models.py (Attention, AttentionBlock).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        batch, _, _, height, width = x.shape
        rows = x.permute(0, 3, 4, 2, 1).flatten(0, 2)  # (B H W, T, C)
        q, k, v = self.qkv(rows).unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)  # (rows, heads, T, 32) each
        q, k = (F.normalize(t.float(), dim=-1).to(t.dtype) for t in (q, k))
        num_past = 0
        if carry is not None:
            if self in carry:
                past_k, past_v = carry[self]
                num_past = past_k.shape[2]
                k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
            carry[self] = (k, v)
        num_new = q.shape[2]
        mask = torch.ones(num_new, num_past + num_new, dtype=torch.bool, device=x.device).tril(num_past)
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(*(t[i : i + MAX_ATTENTION_ROWS] for t in (q, k, v)), attn_mask=mask)
                for i in range(0, q.shape[0], MAX_ATTENTION_ROWS)
            ]
        )
        out = self.out(attended.transpose(1, 2).flatten(2))
        return out.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2)


class AttentionBlock(nn.Module):
    """Adds temporal attention of the normed input to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels, silu=False)
        self.attn = TemporalAttention(channels)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        return x + self.attn(self.norm(x), carry)


class ResBlock(nn.Module):
    """Two normed causal convolutions around a residual, then attention where the level has it.

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

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        h = self.stack["2"](self.stack["0"](x), carry)
        x = x + self.stack["5"](self.stack["3"](h), carry)
        return self.attn_block(x, carry) if self.attention else x


class Downsample(nn.Conv3d):
    """A strided convolution that shrinks time by `temporal` and space by `spatial`, causal in time."""

    def __init__(self, in_channels: int, out_channels: int, temporal: int, spatial: int) -> None:
        kernel = (temporal, spatial, spatial)
        super().__init__(in_channels, out_channels, kernel, stride=kernel)

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', H / spatial, W / spatial)."""
        first_chunk = carry is None or self not in carry
        if carry is not None:
            carry[self] = True
        if first_chunk:
            x = F.pad(x, (0, 0, 0, 0, self.stride[0] - 1, 0), mode="replicate")
        return super().forward(x)


class DownsampleBlock(nn.Module):
    """A downsample and the residual blocks at the smaller size."""

    def __init__(self, down: Downsample, num_res_blocks: int, attention: bool) -> None:
        super().__init__()
        res_blocks = [ResBlock(down.out_channels, attention) for _ in range(num_res_blocks)]
        self.layers = nn.ModuleList([down, *res_blocks])

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to the next level."""
        for layer in self.layers:
            x = layer(x, carry)
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

    def forward(self, x: Tensor, carry: Carry | None = None) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', T', spatial * H, spatial * W)."""
        for block in self.blocks:
            x = block(x, carry)
        first_chunk = carry is None or self not in carry
        if carry is not None:
            carry[self] = True
        x = self.proj(x).unflatten(1, (-1, self.temporal, self.spatial, self.spatial))  # (B, C', t, s, s, T, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.temporal - 1 :] if first_chunk else x


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

    def forward(self, pixels: Tensor, carry: Carry | None = None) -> tuple[Tensor, Tensor]:
        """Encodes fp32 pixels (B, 3, F, H, W) to mean and log-variance of the VAE latents, fp32 (B, 12, T, h, w)."""
        x = fourier_features(pixels).to(self.output_proj.weight.dtype)
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(x, carry)
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

    def forward(self, vae_latents: Tensor, carry: Carry | None = None) -> Tensor:
        """Decodes VAE latents (B, 12, T, h, w) to pixels (B, 3, F, H, W), not clamped, in the weights' dtype."""
        first, *top = self.blocks[0]
        x = first(vae_latents.to(first.weight.dtype))
        for block in [*top, *self.blocks[1:-1], *self.blocks[-1]]:
            x = block(x, carry)
        return self.output_proj(F.silu(x))


def encode(encoder: Encoder, pixels: Tensor, chunk_latent_frames: int = 1) -> tuple[Tensor, Tensor]:
    """Encodes a clip of 6k+1 frames in chunks of time; exact. Activations do not grow with its length.

    Keys and values do, which attention carries for all earlier frames: in Mochi's encoder at 480x848 in bf16 they are
    1.34 GB a latent frame, 0.94 of it in the first level that has attention.

    Args:
        encoder: on the device of the work.
        pixels: fp32 in [-1, 1], (B, 3, F, H, W), on any device.
        chunk_latent_frames: latent frames to encode at a time.

    Returns:
        The mean and the log-variance of the VAE latents, fp32 (B, 12, T, h, w), on the encoder's device.
    """
    device = encoder.output_proj.weight.device
    carry: Carry = {}
    step = chunk_latent_frames * TEMPORAL_FACTOR
    parts = [pixels[:, :, : step - TEMPORAL_FACTOR + 1], *pixels[:, :, step - TEMPORAL_FACTOR + 1 :].split(step, dim=2)]
    outputs = [encoder(part.to(device), carry) for part in parts if part.shape[2]]
    return torch.cat([mean for mean, _ in outputs], dim=2), torch.cat([logvar for _, logvar in outputs], dim=2)


def decode_chunks(decoder: Decoder, vae_latents: Tensor, chunk_latent_frames: int = 1) -> Iterator[Tensor]:
    """Decodes in chunks of time, yielding uint8 frames (B, F', H, W, 3) on the CPU; exact, at a flat peak memory.

    Args:
        decoder: on the device of the work.
        vae_latents: (B, 12, T, h, w).
        chunk_latent_frames: latent frames to decode at a time.
    """
    device = decoder.output_proj.weight.device
    carry: Carry = {}
    for part in vae_latents.split(chunk_latent_frames, dim=2):
        yield pixels_to_frames(decoder(part.to(device), carry)).cpu()


def decode_tiled(
    decoder: Decoder, vae_latents: Tensor, num_tiles: tuple[int, int] = (2, 2), overlap: int = 4
) -> Tensor:
    """Decodes spatial tiles and blends their overlaps: an approximation, as each tile is normed by itself.

    Over n pixels of overlap, pixel i weights the later tile (i + 1) / (n + 1).
    Source: genmoai/mochi@0c86aeb vae/models.py (decode_latents_tiled_spatial).

    Args:
        decoder: on the device of the latents.
        vae_latents: (B, 12, T, h, w).
        num_tiles: tiles over rows and over columns; each axis must split evenly with its overlaps.
        overlap: latents that neighbouring tiles share.

    Returns:
        Pixels (B, 3, F, H, W), not clamped.
    """
    rows = _tile_slices(vae_latents.shape[3], num_tiles[0], overlap)
    columns = _tile_slices(vae_latents.shape[4], num_tiles[1], overlap)
    spatial = math.prod(decoder.config.spatial_expansions)
    bands = []
    for row in rows:
        tiles = [decoder(vae_latents[:, :, :, row, column]) for column in columns]
        bands.append(_blend(tiles, overlap * spatial, dim=4))
    return _blend(bands, overlap * spatial, dim=3)


def _tile_slices(size: int, num_tiles: int, overlap: int) -> list[slice]:
    length, rest = divmod(size + (num_tiles - 1) * overlap, num_tiles)
    assert rest == 0 and length > overlap, f"{size} latents do not split into {num_tiles} tiles that share {overlap}"
    return [slice(i * (length - overlap), i * (length - overlap) + length) for i in range(num_tiles)]


def _blend(tiles: list[Tensor], overlap: int, dim: int) -> Tensor:
    if overlap == 0:
        return torch.cat(tiles, dim=dim)
    ramp = torch.arange(1, overlap + 1, dtype=torch.float32, device=tiles[0].device) / (overlap + 1)
    ramp = ramp.view(-1, *[1] * (tiles[0].ndim - 1 - dim)).to(tiles[0].dtype)
    out = tiles[0]
    for tile in tiles[1:]:
        size = out.shape[dim]
        seam = out.narrow(dim, size - overlap, overlap) * (1 - ramp) + tile.narrow(dim, 0, overlap) * ramp
        rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
        out = torch.cat([out.narrow(dim, 0, size - overlap), seam, rest], dim=dim)
    return out
