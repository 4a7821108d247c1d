import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_golden import GOLDEN, golden_dit, relative_error, vectors

from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.sampler import (
    PRESETS,
    Denoiser,
    SamplerSettings,
    add_noise,
    draw_noise,
    euler_steps,
    linear_quadratic_sigmas,
    sample_latents,
)

IO = vectors("dit_io")
PROMPT = (IO["y_feat"], IO["y_mask"])
NEGATIVE = (IO["null_feat"], torch.zeros_like(IO["y_mask"]))


@pytest.mark.parametrize(("key", "expected"), json.loads((GOLDEN / "schedules.json").read_text()).items())
def test_schedules_are_the_official_ones(key, expected):
    steps, threshold, linear = key.split(",")
    sigmas = linear_quadratic_sigmas(int(steps), float(threshold), None if linear == "None" else int(linear))
    assert sigmas == pytest.approx(expected, abs=1e-9) and sigmas[-1] == 0


def test_presets_are_the_official_ones():
    schedules = json.loads((GOLDEN / "schedules.json").read_text())
    assert PRESETS["quality"].sigmas == pytest.approx(schedules["64,0.025,None"]) and PRESETS["quality"].guidance == 6
    assert PRESETS["fast"].sigmas == pytest.approx(schedules["8,0.1,6"]) and PRESETS["fast"].guidance == 1.5


def test_fastmochi_uses_the_levels_that_it_was_distilled_for():
    """Follows the rules of FastVideo's scheduler: every 10th of 1,000 levels, from the end, and 8 of these."""
    levels = [1 - 0.1 * i / 750 for i in range(750)]
    # The quadratic part starts with the slope of the linear one, and ends at 0 after 1,000.
    slope, curvature = 0.1 / 750, (0.9 - 0.1 / 750 * 250) / 250**2
    levels += [0.9 - slope * j - curvature * j * j for j in range(250)]
    euler = np.arange(1, 101) * 10 - 1
    chosen = np.array(levels)[::-1][euler][::-1][np.floor(np.linspace(0, 100, 8, endpoint=False)).astype(int)]
    assert PRESETS["fastmochi"].sigmas == pytest.approx([*chosen, 0]) and PRESETS["fastmochi"].scales == [1.5] * 8
    with pytest.raises(ConfigError, match=r"sample\.steps=4 does not fit sample\.preset=fastmochi"):
        sampler_settings(SampleConfig(preset="fastmochi", steps=4))


def test_six_steps_are_the_official_ones():
    guidance = IO["cfg_schedule"].tolist()
    denoiser = Denoiser(golden_dit(), PROMPT, NEGATIVE)
    states = euler_steps(denoiser, IO["z"], linear_quadratic_sigmas(6, 0.025), guidance)
    *_, latents = states
    assert relative_error(latents, IO["sample_dit"]) <= 2e-5
    assert relative_error(to_vae_latents(latents), IO["sample_vae"]) <= 2e-5


def test_sample_latents_gives_the_same_from_valid_tokens_alone():
    settings = SamplerSettings(steps=3, guidance=4.0, threshold=0.025)
    valid = IO["y_feat"][0, IO["y_mask"][0].bool()]
    dit = golden_dit()
    *_, got = sample_latents(dit, IO["z"], valid, IO["y_feat"].new_zeros(0, IO["y_feat"].shape[2]), settings)
    *_, expected = euler_steps(Denoiser(dit, PROMPT, NEGATIVE), IO["z"], settings.sigmas, [4.0] * 3)
    assert relative_error(got, expected) <= 2e-5


def test_guidance_1_is_the_conditional_prediction():
    calls = []

    class Counting(torch.nn.Module):
        def forward(self, latents, *_):
            calls.append(1)
            return torch.ones_like(latents)

    *_, latents = euler_steps(Denoiser(Counting(), NEGATIVE, NEGATIVE), IO["z"], [1.0, 0.5, 0.0], [1.0, 1.0])
    assert len(calls) == 2 and torch.allclose(latents, IO["z"] + 1)


def test_the_state_stays_fp32_whatever_the_model_computes_in():
    *_, latents = euler_steps(
        Denoiser(golden_dit(torch.bfloat16), PROMPT, NEGATIVE), IO["z"], [1.0, 0.5, 0.0], [2.0, 2.0]
    )
    assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())


def test_guidance_is_computed_in_fp32_whatever_the_model_computes_in():
    generator = torch.Generator().manual_seed(0)
    cond, uncond = torch.randn(2, *IO["z"].shape, generator=generator).bfloat16()

    class Half(torch.nn.Module):
        def forward(self, latents, sigma, prompt_embeds, prompt_mask, modulation):
            return cond if prompt_mask.any() else uncond

    *_, latents = euler_steps(Denoiser(Half(), PROMPT, NEGATIVE), IO["z"], [1.0, 0.6, 0.0], [4.5, 3.3])
    expected = IO["z"].double()
    for length, scale in ((0.4, 4.5), (0.6, 3.3)):
        expected = expected + length * (uncond.double() + scale * (cond.double() - uncond.double()))
    assert relative_error(latents, expected) <= 1e-6


