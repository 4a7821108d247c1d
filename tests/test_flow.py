import pytest
import torch
from helpers_golden import GOLDEN, golden_dit, relative_error, vectors

from mochi_tune.adapters import load_adapter
from mochi_tune.flow import draw_posterior, noisy_and_target, velocity_loss
from mochi_tune.lora import apply_adapter, lora_parameters
from mochi_tune.models.latents import to_latents

IO = vectors("dit_io")
# objective -> noisy input, prediction, loss, gradients of the official implementation
VECTORS = {
    "sampler": ("train_z_dit_sigma", "lora_out_dit", "train_loss_dit", "dit_grad."),
    "official": ("train_z_sigma", "lora_out_vae_space", "train_loss_genmo", "genmo_grad."),
}


def test_posterior_is_the_official_draw():
    drawn = draw_posterior(IO["train_mean"], IO["train_logvar"], IO["train_posterior_noise"])
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
