"""Adapters for the tiny model, of random numbers that show in what it renders."""

import torch

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.weights.folder import WeightsFolder

TINY = weights_folder(load_config("my_lora", ["model=tiny"]))


def write_adapter(path, seed=0, scale=1.0, identity=None):
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(torch.randn(2, i, generator=generator), scale * torch.randn(o, 2, generator=generator) / 8, 4.0)
        for name, (o, i) in linear_shapes(WeightsFolder(TINY).dit_skeleton()).items()
    }
    metadata = {"num_blocks": "2", "base_fingerprint": identity or WeightsFolder(TINY).base_identity()}
    save_adapter(path, Adapter(layers, metadata))
    return path


def write_dora(path, seed=0):
    """Writes a DoRA whose rows are 0.7 to 1.3 times as long as the base's."""
    plain, dit = load_adapter(write_adapter(path, seed, scale=0.3)), WeightsFolder(TINY).load_dit("cpu", torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for name, layer in plain.layers.items():
        lengths = dit.get_submodule(name).weight.detach().norm(dim=1)
        layer.magnitude = lengths * (0.7 + 0.6 * torch.rand(len(lengths), generator=generator))
    save_adapter(path, plain)
    return path
