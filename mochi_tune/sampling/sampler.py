"""The sampler: sigma schedules, guidance and Euler steps from noise to latents."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mochi_tune.models.latents import check_geometry, latent_shape
from mochi_tune.parallel.modulation import ModulationTable


@dataclass(frozen=True)
class SamplerSettings:
    """The Euler steps of a rendering.

    Attributes:
        steps: number of steps.
        guidance: scale of classifier-free guidance, one for all steps or one for each.
        threshold: see `linear_quadratic_sigmas`.
        linear_steps: see `linear_quadratic_sigmas`.
        own_sigmas: `steps` + 1 noise levels from 1 to 0, which replace the linear-quadratic ones.
        start_sigma: noise level at which sampling starts. Below 1, it starts from partly noisy latents and runs only
            the steps below this level, the first of them shortened.
        guided: range of steps, as fractions, in which a single guidance scale is used. The other steps have no
            guidance, and so one pass instead of two. Source of the idea: arXiv 2404.07724.
    """

    steps: int
    guidance: float | tuple[float, ...]
    threshold: float
    linear_steps: int | None = None
    own_sigmas: tuple[float, ...] | None = None
    guided: tuple[float, float] = (0.0, 1.0)
    start_sigma: float = 1.0

    @property
    def sigmas(self) -> list[float]:
        """The noise levels from `start_sigma` to 0, one more than the steps that run."""
        return [self.start_sigma, *self._all_sigmas[self._first_step + 1 :]]

    @property
    def scales(self) -> list[float]:
        """The guidance scale of each step that runs."""
        if isinstance(self.guidance, tuple):
            return list(self.guidance[self._first_step :])
        first, last = (round(share * self.steps) for share in self.guided)
        return [self.guidance if first <= step < last else 1.0 for step in range(self._first_step, self.steps)]

    def spread(self, values: Sequence[float]) -> list[float]:
        """Returns a value for each step that runs, by linear interpolation of `values` over all `steps`.

        The first value is that of the first step and the last value that of the last step.
        """
        last, found = max(1, self.steps - 1), []
        for step in range(self._first_step, self.steps):
            i, rest = divmod(step * (len(values) - 1) / last, 1)
            here = values[int(i)]
            found.append(here + rest * (values[int(i) + 1] - here) if rest else here)
        return found

    @property
    def _all_sigmas(self) -> list[float]:
        if self.own_sigmas is not None:
            return list(self.own_sigmas)
        return linear_quadratic_sigmas(self.steps, self.threshold, self.linear_steps)

    @property
    def _first_step(self) -> int:
        """The number of the step that contains `start_sigma`: at most its first noise level, and above its last one."""
        return sum(sigma >= self.start_sigma for sigma in self._all_sigmas[1:])


def linear_quadratic_sigmas(steps: int, threshold: float, linear_steps: int | None = None) -> list[float]:
    """Returns `steps` + 1 noise levels from 1 to 0: linear down to 1 - threshold, then quadratic.

    Source: genmoai/mochi@0c86aeb pipelines.py (linear_quadratic_schedule).

    Args:
        steps: number of Euler steps, at least 1.
        threshold: length of the linear part, above 0 and below `threshold_limit`.
        linear_steps: number of steps of the linear part, below `steps`; half of them by default.
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


def threshold_limit(steps: int, linear_steps: int) -> float:
    """Returns the exclusive upper bound of the threshold of `linear_quadratic_sigmas`.

    At or above it, the noise levels fall below 0 and rise again. The last of n quadratic steps has the length
    threshold / linear_steps + (2n - 1) * curvature, which must be above 0.

    Args:
        steps: number of Euler steps, at least 2.
        linear_steps: number of steps of the linear part, from 1 to steps - 1.
    """
    quadratic = steps - linear_steps
    if quadratic == 1:
        return 1.0
    ratio = linear_steps * (2 * quadratic - 1) / (quadratic * (quadratic - 1))
    return ratio / (1 + ratio)


