"""Running the AsymmVAE on clips of any length in little memory: in chunks of time, exactly, or in spatial tiles.

Shape letters: B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent rows and columns.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mochi_tune.models.latents import TEMPORAL_FACTOR
from mochi_tune.models.vae import AttentionBlock, Carry, Decoder, DownsampleBlock, Encoder, pixels_to_frames

# Pixels times frames that attention takes at a time.
ATTENTION_TOKENS = 2**18


@torch.no_grad()
def encode(
    encoder: Encoder, pixels: Tensor, chunk_latent_frames: int = 1, keep_on: str | torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Encodes a clip of 6k+1 frames; exact. Convolutions go chunk by chunk, attention after them over the whole clip.

    Around an attention the clip and its norm are held whole, at most as they are after the first downsampling; no other
    memory grows with its length. Mochi's encoder takes 11 GB for 163 frames of 480x848 in bf16, 4 GB for 37.

    Args:
        encoder: on the device of the work.
        pixels: fp32 in [-1, 1], (B, 3, F, H, W), on any device.
        chunk_latent_frames: latent frames to convolve at a time.
        keep_on: where the clip is held between; the encoder's device by default, "cpu" for the least of its memory.

    Returns:
        The mean and the log-variance of the VAE latents, fp32 (B, 12, T, h, w), on the encoder's device.
    """
    device = encoder.output_proj.weight.device
    keep_on = device if keep_on is None else keep_on
    step = chunk_latent_frames * TEMPORAL_FACTOR
    first = step - TEMPORAL_FACTOR + 1
    chunks = [part for part in (pixels[:, :, :first], *pixels[:, :, first:].split(step, dim=2)) if part.shape[2]]
    for convolutions, attention in _stages(encoder):
        carry = Carry()
        for i, x in enumerate(chunks):
            x = x.to(device)
            for convolve in convolutions:
                x = convolve(x, carry)
            chunks[i] = x.to(keep_on)
        if attention is not None:
            _attend(attention, chunks, device)
    outputs = [encoder.posterior(chunk.to(device)) for chunk in chunks]
    return torch.cat([mean for mean, _ in outputs], dim=2), torch.cat([logvar for _, logvar in outputs], dim=2)


Convolve = Callable[[Tensor, Carry], Tensor]


def _stages(encoder: Encoder) -> list[tuple[list[Convolve], AttentionBlock | None]]:
    """The encoder's layers in order: runs of convolutions, each with the attention that follows it."""
    stages: list[tuple[list[Convolve], AttentionBlock | None]] = []
    run: list[Convolve] = [lambda pixels, _carry: encoder.embed(pixels)]
    for layer in encoder.layers[1:]:
        for part in layer.layers if isinstance(layer, DownsampleBlock) else [layer]:
            if getattr(part, "attention", False):
                stages.append(([*run, part.convolve], part.attn_block))
                run = []
            else:
                run.append(part)
    return [*stages, (run, None)] if run else stages


def _attend(block: AttentionBlock, chunks: list[Tensor], device: torch.device) -> None:
    """Adds a block's attention to the chunks of a clip, (B, C, T', H, W) each, in place, some rows at a time."""
    normed = [block.norm(chunk.to(device)).to(chunk.device) for chunk in chunks]
    lengths = [chunk.shape[2] for chunk in chunks]
    batch, _, _, height, width = chunks[0].shape
    num_rows = max(1, ATTENTION_TOKENS // (batch * width * sum(lengths)))
    for row in range(0, height, num_rows):
        rows = slice(row, row + num_rows)
        attended = block.attn(torch.cat([part[..., rows, :].to(device) for part in normed], dim=2))
        for chunk, part in zip(chunks, attended.split(lengths, dim=2), strict=True):
            chunk[..., rows, :] += part.to(chunk.device)


@torch.no_grad()
def decode_chunks(decoder: Decoder, vae_latents: Tensor, chunk_latent_frames: int = 1) -> Iterator[Tensor]:
    """Decodes in chunks of time, yielding uint8 frames (B, F', H, W, 3) on the CPU; exact, at a flat peak memory.

    Args:
        decoder: on the device of the work.
        vae_latents: (B, 12, T, h, w).
        chunk_latent_frames: latent frames to decode at a time.
    """
    device = decoder.output_proj.weight.device
    carry = Carry()
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
