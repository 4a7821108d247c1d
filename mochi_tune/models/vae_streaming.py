"""Runs the AsymmVAE on clips of any length in little memory: in chunks of time, which is exact, or in spatial tiles.

Shape letters: B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent rows and columns.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import ConfigError
from mochi_tune.models.latents import SPATIAL_FACTOR, TEMPORAL_FACTOR
from mochi_tune.models.vae import (
    AttentionBlock,
    Decoder,
    DownsampleBlock,
    Encoder,
    FrameCache,
    ResBlock,
    pixels_to_frames,
)
from mochi_tune.models.vae_layers import HostFrames

# Number of tiles over rows and over columns.
Tiles = tuple[int, int]
WHOLE: Tiles = (1, 1)
# Latents that neighbouring tiles share: twice the overlap of the official decoder, for half the error.
OVERLAP = 8
# Maximum tokens (feature pixels times frames) of one call of attention.
ATTENTION_TOKENS = 2**18


@torch.no_grad()
def encode(encoder: Encoder, pixels: Tensor, chunk_latent_frames: int = 1) -> tuple[Tensor, Tensor]:
    """Encodes clips of 6k+1 frames exactly: convolutions chunk by chunk, attention over the whole clip.

    Attention needs its complete input and the norm of it in memory, at most at the size after the first downsampling.
    No other memory grows with the length of the clip. Mochi's encoder takes 3.5 GB for 37 frames of 480x848 in bf16.

    Args:
        encoder: the encoder; its device computes.
        pixels: fp32 in [-1, 1], (B, 3, F, H, W), on any device.
        chunk_latent_frames: number of latent frames to convolve at a time.

    Returns:
        The mean and the log-variance of the VAE latents, fp32 (B, 12, T, h, w), on the encoder's device.
    """
    device = encoder.output_proj.weight.device
    step = chunk_latent_frames * TEMPORAL_FACTOR
    first = step - TEMPORAL_FACTOR + 1
    chunks = [part for part in (pixels[:, :, :first], *pixels[:, :, first:].split(step, dim=2)) if part.shape[2]]
    for convolutions, attention in _stages(encoder):
        cache = FrameCache()
        for i, x in enumerate(chunks):
            x = x.to(device)
            for convolve in convolutions:
                x = convolve(x, cache)
            chunks[i] = x
        if attention is not None:
            _attend(attention, chunks)
    outputs = [encoder.posterior(chunk) for chunk in chunks]
    return torch.cat([mean for mean, _ in outputs], dim=2), torch.cat([logvar for _, logvar in outputs], dim=2)


Convolve = Callable[[Tensor, FrameCache], Tensor]


def _stages(encoder: Encoder) -> list[tuple[list[Convolve], AttentionBlock | None]]:
    """Returns the encoder's layers in order: runs of convolutions, each with the attention that follows it."""
    stages: list[tuple[list[Convolve], AttentionBlock | None]] = []
    run: list[Convolve] = [lambda pixels, _cache: encoder.embed(pixels)]
    for layer in encoder.layers[1:]:
        for part in layer.layers if isinstance(layer, DownsampleBlock) else [layer]:
            if isinstance(part, ResBlock) and part.attention:
                stages.append(([*run, part.convolve], part.attn_block))
                run = []
            else:
                run.append(part)
    return [*stages, (run, None)] if run else stages


