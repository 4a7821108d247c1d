"""Estimates the GPU memory, by purpose, and the seconds of `sample`, as `forecast` those of a training."""

import math
from dataclasses import dataclass

from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.flops import dit_flops
from mochi_tune.models.latents import SPATIAL_FACTOR
from mochi_tune.models.text_encoder import MAX_TOKENS
from mochi_tune.models.vae_streaming import OVERLAP, WHOLE, Tiles
from mochi_tune.parallel.forecast import (
    ATTENTION_SHARE,
    BASE_BYTES,
    INSIDE_BYTES,
    MATRIX_SHARE,
    MOVED_BYTES,
    Card,
    weight_bytes,
)

# Visual tokens below which copying offloaded weights over PCIe takes longer than a pass. The two passes of guidance
# then run as one batch.
MAX_ONE_BATCH_TOKENS = 16000
# Bytes, per visual token and unit of the visual width, of the fp32 copies that rounding to fp8 holds in blocks which
# are not compiled.
EAGER_FP8_BYTES = 41
# Bytes per pixel of the decoder in chunks of time, and per pixel of the largest of several tiles. The second one was
# counted on tensors without data at full size, not measured.
DECODER_PIXEL_BYTES, TILE_PIXEL_BYTES = 12700, 6600
DECODER_PARAMETERS = 0.362e9
# FLOPs per pixel of one frame, and the rate that the decoder reaches relative to that of matrix products.
DECODER_PIXEL_FLOPS, DECODER_SHARE = 243e12 / (37 * 480 * 848), 0.59


def sampling_held(
    config: DiTConfig,
    num_tokens: int,
    dit: str,
    dtype_bytes: int = 2,
    num_sharing: int = 2,
    is_compiled: bool = True,
) -> dict[str, int]:
    """Returns the bytes on the device while the DiT samples.

    Args:
        config: sizes of the DiT.
        num_tokens: visual tokens of one video on this process.
        dit: `memory.dit`.
        dtype_bytes: bytes of one number of the DiT.
        num_sharing: number of processes of one video, over which "shard" splits the weights.
        is_compiled: whether the blocks are compiled. If not, rounding to fp8 holds fp32 copies.
    """
    weights = weight_bytes(config, dtype_bytes, "bf16")
    blocks = weights["blocks"] // (2 if dit in ("int8", "fp8") and dtype_bytes == 2 else 1)
    # Two offloaded blocks are on the device at a time.
    two = 2 * blocks // config.depth
    blocks = {"offload": two, "stream": two, "shard": blocks // num_sharing}.get(dit, blocks)
    inside = INSIDE_BYTES["sample"]
    if dit == "fp8" and dtype_bytes == 2 and not is_compiled:
        inside += EAGER_FP8_BYTES
    elif dit in ("offload", "stream") and num_tokens < MAX_ONE_BATCH_TOKENS:
        inside *= 2
    return {
        "weights": blocks + weights["rest"],
        "largest block": inside * num_tokens * config.hidden_size_x,
        "other": BASE_BYTES,
    }


@dataclass(frozen=True)
class SamplingStep:
    """A step of the sampler.

    Attributes:
        config: sizes of the DiT.
        num_tokens: visual tokens of the video.
        dit: `memory.dit`.
        passes: forward passes; 2 with guidance, and a fraction for the mean of steps with and without it.
        num_sharing: number of processes that share the tokens.
        dtype_bytes: bytes of one number of the DiT.
    """

    config: DiTConfig
    num_tokens: int
    dit: str = "resident"
    passes: float = 2
    num_sharing: int = 1
    dtype_bytes: int = 2


def sampling_seconds(step: SamplingStep, card: Card) -> float:
    """Returns the seconds of a step of the sampler with the longest prompt, without communication of processes."""
    config, width = step.config, step.config.hidden_size_x
    matrix, attention = dit_flops(config, step.num_tokens, MAX_TOKENS)
    moved = MOVED_BYTES["sample"] * step.num_tokens * width * config.depth
    rate = card.matrix * MATRIX_SHARE * (2 if step.dit == "fp8" and card.has_fp8 else 1)
    one_pass = matrix / rate + attention / (card.matrix * ATTENTION_SHARE) + moved / card.bandwidth
    # Each process copies offloaded weights once per pass, in parallel with the arithmetic.
    is_copied = step.dit in ("offload", "stream")
    copied = weight_bytes(config, step.dtype_bytes)["blocks"] / card.host if is_copied else 0
    return step.passes * max(one_pass / step.num_sharing, copied)


def decoding_held(height: int, width: int, tiles: Tiles = WHOLE, dtype_bytes: int = 2) -> dict[str, int]:
    """Returns the bytes on each device while a video of any length is decoded, by any number of processes.

    Args:
        height: in pixels.
        width: in pixels.
        tiles: number of tiles over rows and over columns. The frames that tiles wait for are in host memory.
        dtype_bytes: bytes of one number of the decoder.
    """
    sizes = zip((height, width), tiles, strict=True)
    # Rows and columns of the largest tile.
    pixels = math.prod(SPATIAL_FACTOR * -(-(size // SPATIAL_FACTOR + (n - 1) * OVERLAP) // n) for size, n in sizes)
    held = int((DECODER_PIXEL_BYTES if tiles == WHOLE else TILE_PIXEL_BYTES) * pixels * dtype_bytes / 2)
    return {"weights": int(DECODER_PARAMETERS * dtype_bytes), "largest block": held, "other": BASE_BYTES}


def decoding_seconds(num_frames: int, height: int, width: int, card: Card) -> float:
    """Returns the seconds of decoding a video in bf16."""
    return DECODER_PIXEL_FLOPS * num_frames * height * width / (card.matrix * MATRIX_SHARE * DECODER_SHARE)
