"""Weights in unsupported formats, which are not reported as damaged, and several files with one part."""

import pickle
import shutil

import pytest
import torch
from helpers_diffusers import to_diffusers
from helpers_weights import TINY, refused, small_configs
from safetensors.torch import save_file

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import diffusers_map
from mochi_tune.weights.paths import WeightsPaths


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
