"""The official implementation's vectors and the models that made them."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from mochi_tune.weights.folder import WeightsFolder

GOLDEN = Path(__file__).parent / "golden"
# What two right fp32 computations of one of these models, or of its gradients, may be apart, relative to the largest
# number: models/test_rounding.py shows that fp32's own error is a tenth of it at most, on the machine at hand.
TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 1e-4


@cache
def vectors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def golden_dit(dtype: torch.dtype = torch.float32):
    return WeightsFolder(GOLDEN).load_dit("cpu", dtype)


def golden_encoder(dtype: torch.dtype = torch.float32):
    return WeightsFolder(GOLDEN).load_encoder("cpu", dtype)


def golden_decoder(dtype: torch.dtype = torch.float32):
    return WeightsFolder(GOLDEN).load_decoder("cpu", dtype)


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
