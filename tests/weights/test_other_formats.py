"""Weights in unsupported formats, which are not reported as damaged, and several files with one part."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_diffusers import to_diffusers
from helpers_golden import GOLDEN
from helpers_weights import TINY, make_comfyui, official, refused, small_configs
from safetensors.torch import load_file, save_file

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import diffusers_map
from mochi_tune.weights.paths import SETTINGS, WeightsPaths


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dit.gguf", "a GGUF file"), ("dit.ckpt", "a pickle of PyTorch"), ("old.pt", "a pickle of PyTorch")],
)
def test_a_good_file_of_another_format_is_not_to_be_deleted(tmp_path, name, kind):
    path = tmp_path / name
    if name == "dit.ckpt":
        torch.save({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(b"GGUF\x03\0\0\0" + bytes(64) if name == "dit.gguf" else pickle.dumps({"a": 1}))
    with pytest.raises(
        CheckpointError, match=rf"{name} is {kind}, which is not supported: use the same weights as"
    ) as error:
        WeightsFolder(WeightsPaths(TINY, transformer=path)).check(["dit"])
    assert "delete" not in str(error.value) and "\n" not in str(error.value)
    # The same with the name of a safetensors file.
    shutil.move(path, tmp_path / "dit.safetensors")
    if name != "old.pt":
        assert f"dit.safetensors is {kind}" in refused(tmp_path, "dit")


def test_a_model_with_only_pickles_is_refused_as_such(tmp_path):
    shutil.copytree(TINY / "text_encoder", tmp_path / "text_encoder", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"a": torch.zeros(2)}, tmp_path / "text_encoder" / "pytorch_model.bin")
    assert "text_encoder has pytorch_model.bin, and only safetensors files are supported: use the" in refused(
        tmp_path, "text_encoder"
    )


def test_a_choice_of_single_files_with_diffusers_keys_names_them(tmp_path):
    folder = small_configs(tmp_path / "models")
    model = WeightsFolder(TINY)
    tensors = to_diffusers(model.load_dit("cpu", torch.float32).state_dict(), diffusers_map(model.dit_skeleton()))
    shutil.copy(TINY / "dit_config.json", folder)
    for name in ("one", "two"):
        save_file(tensors, folder / f"{name}.safetensors")
    assert (
        "several files with a DiT, one.safetensors, two.safetensors: choose one with model.transformer=FILE"
        in refused(folder, "dit")
    )


def test_folders_in_comfyuis_folders_are_searched(tmp_path):
    models = make_comfyui(tmp_path / "ComfyUI", GOLDEN) / "models"
    for name in ("diffusion_models/mochi_preview_bf16.safetensors", "vae/mochi_vae.safetensors"):
        (models / name).parent.joinpath("mochi").mkdir()
        (models / name).rename((models / name).parent / "mochi" / Path(name).name)
    (models / "vae" / "ae.safetensors").unlink()
    for paths in (WeightsPaths(models), WeightsPaths(models, models / "diffusion_models", models / "vae")):
        weights = WeightsFolder(paths)
        weights.check(["dit", "encoder", "decoder", "text_encoder"])
        assert weights.has("dit") and weights.has("decoder")
    source = models / "diffusion_models" / "mochi" / "mochi_preview_bf16.safetensors"
    shutil.copy(source, models / "diffusion_models")
    assert "diffusion_models/mochi_preview_bf16.safetensors, diffusion_models/mochi/mochi_preview_bf16" in refused(
        models, "dit"
    )
    shutil.rmtree(models / "vae" / "mochi")
    assert not WeightsFolder(models).has("decoder")
    assert "has no decoder.safetensors or vae/config.json and no file with a VAE decoder" in refused(models, "decoder")


def in_format(tensors: dict, weight: str, *more: str, dtype: torch.dtype = torch.uint8) -> dict:
    """Stores the matrices of blocks as bytes, by this ending of their names, with more tensors by other endings."""
    stored = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.startswith(("blocks.", "encoder.block.")):
            stored[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        stored[f"{layer}.{weight}"] = torch.zeros(tensor.shape, dtype=dtype)
        stored |= {f"{layer}.{ending}": torch.ones(1) for ending in more}
    return stored


QUANTIZED = {
    "GGUF's blocks, by ": ("Q8_0_qweight",),
    "4 bits of bitsandbytes, by ": (
        "weight",
        "weight.absmax",
        "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4",
    ),
    "8 bits of bitsandbytes, by ": ("weight", "SCB"),
    "GPTQ or AWQ, by ": ("qweight", "qzeros", "scales"),
    "quanto, by ": ("weight._data", "weight._scale"),
    "integers with scales, by ": ("weight", "weight_scale"),
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_refused_by_name(tmp_path, kind):
    folder = small_configs(tmp_path)
    for part, tensors, advice in (
        ("dit", official("dit"), "model.precision=nf4, fp8 or int8 quantizes it while loading."),
        ("text_encoder", load_file(TINY / "text_encoder" / "model.safetensors"), "memory.t5_dtype=int8 quantizes it"),
    ):
        path = folder / f"{part}_quantized.safetensors"
        save_file(in_format(tensors, *QUANTIZED[kind], dtype=torch.int8), path)
        for paths in (WeightsPaths(folder), replace(WeightsPaths(folder), **{SETTINGS[part]: path})):
            said = refused(paths, part)
            assert f"{path} is quantized ({kind}" in said and "use the file in bf16 or fp8; " + advice in said, said
    # It is another file's fault only if no file can be used.
    save_file(official("dit"), folder / "mochi_bf16.safetensors")
    WeightsFolder(folder).check(["dit"])
