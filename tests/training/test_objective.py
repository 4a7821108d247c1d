import math

import pytest
import torch
from helpers_golden import GOLDEN, golden_dit, relative_error, vectors

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter, lora_parameters
from mochi_tune.config.settings import known_keys
from mochi_tune.models.latents import to_latents
from mochi_tune.training.draws import stratify
from mochi_tune.training.objective import (
    loss_weight,
    noisy_and_target,
    sample_posterior,
    sigmas_from_uniforms,
    velocity_loss,
)

IO = vectors("dit_io")
# objective -> noisy input, prediction, loss, gradients of the official implementation
VECTORS = {
    "sampler": ("train_z_dit_sigma", "lora_out_dit", "train_loss_dit", "dit_grad."),
    "official": ("train_z_sigma", "lora_out_vae_space", "train_loss_genmo", "genmo_grad."),
}


def test_posterior_is_the_official_draw():
    drawn = sample_posterior(IO["train_mean"], IO["train_logvar"], IO["train_posterior_noise"])
    assert relative_error(drawn, IO["train_z"]) <= 2e-5


@pytest.mark.parametrize("objective", VECTORS)
def test_a_training_step_has_the_official_input_prediction_loss_and_gradients(objective):
    noisy_key, output_key, loss_key, gradient_key = VECTORS[objective]
    noisy, target = noisy_and_target(objective, IO["train_z"], IO["train_eps"], IO["sigma"])
    assert relative_error(noisy, IO[noisy_key]) <= 2e-5
    dit = golden_dit()
    layers = load_adapter(GOLDEN / "lora.safetensors").layers
    apply_adapter(dit, layers, "default")
    parameters = lora_parameters(dit)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    prediction = dit(noisy, IO["sigma"], IO["y_feat"], IO["y_mask"])
    assert relative_error(prediction, IO[output_key]) <= 2e-5
    loss = velocity_loss(prediction, target)
    assert relative_error(loss, IO[loss_key]) <= 2e-5
    loss.mean().backward()
    expected = {key.removeprefix(gradient_key): g for key, g in IO.items() if key.startswith(gradient_key)}
    assert expected.keys() == parameters.keys()
    for name, gradient in expected.items():
        assert relative_error(parameters[name].grad, gradient) <= 1e-4, name


def test_the_unnormalised_objective_is_the_same_in_the_other_space():
    sigma = torch.tensor([0.7])
    noisy, target = noisy_and_target("unnormalised", IO["train_z"], IO["train_eps"], sigma)
    assert torch.allclose(noisy + sigma * target, IO["train_z"], atol=1e-5)
    assert torch.allclose(noisy - (1 - sigma) * target, IO["train_eps"], atol=1e-5)


def test_one_euler_step_with_the_true_velocity_recovers_the_clip():
    sigma = torch.tensor([0.7])
    noisy, target = noisy_and_target("sampler", IO["train_z"], IO["train_eps"], sigma)
    assert torch.allclose(noisy + sigma * target, to_latents(IO["train_z"]), atol=1e-5)


def test_sigma_1_is_pure_noise_and_0_is_the_clip():
    latents = to_latents(IO["train_z"])
    for sigma, expected in ((1.0, IO["train_eps"]), (0.0, latents)):
        noisy, _ = noisy_and_target("sampler", IO["train_z"], IO["train_eps"], torch.tensor([sigma]))
        assert torch.equal(noisy, expected)


def test_each_row_has_its_own_sigma_and_loss():
    z, noise = IO["train_z"].repeat(2, 1, 1, 1, 1), IO["train_eps"].repeat(2, 1, 1, 1, 1)
    noisy, target = noisy_and_target("sampler", z, noise, torch.tensor([0.2, 0.9]))
    for row, sigma in enumerate((0.2, 0.9)):
        alone, _ = noisy_and_target("sampler", z[:1], noise[:1], torch.tensor([sigma]))
        assert torch.equal(noisy[row : row + 1], alone)
    losses = velocity_loss(torch.stack([target[0] + 1, target[1]]).bfloat16(), target.bfloat16())
    assert losses.dtype == torch.float32 and losses[0] > 0.9 and losses[1] == 0


