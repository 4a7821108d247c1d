"""The training objective: what is mixed, what is predicted, and how far off the prediction is.

sigma in [0, 1] is the share of noise: noisy = (1 - sigma) * clean + sigma * noise. The model predicts clean - noise.
"""

import torch
from torch import Tensor

from mochi_tune.models.latents import to_latents

OBJECTIVES = ("sampler", "official", "unnormalised")


def draw_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draws VAE latents from N(mean, exp(logvar)) with standard normal `noise` of the same shape; fp32."""
    return mean.float() + torch.exp(0.5 * logvar.float()) * noise.float()


def noisy_and_target(objective: str, vae_latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes noise into a clip and returns the model's input and the velocity that it should predict, both fp32.

    "sampler" works in the space that the sampler works in, so that what is learnt is what is rendered.
    "official" is the reference fine-tuner's: its input is mixed in the VAE's space, its target has a noise of
    1 / std in the DiT's. It is here to reproduce that trainer's runs. "unnormalised" stays in the VAE's space
    altogether, as other trainers do.
    Source: genmoai/mochi@0c86aeb demos/fine_tuner/train.py:358-372 ("official").

    Args:
        objective: one of OBJECTIVES.
        vae_latents: VAE space, (B, C, T, h, w).
        noise: standard normal, (B, C, T, h, w).
        sigma: (B,) in [0, 1].
    """
    assert objective in OBJECTIVES, objective
    sigma = sigma.float().view(-1, 1, 1, 1, 1)
    if objective == "unnormalised":
        return (1 - sigma) * vae_latents + sigma * noise, vae_latents - noise
    if objective == "official":
        return (1 - sigma) * vae_latents + sigma * noise, to_latents(vae_latents - noise)
    latents = to_latents(vae_latents)
    return (1 - sigma) * latents + sigma * noise, latents - noise


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each row, fp32, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)
