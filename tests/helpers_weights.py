"""Weights folders to load, to damage and to be refused."""

import shutil

import pytest
from helpers_golden import GOLDEN
from safetensors.torch import load_file

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder

LOADERS = {
    "dit": WeightsFolder.load_dit,
    "encoder": WeightsFolder.load_encoder,
    "decoder": WeightsFolder.load_decoder,
}


def official(part):
    return load_file(GOLDEN / f"{part}.safetensors")


def copy_golden(folder, *parts):
    for part in parts:
        shutil.copy(GOLDEN / f"{part}.safetensors", folder)
        config = "dit_config.json" if part == "dit" else "vae_config.json"
        shutil.copy(GOLDEN / config, folder)
    return folder


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        WeightsFolder(folder).check(parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changes(folder, part, path):
    """Flips one byte in the middle of a file and says whether the part's fingerprint saw it."""
    before = WeightsFolder(folder).fingerprint(part)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return WeightsFolder(folder).fingerprint(part) != before
