"""The error of fp32 is at most a tenth of the tolerances, so they hold for any order of summation.

Other tests compare two fp32 computations of these models, on any processor, with TOLERANCE and GRADIENT_TOLERANCE of
helpers_golden, relative to the largest number; `verify` uses the same ones. These tests measure the error of one such
computation against fp64.
"""

import torch
from helpers_golden import (
    GRADIENT_TOLERANCE,
    TOLERANCE,
    golden_decoder,
    golden_dit,
    golden_encoder,
    relative_error,
    vectors,
)

from mochi_tune.models.vae import frames_to_pixels

DIT, VAE = vectors("dit_io"), vectors("vae_io")


def test_the_dit_and_its_gradients():
    outputs, gradients = [], []
    for dtype in (torch.float32, torch.float64):
        dit = golden_dit().to(dtype).requires_grad_(True)
        out = dit(DIT["z"].to(dtype), DIT["sigma"], DIT["y_feat"].to(dtype), DIT["y_mask"])
        out.square().mean().backward()
        outputs.append(out.detach())
        gradients.append({name: p.grad for name, p in dit.named_parameters() if p.grad is not None})
    assert outputs[1].dtype == torch.float64
    assert relative_error(*outputs) <= 0.1 * TOLERANCE
    for name, exact in gradients[1].items():
        assert relative_error(gradients[0][name], exact) <= 0.1 * GRADIENT_TOLERANCE, name


@torch.no_grad()
def test_the_decoder():
    exact = golden_decoder().double()(VAE["lat"].double())
    assert exact.dtype == torch.float64
    assert relative_error(golden_decoder()(VAE["lat"]), exact) <= 0.1 * TOLERANCE


@torch.no_grad()
def test_the_encoder():
    pixels = frames_to_pixels(VAE["video"].permute(0, 2, 3, 4, 1))
    # The encoder's first features and its outputs are fp32 whatever its dtype.
    exact = golden_encoder().double()(pixels)
    for got, expected in zip(golden_encoder()(pixels), exact, strict=True):
        assert relative_error(got, expected) <= 0.1 * TOLERANCE
