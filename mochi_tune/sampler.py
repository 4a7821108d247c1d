"""The sampler: sigma schedules, guidance and Euler steps from noise to latents."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mochi_tune.models.latents import latent_shape


@dataclass(frozen=True)
class SamplerSettings:
    """How many Euler steps, along which schedule, with how much guidance."""

    steps: int
    guidance: float
    threshold: float
    linear_steps: int | None = None

    @property
    def sigmas(self) -> list[float]:
        """The noise levels, `steps` + 1 of them, from 1 to 0."""
        return linear_quadratic_sigmas(self.steps, self.threshold, self.linear_steps)


# Source: genmoai/mochi@0c86aeb demos/cli.py ("quality"); "fast" are the settings of the distilled checkpoints.
PRESETS = {
    "quality": SamplerSettings(steps=64, guidance=6.0, threshold=0.025),
    "fast": SamplerSettings(steps=8, guidance=1.5, threshold=0.1, linear_steps=6),
}


def linear_quadratic_sigmas(steps: int, threshold: float, linear_steps: int | None = None) -> list[float]:
    """Returns `steps` + 1 noise levels from 1 to 0: small equal steps down to 1 - threshold, then quadratic ones.

    Source: genmoai/mochi@0c86aeb pipelines.py (linear_quadratic_schedule).

    Args:
        steps: Euler steps, at least 1.
        threshold: how far the linear part goes, in (0, 1).
        linear_steps: steps of the linear part, below `steps`; half of them by default.
    """
    if steps == 1:
        return [1.0, 0.0]
    linear = steps // 2 if linear_steps is None else linear_steps
    quadratic = steps - linear
    slope = threshold / linear
    curvature = (1 - threshold - slope * quadratic) / quadratic**2
    rise = [i * slope for i in range(linear)]
    rise += [threshold + slope * j + curvature * j * j for j in range(quadratic)]
    return [1 - s for s in rise] + [0.0]


def draw_noise(seed: int, num_frames: int, height: int, width: int) -> Tensor:
    """Draws the latent that sampling starts from, (1, C, T, h, w) fp32; on the CPU, so that all devices agree."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *latent_shape(num_frames, height, width), generator=generator)


@torch.no_grad()
def euler_steps(
    dit: nn.Module,
    noise: Tensor,
    prompt: tuple[Tensor, Tensor],
    negative_prompt: tuple[Tensor, Tensor],
    sigmas: Sequence[float],
    guidance: Sequence[float],
) -> Iterator[Tensor]:
    """Walks from noise to latents, yielding the state after each step; the last one is the result.

    The state is fp32: z <- z + (sigma_i - sigma_{i+1}) * v with v = u + g_i * (c - u).
    Source: genmoai/mochi@0c86aeb pipelines.py (sample_model).

    Args:
        dit: predicts the velocity.
        noise: (B, C, T, h, w), on the device of `dit`.
        prompt: embeddings (B, L, D) and mask (B, L) of the prompt.
        negative_prompt: the same of the negative prompt; the empty one has no valid token.
        sigmas: noise levels from 1 to 0, one more than steps.
        guidance: one scale a step; at 1 the negative prompt is not evaluated.
    """
    z = noise.float()
    for sigma, next_sigma, scale in zip(sigmas[:-1], sigmas[1:], guidance, strict=True):
        level = torch.full((z.shape[0],), sigma, device=z.device)
        velocity = dit(z, level, *prompt).float()
        if scale != 1:
            unconditional = dit(z, level, *negative_prompt).float()
            velocity = unconditional + scale * (velocity - unconditional)
        z = z + (sigma - next_sigma) * velocity
        yield z


def sample_latents(
    dit: nn.Module,
    noise: Tensor,
    prompt: Tensor,
    negative_prompt: Tensor,
    settings: SamplerSettings,
    description: str,
) -> Tensor:
    """Renders one prompt to latents, fp32 (1, C, T, h, w), with a progress bar; the model is left as it was.

    Args:
        dit: with or without live adapters; put in eval mode while sampling.
        noise: (1, C, T, h, w), on any device.
        prompt: features of the prompt's valid tokens, (n, D).
        negative_prompt: the same of the negative prompt; none (0, D) for the empty one.
        settings: steps, schedule and guidance.
        description: of the progress bar.
    """
    from tqdm import tqdm

    device = next(dit.parameters()).device
    pairs = []
    for features in (prompt, negative_prompt):
        mask = torch.ones(1, features.shape[0], dtype=torch.bool)
        pairs.append((features[None].to(device), mask))
    training = dit.training
    dit.eval()
    states = euler_steps(dit, noise.to(device), *pairs, settings.sigmas, [settings.guidance] * settings.steps)
    # Only the last state is kept.
    [latents] = deque(tqdm(states, total=settings.steps, desc=description, unit="step", leave=False), maxlen=1)
    dit.train(training)
    return latents
