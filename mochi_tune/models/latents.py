"""Latent geometry and the two latent spaces. Only this module has the VAE's factors 6 and 8 and channel statistics.

Shape letters: B batch, C channels, F pixel frames, T latent frames, H W pixels, h w latent rows and columns.
"""

from typing import TYPE_CHECKING

from mochi_tune.errors import ConfigError

if TYPE_CHECKING:
    import torch

LATENT_CHANNELS = 12
TEMPORAL_FACTOR = 6
SPATIAL_FACTOR = 8
# Height and width of one DiT token in pixels: 8 of the VAE times 2 of the patch.
TOKEN_PIXELS = 16
# Frames per second of Mochi's training videos.
FPS = 30

# Source: genmoai/mochi@0c86aeb vae/vae_stats.py (channel statistics of the AsymmVAE's latents).
VAE_MEAN = (
    -0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561,
    0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976,
    -0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285,
)  # fmt: skip
VAE_STD = (
    0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592,
    0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521,
    0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041,
)  # fmt: skip


def num_latent_frames(num_frames: int) -> int:
    """Returns T for F = 6k+1 pixel frames: (F - 1) / 6 + 1."""
    return (num_frames - 1) // TEMPORAL_FACTOR + 1


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Returns (C, T, h, w) of a clip of `num_frames` frames of `height` x `width` pixels."""
    return LATENT_CHANNELS, num_latent_frames(num_frames), height // SPATIAL_FACTOR, width // SPATIAL_FACTOR


def video_size(num_latent_frames: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Returns the frames, the height and the width in pixels of the video of latents (…, T, h, w)."""
    return (num_latent_frames - 1) * TEMPORAL_FACTOR + 1, rows * SPATIAL_FACTOR, columns * SPATIAL_FACTOR


def num_visual_tokens(num_frames: int, height: int, width: int) -> int:
    """Returns the number of the DiT's visual tokens of a clip of `num_frames` frames of `height` x `width` pixels."""
    return num_latent_frames(num_frames) * height * width // TOKEN_PIXELS**2


def check_geometry(num_frames: int, height: int, width: int) -> None:
    """Refuses frame counts and sizes that do not fit the models, and names the nearest ones that do.

    Raises:
        ConfigError: `num_frames` is not 6k+1, or `height` or `width` is not a positive multiple of 16.
    """
    if num_frames < 1 or num_frames % TEMPORAL_FACTOR != 1:
        below = (max(num_frames, 0) - 1) // TEMPORAL_FACTOR * TEMPORAL_FACTOR + 1
        choices = [n for n in (below, below + TEMPORAL_FACTOR) if n >= 1]
        raise ConfigError(
            f"num_frames={num_frames} does not fit the VAE, which takes 6k+1: use {' or '.join(map(str, choices))}."
        )
    for name, size in (("height", height), ("width", width)):
        if size < TOKEN_PIXELS or size % TOKEN_PIXELS:
            below = max(size, 0) // TOKEN_PIXELS * TOKEN_PIXELS
            choices = [n for n in (below, below + TOKEN_PIXELS) if n >= TOKEN_PIXELS]
            raise ConfigError(
                f"{name}={size} does not fit the model, which takes multiples of {TOKEN_PIXELS} pixels: "
                f"use {' or '.join(map(str, choices))}."
            )


def _channel(values: tuple[float, ...], like: "torch.Tensor") -> "torch.Tensor":
    # Imported here, so that reading a constant of this module does not import torch.
    import torch

    return torch.tensor(values, dtype=torch.float32, device=like.device).view(-1, 1, 1, 1)


def to_latents(vae_latents: "torch.Tensor") -> "torch.Tensor":
    """Converts VAE latents (..., C, T, h, w) to the DiT's space, in which each channel has unit variance; fp32."""
    return (vae_latents.float() - _channel(VAE_MEAN, vae_latents)) / _channel(VAE_STD, vae_latents)


def to_vae_latents(latents: "torch.Tensor") -> "torch.Tensor":
    """Converts DiT latents (..., C, T, h, w) to the VAE's space; fp32."""
    return latents.float() * _channel(VAE_STD, latents) + _channel(VAE_MEAN, latents)
