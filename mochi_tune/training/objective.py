"""The training objective: how noise is mixed into a clip, what the model predicts, and the loss.

sigma in [0, 1] is the share of noise: noisy = (1 - sigma) * clean + sigma * noise. The model predicts clean - noise.
"""

import math

import torch
from torch import Tensor

from mochi_tune.models.latents import to_latents


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Draws VAE latents from N(mean, exp(logvar)) with standard normal `noise` of the same shape; fp32."""
    return mean.float() + torch.exp(0.5 * logvar.float()) * noise.float()


def noisy_and_target(objective: str, vae_latents: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes noise into a clip and returns the model's input and the velocity that it should predict, both fp32.

    "sampler" works in the space of the sampler, so that training and rendering agree. "official" is the objective of
    the reference fine-tuner, to reproduce its runs: it mixes noise in the VAE's space and normalises the target, so
    that the noise in the target has the standard deviation 1 / std of each channel instead of 1. "unnormalised" mixes
    and predicts in the VAE's space, as some other trainers do.
    Source: genmoai/mochi@0c86aeb demos/fine_tuner/train.py:358-372 ("official").

    Args:
        objective: a value of `train.objective`.
        vae_latents: the clip in VAE space, (B, C, T, h, w).
        noise: standard normal noise, (B, C, T, h, w).
        sigma: noise levels, (B,), in [0, 1].
    """
    sigma = sigma.float().view(-1, 1, 1, 1, 1)
    if objective == "unnormalised":
        return (1 - sigma) * vae_latents + sigma * noise, vae_latents - noise
    if objective == "official":
        return (1 - sigma) * vae_latents + sigma * noise, to_latents(vae_latents - noise)
    assert objective == "sampler", objective
    latents = to_latents(vae_latents)
    return (1 - sigma) * latents + sigma * noise, latents - noise


def drop_captions(prompt_embeds: Tensor, prompt_mask: Tensor, drops_caption: Tensor) -> tuple[Tensor, Tensor]:
    """Replaces the prompts of some rows by the empty prompt, so that the model learns the velocity for guidance.

    Args:
        prompt_embeds: T5 features, (B, L, D).
        prompt_mask: bool, (B, L), true for valid tokens.
        drops_caption: bool, (B,), true for rows that get the empty prompt.
    """
    keeps = ~drops_caption
    return torch.where(keeps[:, None, None], prompt_embeds, 0), prompt_mask & keeps[:, None]


def velocity_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Returns the mean squared error of each row, fp32, (B,)."""
    return (prediction.float() - target.float()).square().flatten(1).mean(1)


def sigmas_from_uniforms(
    uniforms: Tensor, distribution: str, mean: float = 0.0, std: float = 1.0, shift: float = 1.0
) -> Tensor:
    """Maps numbers that are uniform in [0, 1) to noise levels of a distribution by its inverse CDF; fp32, in [0, 1].

    "uniform" does not change the numbers. "logit_normal" is the sigmoid of a normal variable: it favours levels in the
    middle, with mean > 0 noisier levels, and with a larger std levels near 0 and 1. "shifted" with a shift above 1
    favours noisier levels, and with a shift below 1 cleaner levels; a shift of 1 is uniform.
    Source: https://arxiv.org/abs/2403.03206, section 3.1 ("logit_normal") and equation 23 ("shifted").

    Args:
        uniforms: numbers in [0, 1), of any shape.
        distribution: a value of `train.sigma_distribution`.
        mean: mean of the normal variable of "logit_normal".
        std: standard deviation of the normal variable of "logit_normal", above 0.
        shift: the shift of "shifted", above 0.
    """
    uniforms = uniforms.double()
    if distribution == "logit_normal":
        # The quantile is infinite at 0 and 1. The bounds are half a step of fp32 uniform numbers inside.
        inner = uniforms.clamp(2**-25, 1 - 2**-25)
        return torch.sigmoid(mean + std * torch.special.ndtri(inner)).float()
    if distribution == "shifted":
        return (shift * uniforms / (1 + (shift - 1) * uniforms)).float()
    assert distribution == "uniform", distribution
    return uniforms.float()


def loss_weight(sigma: Tensor, weighting: str) -> Tensor:
    """Returns the factor of the loss of each sample.

    The mean factor over uniform noise levels is 1, so that a weighting does not change the scale of the loss. It is not
    1 for other distributions of noise levels.
    "bell" falls from 1.58 in the middle to 0 at both ends, "cosmap" from 1.27 to 0.64. 1 / sigma^2, which some trainers
    have, is not available: its mean is infinite, so that a few almost clean samples would dominate the update.
    Source: https://arxiv.org/abs/2403.03206, section 3.1 ("cosmap"); modelscope/DiffSynth-Studio@04d0350
    diffsynth/schedulers/flow_match.py:32-37 ("bell", there over a grid of timesteps).

    Args:
        sigma: noise levels, (B,), in [0, 1].
        weighting: a value of `train.loss_weighting`.

    Returns:
        (B,), fp32.
    """
    sigma = sigma.float()
    if weighting == "bell":
        ends = math.exp(-0.5)
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - ends
        return (torch.exp(-2 * (sigma - 0.5).square()) - ends) / mean
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma.square()))
    assert weighting == "none", weighting
    return torch.ones_like(sigma)