# The centers of a million equal parts of [0, 1]: a mean over them approximates an integral.
GRID = (torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_uniform_sigmas_are_the_numbers_that_were_drawn():
    uniforms = torch.rand(1000)
    assert torch.equal(sigmas_from_uniforms(uniforms, "uniform", 3.0, 2.0, 5.0), uniforms)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 1.0), (1.0, 0.3), (0.0, 3.0)])
def test_logit_normal_sigmas_have_a_normal_logit(mean, std):
    logits = torch.logit(sigmas_from_uniforms(GRID, "logit_normal", mean, std).double())
    # The grid ends half a millionth before 0 and 1, which reduces the spread slightly.
    assert logits.mean().item() == pytest.approx(mean, abs=1e-4)
    assert logits.std().item() == pytest.approx(std, rel=1e-3)
    for sigma in (0.05, 0.3, 0.5, 0.8):
        share = (sigmas_from_uniforms(GRID, "logit_normal", mean, std) < sigma).double().mean().item()
        assert share == pytest.approx(normal_cdf((math.log(sigma / (1 - sigma)) - mean) / std), abs=2e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
def test_shifted_sigmas_have_the_shifted_distribution(shift):
    sigmas = sigmas_from_uniforms(GRID, "shifted", shift=shift)
    for sigma in (0.05, 0.3, 0.5, 0.75, 0.95):
        share = (sigmas < sigma).double().mean().item()
        assert share == pytest.approx(sigma / (shift - (shift - 1) * sigma), abs=2e-6)
    mean = 0.5 if shift == 1 else shift / (shift - 1) - shift * math.log(shift) / (shift - 1) ** 2
    assert sigmas.double().mean().item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("distribution", known_keys()["train.sigma_distribution"].choices)
@pytest.mark.parametrize("numbers", [(0.0, 1.0, 0.1), (0.0, 1.5, 1e-3), (-9.0, 8.0, 50.0), (9.0, 30.0, 1.0)])
def test_sigmas_are_levels_in_order_whatever_was_drawn(distribution, numbers):
    uniforms = torch.tensor([0.0, 2**-24, 1e-3, 0.5, 1 - 2**-24, 1.0])
    sigmas = sigmas_from_uniforms(uniforms, distribution, *numbers)
    assert sigmas.dtype == torch.float32 and sigmas.isfinite().all()
    assert sigmas[0] >= 0 and sigmas[-1] <= 1 and (sigmas.diff() >= 0).all()
    assert sigmas_from_uniforms(uniforms[3], distribution, *numbers).shape == ()


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_strata_are_each_hit_once(count):
    generator = torch.Generator().manual_seed(count)
    permutation = torch.randperm(count, generator=generator)
    drawn = stratify(torch.rand(count, generator=generator), permutation)
    assert drawn.dtype == torch.float32
    assert (drawn * count).floor().tolist() == permutation.tolist()
    assert sorted((drawn * count).long().tolist()) == list(range(count))
    assert stratify(torch.full((count,), 1 - 2**-24), permutation).max() < 1


def test_a_stratified_number_is_uniform_over_its_permutations():
    draws = [stratify(torch.tensor([0.25, 0.75]), torch.tensor(order)) for order in ([0, 1], [1, 0])]
    assert torch.stack(draws).tolist() == [[0.125, 0.875], [0.625, 0.375]]


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("none", [1.0, 1.0, 1.0, 1.0]),
        # (exp(-2 (sigma - 1/2)^2) - exp(-1/2)) / (sqrt(pi / 2) erf(sqrt(1/2)) - exp(-1/2))
        ("bell", [0.0, 1.107881, 1.579604, 0.0]),
        # 2 / (pi (1 - 2 sigma + 2 sigma^2)): 2 / pi, 3.2 / pi, 4 / pi, 2 / pi
        ("cosmap", [0.636620, 1.018592, 1.273240, 0.636620]),
    ],
)
def test_loss_weights_are_those_of_their_formulas(weighting, expected):
    weights = loss_weight(torch.tensor([0.0, 0.25, 0.5, 1.0]), weighting)
    assert weights.dtype == torch.float32 and weights.tolist() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("weighting", known_keys()["train.loss_weighting"].choices)
def test_a_loss_weight_keeps_the_size_of_the_loss_and_sees_both_ends_alike(weighting):
    weights = loss_weight(GRID, weighting)
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(weights, weights.flip(0), atol=1e-5) and (weights >= 0).all()
