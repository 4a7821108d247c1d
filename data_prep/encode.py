"""Encodes clips and captions with the frozen models: the VAE's posterior and T5's features."""

import torch
from torch import Tensor

from mochi_tune.errors import DataError
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import Encoder, frames_to_pixels
from mochi_tune.models.vae_streaming import encode


def encode_frames(encoder: Encoder, frames: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Encodes one clip to the posterior of its VAE latents.

    Args:
        encoder: On the device to use.
        frames: uint8 (F, H, W, 3), F = 6k+1.
        name: Of the clip, for errors.

    Returns:
        mean and logvar, fp32 (12, T, h, w) on the CPU.

    Raises:
        DataError: The GPU ran out of memory, or the encoder returned NaN or infinity.
    """
    try:
        with torch.inference_mode():
            mean, logvar = encode(encoder, frames_to_pixels(frames[None]))
    except torch.OutOfMemoryError as error:
        num_frames, height, width, _ = frames.shape
        raise DataError(
            f"{name}: encoding {num_frames} frames of {width}x{height} needs more memory than this GPU has free: "
            "lower data.num_frames or data.height and data.width, or free the GPU."
        ) from error
    hint = "the weights are damaged or overflow; check them, or set model.dtype=fp32."
    _check_finite(f"{name}: the latents", hint, mean, logvar)
    return mean[0].cpu(), logvar[0].cpu()


def encode_caption(text_encoder: TextEncoder, caption: str, name: str) -> tuple[Tensor, int]:
    """Encodes one caption to the features of its valid tokens.

    Args:
        text_encoder: On the device to use.
        caption: Text; "" has no tokens.
        name: Of the clip, for errors.

    Returns:
        prompt_embeds, fp32 (n, width) on the CPU, n at most 256; and the number of tokens before truncation to 256.

    Raises:
        DataError: The text encoder returned NaN or infinity.
    """
    prompt_embeds = text_encoder.encode([caption])[0]
    _check_finite(f"{name}: the features of its caption", "T5's weights are damaged; fetch them again.", prompt_embeds)
    return prompt_embeds.cpu(), text_encoder.count_tokens(caption) if caption else 0


def _check_finite(what: str, hint: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise DataError(f"{what} are not finite, and were not cached: {hint}")
