"""Adapters written by peft and diffusers from a live model with every Linear adapted, and in FastVideo's layout."""

import json

import pytest
import torch
from helpers_adapters import base_weights, build_dit
from helpers_diffusers import diffusers_model, merged, nothing_may_be_warned, run_diffusers
from safetensors.torch import load_file

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.adapters.lora import all_linear_shapes

# Usual targets of trainers. peft matches the ends of names, so that to_q is also a layer of the pooler.
USUAL = ["to_q", "to_k", "to_v", "to_out.0"]
EVERY = (
    r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff\w*\.net\.(0\.proj|2)"
    r"|norm1(_context)?\.linear(_1)?)|time_embed\.(pooler\.to_\w+|timestep_embedder\.linear_[12]|caption_proj)"
    r"|norm_out\.linear|proj_out"
)


def adapted_model(**options):
    from peft import LoraConfig

    torch.manual_seed(0)
    model = diffusers_model(base_weights())
    model.add_adapter(LoraConfig(init_lora_weights=False, **options), adapter_name="default")
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name:
            # Scaled down, because changes of every Linear would otherwise outweigh the base.
            parameter.data *= 0.3
    return model


def save_peft_folder(model, folder):
    """Saves as peft does, with the whole model wrapped."""
    from peft import LoraConfig, PeftModel

    config = model.peft_config["default"]
    bare = PeftModel(
        diffusers_model(base_weights()), LoraConfig(**{k: v for k, v in config.to_dict().items() if k in OPTIONS})
    )
    own = dict(model.named_parameters())
    for name, parameter in bare.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(own[name.removeprefix("base_model.model.")])
    bare.save_pretrained(folder)


OPTIONS = ("r", "lora_alpha", "target_modules", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def save_diffusers(model, folder, with_metadata=True):
    from diffusers import MochiPipeline
    from peft import get_peft_model_state_dict

    metadata = model.peft_config["default"].to_dict() if with_metadata else None
    layers = get_peft_model_state_dict(model)
    MochiPipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)


def save_fastvideo(model, folder):
    """Saves as FastVideo's save_lora_checkpoint does: diffusers' file, and rank and alpha in another file."""
    save_diffusers(model, folder, with_metadata=False)
    config = model.peft_config["default"]
    params = {"lora_rank": config.r, "lora_alpha": config.lora_alpha, "target_modules": sorted(config.target_modules)}
    (folder / "lora_config.json").write_text(json.dumps({"step": 200, "lora_params": params}, indent=4))


@pytest.mark.parametrize(
    ("save", "options", "source"),
    [
        (save_peft_folder, {"target_modules": USUAL, "r": 8, "lora_alpha": 32}, "adapter_config.json next to it"),
        (save_peft_folder, {"target_modules": EVERY, "r": 4, "lora_alpha": 6, "use_rslora": True,
                            "rank_pattern": {"to_kv": 3}, "alpha_pattern": {"norm_out.linear": 1, "proj_out": 9}},
         "adapter_config.json next to it"),
        (save_peft_folder, {"target_modules": EVERY, "r": 4, "lora_alpha": 8, "use_dora": True},
         "adapter_config.json next to it"),
        (save_diffusers, {"target_modules": EVERY, "r": 4, "lora_alpha": 6}, "its metadata `lora_adapter_metadata`"),
        (save_fastvideo, {"target_modules": USUAL, "r": 4, "lora_alpha": 8}, "lora_config.json next to it"),
    ],
    ids=["peft", "peft_every", "peft_dora", "diffusers", "fastvideo"],
)  # fmt: skip
def test_a_folder_computes_what_the_program_that_wrote_it_computes(tmp_path, save, options, source):
    model = adapted_model(**options)
    save(model, tmp_path)
    adapter = load_adapter(tmp_path)
    assert adapter.alpha_source == source and adapter.is_dora == ("use_dora" in options)
    if options["target_modules"] == EVERY:
        assert adapter.layers.keys() == all_linear_shapes(build_dit(base_weights())).keys()
    else:
        assert "t5_y_embedder.to_q" in adapter.layers
    expected = run_diffusers(model)
    actual = run_diffusers(diffusers_model(merged(base_weights(), adapter)))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    base = run_diffusers(diffusers_model(base_weights()))
    assert (base - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_parameters_of_a_live_model_have_the_adapters_name_in_them(tmp_path):
    from safetensors.torch import save_file

    model = adapted_model(target_modules=EVERY, r=4, lora_alpha=4, use_dora=True)
    tensors = {key: tensor for key, tensor in model.state_dict().items() if "lora_" in key}
    assert all(".default" in key for key in tensors)
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = load_adapter(tmp_path)
    expected = run_diffusers(model)
    actual = run_diffusers(diffusers_model(merged(base_weights(), adapter)))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert len(load_file(tmp_path / "a.safetensors")) == len(tensors)


def test_diffusers_loads_an_export_of_every_layer(tmp_path):
    """Also after a conversion to native, where only the number of blocks identifies the last block."""
    model = adapted_model(target_modules=EVERY, r=4, lora_alpha=6)
    save_diffusers(model, tmp_path)
    save_adapter(tmp_path / "native.safetensors", load_adapter(tmp_path / "pytorch_lora_weights.safetensors"))
    save_adapter(tmp_path / "again.safetensors", load_adapter(tmp_path / "native.safetensors"), "diffusers")
    fresh = diffusers_model(base_weights())
    with nothing_may_be_warned():
        fresh.load_lora_adapter(str(tmp_path / "again.safetensors"), use_safetensors=True)
    expected = run_diffusers(model)
    assert (run_diffusers(fresh) - expected).abs().max() <= 2e-5 * expected.abs().max()
