import pytest
import torch
from helpers_adapters import ATTENTION, GOLDEN, MIXED, MLPS, assert_same_change, random_adapter, with_magnitudes

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.cli.main import run_export
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.recipes import export


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, random_adapter(ATTENTION))
    return path


@pytest.mark.parametrize(("to", "num_layers"), [("official", 7), ("diffusers", 15), ("comfyui", 7), ("native", 7)])
def test_export_writes_the_format_and_says_what(tmp_path, trained, to, num_layers):
    out = tmp_path / "new" / "folder" / "lora.safetensors"
    summary = export.main(trained, to, out)
    assert (summary.file, summary.to, summary.num_layers) == (out, to, num_layers)
    assert (summary.trained_rank, summary.rank) == ("16", "16")
    assert summary.alpha == ("64" if to == "native" else "16")
    assert_same_change(load_adapter(out), load_adapter(trained))
    assert load_adapter(out).metadata["step"] == "12"


def test_a_change_of_rank_is_reported(tmp_path):
    summary = export.main(GOLDEN / "lora.safetensors", "diffusers", tmp_path / "lora.safetensors")
    assert (summary.trained_rank, summary.rank, summary.alpha) == ("2,4", "4", "4")
    assert str(summary) == f"{summary.file}: diffusers, 15 layers, rank 4 (trained at 2,4), alpha 4"


def test_an_existing_file_is_never_overwritten(tmp_path, trained):
    before = trained.read_bytes()
    with pytest.raises(ConfigError, match="exists, and an export never overwrites"):
        export.main(trained, "comfyui", trained)
    assert trained.read_bytes() == before


@pytest.mark.parametrize(("to", "nearest"), [("difusers", "diffusers"), ("comfy", "comfyui"), ("genmo", "native")])
def test_an_unknown_format_names_the_nearest(tmp_path, to, nearest):
    with pytest.raises(ConfigError, match=f"to={to} is not.*official, diffusers, comfyui, native: use {nearest}"):
        export.main(tmp_path / "nothing.safetensors", to, tmp_path / "new" / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_only_safetensors_names_are_written(tmp_path, trained):
    with pytest.raises(ConfigError, match=r"must end in \.safetensors: use lora\.safetensors"):
        export.main(trained, "comfyui", tmp_path / "lora.pt")


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path, trained):
    with pytest.raises(ConfigError, match="its folder cannot be made"):
        export.main(trained, "comfyui", trained / "lora.safetensors")


def test_ranks_by_pattern_are_reported_as_they_were_trained(tmp_path):
    adapter = random_adapter(ATTENTION, MIXED)
    adapter.metadata |= {"rank": "3,4,5,16", "alpha": "8", "rslora": "true"}
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    summary = export.main(tmp_path / "adapter.safetensors", "diffusers", tmp_path / "lora.safetensors")
    assert (summary.trained_rank, summary.rank, summary.alpha) == ("3,4,5,16", "16", "16")
    exported = load_adapter(tmp_path / "lora.safetensors")
    assert_same_change(exported, adapter)
    assert exported.metadata["rslora"] == "true" and exported.metadata["alpha"] == "8"


@pytest.mark.parametrize("to", ["official", "comfyui"])
def test_a_dora_is_exported_where_it_renders_what_was_trained(tmp_path, to):
    save_adapter(tmp_path / "adapter.safetensors", with_magnitudes(random_adapter(ATTENTION)))
    export.main(tmp_path / "adapter.safetensors", "diffusers", tmp_path / "lora.safetensors")
    assert load_adapter(tmp_path / "lora.safetensors").is_dora
    with pytest.raises(CheckpointError, match=f"is a DoRA, and {to} has no form"):
        export.main(tmp_path / "adapter.safetensors", to, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    save_adapter(tmp_path / "adapter.safetensors", random_adapter(ATTENTION + MLPS))
    with pytest.raises(CheckpointError, match="no MLP layers"):
        export.main(tmp_path / "adapter.safetensors", "official", tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_the_command_names_a_folder_and_tells_where_alpha_was_found(tmp_path, capsys):
    from safetensors.torch import save_file

    key = "transformer.transformer_blocks.0.attn1.to_out.0.lora"
    tensors = {f"{key}_A.weight": torch.ones(2, 192), f"{key}_B.weight": torch.ones(192, 2)}
    (tmp_path / "bare").mkdir()
    save_file(tensors, tmp_path / "bare" / "pytorch_lora_weights.safetensors")
    command = [f"adapter={tmp_path / 'bare'}", "to=native"]
    assert run_export([*command, f"out={tmp_path / 'a.safetensors'}"]) == 0
    assert (
        "alpha is assumed to be the rank, as nothing states it: adapter_alpha=N of `sample`" in capsys.readouterr().err
    )
    assert run_export([*command, f"out={tmp_path / 'b.safetensors'}", "adapter_alpha=6"]) == 0
    told = capsys.readouterr()
    assert "alpha 6 by adapter_alpha=6" in told.err and "rank 2, alpha 6" in told.out
    layers = [load_adapter(tmp_path / f"{name}.safetensors").layers["blocks.0.attn.proj_x"] for name in "ab"]
    assert [layer.alpha for layer in layers] == [2, 6]
    for wrong in ("x", "0", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match=rf"adapter_alpha={wrong} does not fit: it takes a number above 0"):
            run_export([*command, f"out={tmp_path / 'c.safetensors'}", f"adapter_alpha={wrong}"])
