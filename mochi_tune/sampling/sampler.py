"""The sampler: sigma schedules, guidance and Euler steps from noise to latents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.latents import latent_shape


@dataclass(frozen=True)
class SamplerSettings:
    """How many Euler steps, along which schedule, with how much guidance: one number, or one for each step.

    `own_sigmas`, from 1 to 0 and one more than steps, stand in the place of the linear-quadratic schedule.
    """

    steps: int
    guidance: float | tuple[float, ...]
    threshold: float
    linear_steps: int | None = None
    own_sigmas: tuple[float, ...] | None = None

    @property
    def sigmas(self) -> list[float]:
        """The noise levels, `steps` + 1 of them, from 1 to 0."""
        if self.own_sigmas is not None:
            return list(self.own_sigmas)
        return linear_quadratic_sigmas(self.steps, self.threshold, self.linear_steps)

    @property
    def scales(self) -> list[float]:
        """The guidance of each step."""
        return list(self.guidance) if isinstance(self.guidance, tuple) else [self.guidance] * self.steps


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


# Embeddings (B, L, D) and mask (B, L).
Prompt = tuple[Tensor, Tensor]
# Gives a step's velocity: of the model, the state, sigma (B,), the prompt, the negative prompt and the scale.
Guide = Callable[[nn.Module, Tensor, Tensor, Prompt, Prompt, float], Tensor]


def guide_in_turn(
    dit: nn.Module, z: Tensor, sigma: Tensor, prompt: Prompt, negative_prompt: Prompt, scale: float
) -> Tensor:
    """Evaluates the prompt and the negative prompt one after the other; at scale 1 the prompt alone."""
    conditional = dit(z, sigma, *prompt).float()
    if scale == 1:
        return conditional
    return guided(conditional, dit(z, sigma, *negative_prompt).float(), scale)


def guide_in_one_batch(
    dit: nn.Module, z: Tensor, sigma: Tensor, prompt: Prompt, negative_prompt: Prompt, scale: float
) -> Tensor:
    """Evaluates both prompts as one batch: each weight is read once a step, activations are twice as large."""
    if scale == 1:
        return dit(z, sigma, *prompt).float()
    length = max(embeds.shape[1] for embeds, _ in (prompt, negative_prompt))
    padded = []
    for embeds, mask in (prompt, negative_prompt):
        missing = length - embeds.shape[1]
        padded.append((F.pad(embeds, (0, 0, 0, missing)), F.pad(mask, (0, missing))))
    embeds, mask = (torch.cat(pair) for pair in zip(*padded, strict=True))
    return guided(*dit(z.repeat(2, 1, 1, 1, 1), sigma.repeat(2), embeds, mask).float().chunk(2), scale)


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Returns u + scale * (c - u)."""
    return unconditional + scale * (conditional - unconditional)


@torch.no_grad()
def euler_steps(
    dit: nn.Module,
    noise: Tensor,
    prompt: Prompt,
    negative_prompt: Prompt,
    sigmas: Sequence[float],
    guidance: Sequence[float],
    guide: Guide = guide_in_turn,
) -> Iterator[Tensor]:
    """Walks from noise to latents, yielding the state after each step; the last one is the result.

    The state is fp32: z <- z + (sigma_i - sigma_{i+1}) * v with v = u + g_i * (c - u).
    Source: genmoai/mochi@0c86aeb pipelines.py (sample_model).

    Args:
        dit: predicts the velocity.
        noise: (B, C, T, h, w), on the device of `dit`.
        prompt: of each row.
        negative_prompt: of each row; the empty one has no valid token.
        sigmas: noise levels from 1 to 0, one more than steps.
        guidance: one scale a step; at 1 the negative prompt plays no part.
        guide: how the two prompts' velocities are evaluated.
    """
    z = noise.float()
    for sigma, next_sigma, scale in zip(sigmas[:-1], sigmas[1:], guidance, strict=True):
        level = torch.full((z.shape[0],), sigma, device=z.device)
        z = z + (sigma - next_sigma) * guide(dit, z, level, prompt, negative_prompt, scale)
        yield z


def sample_latents(
    dit: nn.Module,
    noise: Tensor,
    prompt: Tensor,
    negative_prompt: Tensor,
    settings: SamplerSettings,
    description: str,
    attend: Callable[[], None] = lambda: None,
) -> Tensor:
    """Renders one prompt to latents, fp32 (1, C, T, h, w), with a progress bar; the model is left as it was.

    Args:
        dit: with or without live adapters; put in eval mode while sampling.
        noise: (1, C, T, h, w), on any device.
        prompt: features of the prompt's valid tokens, (n, D).
        negative_prompt: the same of the negative prompt; none (0, D) for the empty one.
        settings: steps, schedule and guidance.
        description: of the progress bar.
        attend: called after each step; what it raises ends this.
    """
    from tqdm import tqdm

    device = next(dit.parameters()).device
    pairs = []
    for features in (prompt, negative_prompt):
        mask = torch.ones(1, features.shape[0], dtype=torch.bool)
        pairs.append((features[None].to(device), mask))
    training = dit.training
    dit.eval()
    states = euler_steps(dit, noise.to(device), *pairs, settings.sigmas, settings.scales)
    try:
        for state in tqdm(states, total=settings.steps, desc=description, unit="step", leave=False):
            latents = state
            attend()
    finally:
        dit.train(training)
    return latents
