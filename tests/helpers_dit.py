"""Folders of a small DiT that the tools for base weights read."""

import json
from dataclasses import asdict, replace

import torch
from helpers_adapters import GOLDEN
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.toy.make_tiny import DIT
from mochi_tune.weights.folder import WeightsFolder


def write_dit(folder, tensors, config=DIT):
    """Writes an official folder of a DiT alone."""
    folder.mkdir()
    save_file(tensors, folder / "dit.safetensors")
    (folder / "dit_config.json").write_text(json.dumps(asdict(config)))
    return folder


def random_dit(folder, depth):
    """Writes a DiT of random weights."""
    torch.manual_seed(0)
    config = replace(DIT, depth=depth)
    return write_dit(folder, AsymmDiT(config).state_dict(), config)


def run_dit(folder, adapter=None, strength=1.0):
    """Returns what the folder's DiT computes of the golden inputs, in fp32, with an adapter beside it where given."""
    io = load_file(GOLDEN / "dit_io.safetensors")
    dit = WeightsFolder(folder).load_dit("cpu", torch.float32)
    if adapter is not None:
        apply_adapter(dit, adapter.layers, "beside", strength)
    with torch.no_grad():
        return dit(io["z"], io["sigma"], io["y_feat"], io["y_mask"])


def relative_error(got, expected):
    """Returns the largest error by the tensor's largest value, which the tolerances are about."""
    return float((got - expected).abs().max() / expected.abs().max())