def _fastmochi_sigmas() -> tuple[float, ...]:
    """Returns the noise levels that FastMochi was distilled for: every 12th or 13th of 100, which are taken from 1,000.

    Source: hao-ai-lab/FastVideo v0.1.1 fastvideo/distill/solver.py (PCMFMScheduler), with the settings of
    scripts/inference/inference_mochi_sp.sh: 8 steps, threshold 0.1, a linear part of 0.75, guidance 1.5.
    """
    levels = linear_quadratic_sigmas(1000, 0.1, 750)
    return (*(levels[10 * (100 * step // 8)] for step in range(8)), 0.0)


# Source: genmoai/mochi@0c86aeb demos/cli.py ("quality"); "fast" are the settings of the distilled checkpoints, and
# "fastmochi" the levels of those of FastVideo. "balanced" omits guidance in the steps where this changes least, see
# docs/experiments.md.
PRESETS = {
    "quality": SamplerSettings(steps=64, guidance=6.0, threshold=0.025),
    "balanced": SamplerSettings(steps=64, guidance=6.0, threshold=0.025, guided=(0.0, 0.75)),
    "fast": SamplerSettings(steps=8, guidance=1.5, threshold=0.1, linear_steps=6),
    "fastmochi": SamplerSettings(steps=8, guidance=1.5, threshold=0.1, own_sigmas=_fastmochi_sigmas()),
}


def draw_noise(seed: int, num_frames: int, height: int, width: int) -> Tensor:
    """Draws the initial noise (1, C, T, h, w), fp32, on the CPU, so that it is the same for all devices.

    Raises:
        ConfigError: the video cannot have this size.
    """
    check_geometry(num_frames, height, width)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *latent_shape(num_frames, height, width), generator=generator, dtype=torch.float32)


def add_noise(latents: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Returns noisy latents (1 - sigma) * latents + sigma * noise; exactly `latents` at 0 and `noise` at 1."""
    return (1 - sigma) * latents + sigma * noise


# Embeddings (B, L, D) and mask (B, L), true where a token is valid.
Prompt = tuple[Tensor, Tensor]


class Denoiser:
    """Predicts velocities under the prompt "cond" and the negative prompt "uncond"."""

    def __init__(self, dit: nn.Module, cond: Prompt, uncond: Prompt, modulation: ModulationTable | None = None) -> None:
        """Combines a model and the prompts of a rendering.

        Args:
            dit: predicts the velocity.
            cond: the prompt of each row.
            uncond: the negative prompt of each row; the empty prompt has no valid token.
            modulation: precomputed modulation for the prompts "cond" and "uncond".
        """
        self.dit = dit
        self.prompts = {"cond": cond, "uncond": uncond}
        self.modulation = modulation

    def __call__(self, latents: Tensor, sigma: float, names: Sequence[str]) -> Tensor:
        """Returns the velocities (len(names) * B, C, T, h, w), fp32, of latents (B, C, T, h, w) for each prompt."""
        embeds, mask = _as_one_batch([self.prompts[name] for name in names])
        latents = latents.repeat(len(names), 1, 1, 1, 1)
        level = torch.full((len(latents),), sigma, device=latents.device)
        modulation = None if self.modulation is None else self.modulation.select(sigma, names)
        return self.dit(latents, level, embeds, mask, modulation).float()


# Returns the guided velocity, called with a denoiser, latents, the noise level sigma and the guidance scale.
Guide = Callable[[Denoiser, Tensor, float, float], Tensor]


def guide_in_turn(denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
    """Evaluates the prompt and the negative prompt one after the other; at scale 1 only the prompt."""
    cond = denoiser(latents, sigma, ["cond"])
    return cond if scale == 1 else guided(cond, denoiser(latents, sigma, ["uncond"]), scale)


def guide_in_one_batch(denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
    """Evaluates both prompts as one batch: weights are read once per step, but activations are twice as large."""
    if scale == 1:
        return denoiser(latents, sigma, ["cond"])
    cond, uncond = denoiser(latents, sigma, ["cond", "uncond"]).chunk(2)
    return guided(cond, uncond, scale)


def guided(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Returns uncond + scale * (cond - uncond), classifier-free guidance."""
    return uncond + scale * (cond - uncond)


@torch.no_grad()
def euler_steps(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float],
    guidance: Sequence[float],
    guide: Guide = guide_in_turn,
) -> Iterator[Tensor]:
    """Integrates from noise, or partly noisy latents, to latents; yields the latents after each step, fp32.

    z <- z + (sigma_i - sigma_{i+1}) * v with v = u + g_i * (c - u).
    Source: genmoai/mochi@0c86aeb pipelines.py (sample_model).

    Args:
        denoiser: the model and its prompts.
        noise: (B, C, T, h, w), on the model's device. If the first noise level is below 1: the output of `add_noise`.
        sigmas: noise levels, falling to 0, one more than steps.
        guidance: scale of each step; at 1 the negative prompt is not evaluated.
        guide: evaluates the velocities of the two prompts.
    """
    latents = noise.float()
    for sigma, next_sigma, scale in zip(sigmas[:-1], sigmas[1:], guidance, strict=True):
        latents = latents + (sigma - next_sigma) * guide(denoiser, latents, sigma, scale)
        yield latents


def sample_latents(
    dit: nn.Module,
    noise: Tensor,
    prompt: Tensor,
    negative_prompt: Tensor,
    settings: SamplerSettings,
    guide: Guide = guide_in_turn,
) -> Iterator[Tensor]:
    """Renders one prompt; yields the latents (1, C, T, h, w), fp32, after each step. The last ones are the result.

    Args:
        dit: the model in eval mode, with or without adapters.
        noise: (1, C, T, h, w), on any device. If `settings.start_sigma` is below 1: the output of `add_noise`.
        prompt: features of the prompt's valid tokens, (n, D).
        negative_prompt: features of the negative prompt's valid tokens; (0, D) for the empty prompt.
        settings: steps, schedule and guidance.
        guide: evaluates the velocities of the two prompts.
    """
    if not settings.scales:
        return iter(())
    device = next(dit.parameters()).device
    cond, uncond = (
        (features[None].to(device), torch.ones(1, len(features), dtype=torch.bool))
        for features in (prompt, negative_prompt)
    )
    modulation = ModulationTable(dit, settings.sigmas[:-1], {"cond": cond, "uncond": uncond})
    denoiser = Denoiser(dit, cond, uncond, modulation)
    return euler_steps(denoiser, noise.to(device), settings.sigmas, settings.scales, guide)


def _as_one_batch(prompts: Sequence[Prompt]) -> Prompt:
    """Concatenates prompts along the batch axis, padded to the longest."""
    if len(prompts) == 1:
        return prompts[0]
    length = max(embeds.shape[1] for embeds, _ in prompts)
    embeds = [F.pad(embeds, (0, 0, 0, length - embeds.shape[1])) for embeds, _ in prompts]
    masks = [F.pad(mask, (0, length - mask.shape[1])) for _, mask in prompts]
    return torch.cat(embeds), torch.cat(masks)