def _attend(block: AttentionBlock, chunks: list[Tensor]) -> None:
    """Adds a block's attention to the chunks (B, C, frames, rows, columns) of a clip in place, a few rows at a time."""
    normed = [block.norm(chunk) for chunk in chunks]
    lengths = [chunk.shape[2] for chunk in chunks]
    batch, _, _, height, width = chunks[0].shape
    num_rows = max(1, ATTENTION_TOKENS // (batch * width * sum(lengths)))
    for row in range(0, height, num_rows):
        rows = slice(row, row + num_rows)
        attended = block.attn(torch.cat([part[..., rows, :] for part in normed], dim=2))
        for chunk, part in zip(chunks, attended.split(lengths, dim=2), strict=True):
            chunk[..., rows, :] += part


@torch.no_grad()
def decode_chunks(
    decoder: Decoder, vae_latents: Tensor, chunk_latent_frames: int = 1, tiles: Tiles = WHOLE
) -> Iterator[Tensor]:
    """Decodes in chunks of time and yields uint8 frames (B, F', H, W, 3) on the CPU; peak memory is independent of T.

    Args:
        decoder: the decoder; its device computes.
        vae_latents: (B, 12, T, h, w).
        chunk_latent_frames: number of latent frames to decode at a time.
        tiles: as for `decode_tiled`; only WHOLE is exact.
    """
    device = decoder.output_proj.weight.device
    caches = [FrameCache(frames) for frames in frames_by_tile(tiles)]
    for part in vae_latents.split(chunk_latent_frames, dim=2):
        yield pixels_to_frames(decode_tiled(decoder, part.to(device), tiles, caches)).cpu()


def frames_by_tile(tiles: Tiles) -> list[dict[nn.Module, Tensor] | HostFrames]:
    """Returns where the cache of each tile holds its frames: in host memory, if there are others that it waits for."""
    return [{} if tiles == WHOLE else HostFrames() for _ in range(math.prod(tiles))]


def decode_tiled(
    decoder: Decoder, vae_latents: Tensor, tiles: Tiles, caches: Sequence[Any] | None = None, overlap: int = OVERLAP
) -> Tensor:
    """Decodes spatial tiles and blends their overlaps: an approximation, because each tile is normed separately.

    Over n pixels of overlap, the later tile has the weight (i + 1) / (n + 1) at pixel i.
    Source: genmoai/mochi@0c86aeb vae/models.py (decode_latents_tiled_spatial).

    Args:
        decoder: on the device of the latents.
        vae_latents: (B, 12, T, h, w), of a size that `check_tiles` accepts.
        tiles: number of tiles over rows and over columns; WHOLE runs the decoder once, without tiles.
        caches: one cache for each tile, passed to the decoder; None if the latents are the whole clip.
        overlap: number of latents that neighbouring tiles share.

    Returns:
        Pixels (B, 3, F, H, W), not clamped.
    """
    remaining = iter(caches if caches is not None else [None] * math.prod(tiles))
    rows = _tile_slices(vae_latents.shape[3], tiles[0], overlap)
    columns = _tile_slices(vae_latents.shape[4], tiles[1], overlap)
    spatial = math.prod(decoder.config.spatial_expansions)
    bands = []
    for row in rows:
        band = [decoder(vae_latents[:, :, :, row, column], next(remaining)) for column in columns]
        bands.append(_blend(band, overlap * spatial, dim=4))
    return _blend(bands, overlap * spatial, dim=3)


def check_tiles(tiles: Sequence[int], height: int, width: int) -> None:
    """Refuses tiles that would be shorter than one and a half times their overlap.

    Args:
        tiles: number of tiles over rows and over columns.
        height: in pixels.
        width: in pixels.

    Raises:
        ConfigError: there are too many tiles; names the most that fit.
    """
    possible = [max(1, (size // SPATIAL_FACTOR - OVERLAP) // (OVERLAP // 2)) for size in (height, width)]
    if len(tiles) != 2 or any(not 1 <= n <= most for n, most in zip(tiles, possible, strict=True)):
        raise ConfigError(
            f"memory.tiles={list(tiles)} does not fit {height}x{width} pixels: give rows and columns, "
            f"at most {possible}, of tiles that share {OVERLAP * SPATIAL_FACTOR} pixels."
        )


def _tile_slices(size: int, num_tiles: int, overlap: int) -> list[slice]:
    length, more = divmod(size + (num_tiles - 1) * overlap, num_tiles)
    assert length > overlap or num_tiles == 1, f"{size} latents are too few for {num_tiles} tiles that share {overlap}"
    starts = [i * (length - overlap) + min(i, more) for i in range(num_tiles)]
    return [slice(start, start + length + (i < more)) for i, start in enumerate(starts)]


def _blend(tiles: list[Tensor], overlap: int, dim: int) -> Tensor:
    if len(tiles) == 1:
        return tiles[0]
    ramp = torch.arange(1, overlap + 1, dtype=torch.float32, device=tiles[0].device) / (overlap + 1)
    ramp = ramp.view(-1, *[1] * (tiles[0].ndim - 1 - dim)).to(tiles[0].dtype)
    out = tiles[0]
    for tile in tiles[1:]:
        size = out.shape[dim]
        seam = out.narrow(dim, size - overlap, overlap) * (1 - ramp) + tile.narrow(dim, 0, overlap) * ramp
        rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
        out = torch.cat([out.narrow(dim, 0, size - overlap), seam, rest], dim=dim)
    return out
