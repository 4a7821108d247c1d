"""Adapters of other models, whose keys and shapes can be the same as those of Mochi."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.other_bases import check_base, hub_bases
from mochi_tune.errors import CheckpointError


def write(folder, metadata=None, config=None, num_blocks=1, width=192):
    """An adapter with diffusers' names, and peft's config next to it."""
    tensors = {}
    for block in range(num_blocks):
        for module in ("to_q", "to_k", "to_v", "to_out.0"):
            name = f"transformer.transformer_blocks.{block}.attn1.{module}.lora"
            tensors[f"{name}_A.weight"] = torch.ones(1, width, dtype=torch.bfloat16)
            tensors[f"{name}_B.weight"] = torch.ones(width, 1, dtype=torch.bfloat16)
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata or {"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def of_diffusers(name):
    values = {"transformer.r": 1, "transformer.lora_alpha": 1, "transformer.base_model_name_or_path": name}
    return {"lora_adapter_metadata": json.dumps(values)}


@pytest.mark.parametrize(
    ("metadata", "config", "words"),
    [
        (of_diffusers("THUDM/CogVideoX-5b"), None, r"is one of CogVideoX, .*lora_adapter_metadata` says CogVideoX-5b"),
        ({"modelspec.architecture": "cogvideox-5b/lora"}, None, "CogVideoX, its metadata `modelspec.architecture`"),
        ({"ss_base_model_version": "hunyuan_video"}, None, "HunyuanVideo, its metadata `ss_base_model_version`"),
        ({"ss_base_model_version": "sdxl_base_v1-0"}, None, "Stable Diffusion"),
        ({"base_model_name_or_path": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}, None, "Wan"),
        ({"transformer.base_model_name_or_path": "Tongyi-MAI/Z-Image-Turbo"}, None, "Z-Image"),
        ({}, {"base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}, "FLUX, adapter_config.json next to it"),
        ({}, {"base_model_name_or_path": "Qwen/Qwen-Image"}, "Qwen-Image"),
        ({}, {"base_model_name_or_path": "LTX-Video"}, "LTX-Video"),
    ],
)
def test_an_adapter_that_names_another_model_is_refused(tmp_path, metadata, config, words):
    write(tmp_path, metadata, config and config | {"peft_type": "LORA", "r": 1, "lora_alpha": 1})
    with pytest.raises(CheckpointError, match=words + ".*: use an adapter of Mochi 1") as refused:
        load_adapter(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("metadata", "base"),
    [
        ({}, "genmo/mochi-1-preview"),
        ({}, "ada/mochi-in-the-manner-of-wan"),
        ({}, "/data/cogvideox/models/transformer"),
        ({}, "../flux"),
        ({}, r"C:\wan\model"),
        ({}, "flux-team/unknown"),
        ({}, "ada/swans"),
        ({}, "ada/wandering"),
        ({"modelspec.architecture": "unknown/lora"}, None),
        ({"modelspec.architecture": "genmo-mochi-1/lora"}, "THUDM/CogVideoX-5b"),
    ],
)
def test_an_adapter_that_names_mochi_a_path_or_an_unknown_model_is_accepted(tmp_path, metadata, base):
    write(tmp_path, metadata, {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": base})
    assert load_adapter(tmp_path).layers


def test_a_repository_is_known_by_its_tags():
    cog, mochi = "base_model:adapter:THUDM/CogVideoX-5b", "base_model:genmo/mochi-1-preview"
    with pytest.raises(
        CheckpointError, match="hub:a/b is one of CogVideoX, its page on the hub, of THUDM/CogVideoX-5b"
    ):
        check_base("hub:a/b", hub_bases(["lora", cog]))
    for tags in (None, ["lora", "wan"], [mochi], [cog, mochi], ["base_model:someone/else"]):
        check_base("hub:a/b", hub_bases(tags))


def test_the_blocks_of_cogvideox_give_a_notice_if_nothing_names_mochi(tmp_path, capsys):
    full = {"num_blocks": 42, "width": 3072}
    load_adapter(write(tmp_path, **full))
    [line] = capsys.readouterr().err.splitlines()
    assert "as an adapter of CogVideoX-5b has, and nothing names its base" in line
    for other in (
        full | {"metadata": {"modelspec.title": "My Mochi"}},
        full | {"num_blocks": 43},
        full | {"width": 192},
    ):
        load_adapter(write(tmp_path, **other))
    file = write(tmp_path, **full) / "pytorch_lora_weights.safetensors"
    name = "transformer.transformer_blocks.0.attn1.to_add_out.lora"
    text = {f"{name}_A.weight": torch.ones(1, 3072), f"{name}_B.weight": torch.ones(1536, 1)}
    save_file(load_file(file) | text, file)
    load_adapter(file)
    assert not capsys.readouterr().err