def test_noise_is_a_function_of_the_seed_and_the_size():
    assert torch.equal(draw_noise(3, 13, 64, 96), draw_noise(3, 13, 64, 96))
    assert not torch.equal(draw_noise(3, 13, 64, 96), draw_noise(4, 13, 64, 96))
    assert draw_noise(3, 13, 64, 96).shape == (1, 12, 3, 8, 12)
    first = torch.tensor([-0.076644, 0.359882, -0.782017, 0.071528])
    assert torch.allclose(draw_noise(3, 13, 64, 96).flatten()[:4], first, rtol=0, atol=1e-6), "not even rounded"


def test_balanced_is_quality_without_guidance_in_the_last_quarter():
    quality, balanced = PRESETS["quality"], PRESETS["balanced"]
    assert balanced.sigmas == quality.sigmas and balanced.scales == [6.0] * 48 + [1.0] * 16
    # This also holds for other numbers of steps and another scale; a list of scales is used unchanged.
    assert replace(balanced, steps=8, guidance=3.0).scales == [3.0] * 6 + [1.0] * 2
    assert replace(balanced, steps=2, guidance=(3.0, 2.0)).scales == [3.0, 2.0]


# Sampling that starts from partly noisy latents


def test_sampling_from_below_1_runs_the_steps_below_it_with_their_guidance():
    settings = SamplerSettings(4, (4.0, 3.0, 2.0, 1.0), 0.1, own_sigmas=(1.0, 0.75, 0.5, 0.25, 0.0))
    for start, sigmas, scales in (
        (1.0, [1.0, 0.75, 0.5, 0.25, 0.0], [4, 3, 2, 1]),
        (0.8, [0.8, 0.75, 0.5, 0.25, 0.0], [4, 3, 2, 1]),
        (0.75, [0.75, 0.5, 0.25, 0.0], [3, 2, 1]),
        (0.3, [0.3, 0.25, 0.0], [2, 1]),
        (0.1, [0.1, 0.0], [1]),
        (0.0, [0.0], []),
    ):
        walked = replace(settings, start_sigma=start)
        assert (walked.sigmas, walked.scales) == (sigmas, scales)
    quality = replace(PRESETS["quality"], start_sigma=0.5)
    assert quality.sigmas[1:] == [sigma for sigma in PRESETS["quality"].sigmas if sigma < 0.5]
    # The last quarter, without guidance, is that of all steps, not of those that run.
    assert replace(PRESETS["balanced"], start_sigma=0.5).scales == [1.0] * len(quality.scales)


def test_noise_is_added_along_the_line_that_velocities_follow():
    latents, noise = torch.randn(2, *IO["z"].shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(add_noise(latents, noise, 1.0), noise) and torch.equal(add_noise(latents, noise, 0.0), latents)
    expected = 0.7 * latents.double() + 0.3 * noise.double()
    assert relative_error(add_noise(latents, noise, 0.3), expected) <= 1e-6


def test_sampling_from_partly_noisy_latents_follows_eulers_method():
    generator = torch.Generator().manual_seed(0)
    latents, noise, slope = torch.randn(3, *IO["z"].shape, generator=generator)
    settings = SamplerSettings(4, (4.0, 3.0, 2.0, 1.0), 0.1, own_sigmas=(1.0, 0.75, 0.5, 0.25, 0.0), start_sigma=0.6)

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.place = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, sigma, prompt_embeds, prompt_mask, modulation):
            return slope * sigma[0] - x / 2 if prompt_mask.any() else x / 3

    prompt = torch.ones(2, 8)
    states = sample_latents(Field(), add_noise(latents, noise, 0.6), prompt, prompt[:0], settings)
    *_, got = states
    x = 0.4 * latents.double() + 0.6 * noise.double()
    for sigma, below, scale in ((0.6, 0.5, 3.0), (0.5, 0.25, 2.0), (0.25, 0.0, 1.0)):
        uncond = x / 3
        x = x + (sigma - below) * (uncond + scale * (slope.double() * sigma - x / 2 - uncond))
    assert relative_error(got, x) <= 2e-6
    assert list(sample_latents(Field(), latents, prompt, prompt[:0], replace(settings, start_sigma=0.0))) == []


@pytest.mark.parametrize(
    ("values", "start_sigma", "expected"),
    [
        ((0.5,), 1.0, [0.5] * 5),
        ((1.0, 0.0), 1.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ((1.0, 0.0, 1.0), 1.0, [1.0, 0.5, 0.0, 0.5, 1.0]),
        ((0.1, 0.7, 0.2, 0.9, 0.3), 1.0, [0.1, 0.7, 0.2, 0.9, 0.3]),
        # The values are spread over all steps, including those that do not run.
        ((1.0, 0.0), 0.5, [0.5, 0.25, 0.0]),
        ((1.0, 1.0, 1.0), 1.0, [1.0] * 5),
    ],
)
def test_values_are_spread_over_the_steps(values, start_sigma, expected):
    settings = SamplerSettings(5, 1.0, 0.1, own_sigmas=(1.0, 0.8, 0.6, 0.4, 0.2, 0.0), start_sigma=start_sigma)
    assert settings.spread(values) == expected
    assert replace(settings, steps=1, own_sigmas=(1.0, 0.0), start_sigma=1.0).spread(values[:1]) == [values[0]]


def test_noise_is_of_sizes_that_the_models_have():
    assert draw_noise(0, 37, 64, 96).shape == (1, 12, 7, 8, 12)
    for size in ((36, 64, 96), (37, 60, 96), (-5, 64, 96)):
        with pytest.raises(ConfigError, match="does not fit"):
            draw_noise(0, *size)
