"""The official implementation's vectors and the models that made them."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from mochi_tune.weights.folder import WeightsFolder

GOLDEN = Path(__file__).parent / "golden"


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
