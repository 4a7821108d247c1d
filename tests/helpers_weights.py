"""Weights folders to load, to damage and to be refused."""

import shutil

import pytest
from helpers_golden import GOLDEN
from safetensors.torch import load_file

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.load import check_weights, fingerprint, load_decoder, load_dit, load_encoder

LOADERS = {"dit": load_dit, "encoder": load_encoder, "decoder": load_decoder}


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
        check_weights(folder, parts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changes(folder, part, path):
    """Flips one byte in the middle of a file and says whether the part's fingerprint saw it."""
    before = fingerprint(folder, part)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return fingerprint(folder, part) != before
