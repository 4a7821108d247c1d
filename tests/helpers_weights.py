"""Weights folders to load, to damage and to be refused."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers_golden import GOLDEN
from safetensors.torch import load_file, save_file

from mochi_tune import assets
from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder

TINY = Path(assets.__path__[0]) / "tiny"
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


def prefixed(tensors: dict, prefix: str) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def small_configs(folder: Path, source: Path = GOLDEN) -> Path:
    """Writes the configurations of small models beside single files; T5's are those of the tiny model."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("dit_config.json", "vae_config.json"):
        shutil.copy(source / name, folder)
    shutil.copy(TINY / "text_encoder" / "config.json", folder / "text_encoder_config.json")
    return folder


def make_comfyui(home: Path, source: Path) -> Path:
    """Makes a ComfyUI with the models of an official folder among others, and the tiny T5."""
    models = small_configs(home / "models", source)
    for name in ("diffusion_models", "vae", "text_encoders", "checkpoints"):
        (models / name).mkdir()
    parts = {part: load_file(source / f"{part}.safetensors") for part in ("dit", "encoder", "decoder")}
    dit = prefixed(parts["dit"], "model.diffusion_model.")
    save_file(dit, models / "diffusion_models" / "mochi_preview_bf16.safetensors")
    vae = prefixed(parts["encoder"], "encoder.") | prefixed(parts["decoder"], "decoder.")
    save_file(vae, models / "vae" / "mochi_vae.safetensors")
    shutil.copy(TINY / "text_encoder" / "model.safetensors", models / "text_encoders" / "t5xxl_fp16.safetensors")
    others = {"diffusion_models/flux": "double_blocks.0.img_attn.qkv.weight", "vae/ae": "decoder.conv_in.weight"}
    for name, key in (others | {"text_encoders/clip_l": "text_model.embeddings.position_ids"}).items():
        save_file({key: torch.zeros(2, 2)}, models / f"{name}.safetensors")
    # The text encoder of another model is a T5 of another size.
    t5 = load_file(TINY / "text_encoder" / "model.safetensors")
    save_file(t5 | {"shared.weight": torch.zeros(99, 64)}, models / "text_encoders" / "umt5_xxl.safetensors")
    shutil.copytree(TINY / "tokenizer", home / "comfy" / "text_encoders" / "t5_tokenizer")
    return home
