import re

import pytest
import torch
from helpers_adapters import (
    ATTENTION,
    GOLDEN,
    MIXED,
    MLPS,
    assert_same_change,
    delta64,
    random_adapter,
    with_magnitudes,
)
from safetensors import safe_open
from safetensors.torch import save_file

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
def test_export_writes_the_format_and_returns_a_summary(tmp_path, trained, to, num_layers):
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
    said = "7 layers (15 in the diffusers format), rank 4 (trained at 2,4); alpha 2,8 is folded into the weights"
    assert str(summary) == f"{summary.file}: diffusers, {said}"


def test_an_existing_file_is_never_overwritten(tmp_path, trained):
    before = trained.read_bytes()
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        export.main(trained, "comfyui", trained)
    assert trained.read_bytes() == before


def test_a_link_that_leads_nowhere_is_not_replaced(tmp_path, trained):
    link = tmp_path / "link.safetensors"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        export.main(trained, "comfyui", link)
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("to", "nearest"), [("difusers", "diffusers"), ("comfy", "comfyui"), ("natif", "native"), ("kohja", "kohya")]
)
def test_an_unknown_format_names_the_nearest(tmp_path, to, nearest):
    with pytest.raises(
        ConfigError, match=f"to={to} is not.*official, diffusers, comfyui, kohya, native: use {nearest}"
    ):
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
    assert exported.metadata["rank"] == "3,4,5,16"


@pytest.mark.parametrize(("to", "where"), [("comfyui", "this program's export"), ("kohya", "the file")])
def test_the_alpha_of_an_export_is_that_of_its_layers_and_not_the_trained_one(tmp_path, trained, to, where):
    out, again = tmp_path / "baked.safetensors", tmp_path / "native.safetensors"
    assert "alpha 64 (stated in the file)" in export.main(trained, to, out).source_note
    adapter = load_adapter(out)
    assert {layer.alpha for layer in adapter.layers.values()} == {16} and adapter.metadata["alpha"] == "16"
    assert re.search(rf"alpha 16 \(stated in {where}", export.main(out, "native", again).source_note)
    assert load_adapter(again).metadata["alpha"] == "16"


def test_an_export_does_not_state_the_scale_in_its_weights(tmp_path):
    adapter = random_adapter(ATTENTION)
    # The trained layers have alpha * sqrt(rank), which the summary shows instead of the setting.
    adapter.metadata |= {"rank": "16", "alpha": "16", "rslora": "true"}
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    assert load_adapter(tmp_path / "adapter.safetensors").alpha_note == "alpha 64 (stated in the file)"
    save_adapter(tmp_path / "baked.safetensors", adapter, "comfyui")
    assert "rslora" not in load_adapter(tmp_path / "baked.safetensors").metadata


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


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_error_of_rounding_is_reported(tmp_path, trained, dtype):
    summary = export.main(trained, "comfyui", tmp_path / "lora.safetensors", dtype)
    before, after = load_adapter(trained).layers, load_adapter(tmp_path / "lora.safetensors").layers
    pairs = [(delta64(after[name]), delta64(layer)) for name, layer in before.items()]
    error = sum((new - old).square().sum() for new, old in pairs) / sum(old.square().sum() for _, old in pairs)
    # Both are fp64 sums; computing the norm from the factors loses half of the digits of a difference.
    assert summary.error == pytest.approx(error.sqrt().item(), rel=1e-4)
    # Both halves are rounded, on average by at most a third of a unit in the last place.
    assert 2**-12 < summary.error * (1 if dtype == "bf16" else 8) < 2**-8
    assert f", rank 16, {dtype}, a relative error of {summary.error:.1e} by rounding; alpha 64" in str(summary)


def test_the_error_of_a_doras_magnitudes_counts(tmp_path):
    adapter = with_magnitudes(random_adapter(ATTENTION))
    save_adapter(tmp_path / "adapter.safetensors", adapter)
    for layer in adapter.layers.values():
        layer.a, layer.b = layer.a.bfloat16().float(), layer.b.bfloat16().float()
    assert 1e-4 < export.rounding_error(adapter.layers, torch.bfloat16) < 2**-8


def test_an_export_that_is_stopped_while_it_measures_leaves_no_file(tmp_path, trained, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "_squared_norms", stop)
    with pytest.raises(KeyboardInterrupt):
        export.main(trained, "comfyui", tmp_path / "lora.safetensors", "bf16")
    assert not (tmp_path / "lora.safetensors").exists()


def test_fp32_and_exact_numbers_have_no_error(tmp_path, trained, monkeypatch):
    def refuse(*_):
        raise AssertionError("no product is needed")

    monkeypatch.setattr(export, "_squared_norms", refuse)
    assert export.main(trained, "comfyui", tmp_path / "a.safetensors").error == 0
    with safe_open(trained, "pt") as file:
        names = [key for key in file.keys() if "lora" in key]  # noqa: SIM118
        rounded = {key: file.get_tensor(key).bfloat16() for key in names}
    save_file(rounded, tmp_path / "bf16.safetensors")
    assert export.main(tmp_path / "bf16.safetensors", "comfyui", tmp_path / "b.safetensors", "bf16").error == 0
    with pytest.raises(ConfigError, match="dtype=half is not possible: use fp32, bf16, fp16"):
        export.main(trained, "comfyui", tmp_path / "c.safetensors", "half")


def test_given_metadata_replaces_that_of_the_adapter(tmp_path, trained):
    export.main(trained, "comfyui", tmp_path / "first.safetensors", about={"title": "One", "author": "Ada"})
    export.main(
        tmp_path / "first.safetensors", "kohya", tmp_path / "b.safetensors", about={"title": "Two", "author": ""}
    )
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.title"], metadata["modelspec.author"]) == ("Two", "Ada")
    # The file is in no run, so it has no date.
    assert "modelspec.date" not in metadata


def test_the_command_takes_a_folder_and_reports_the_source_of_alpha(tmp_path, capsys):
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
    assert "alpha 6 (set by adapter_alpha=6)" in told.err and "rank 2, alpha 6" in told.out
    layers = [load_adapter(tmp_path / f"{name}.safetensors").layers["blocks.0.attn.proj_x"] for name in "ab"]
    assert [layer.alpha for layer in layers] == [2, 6]
    for wrong in ("x", "0", "-1", "inf", "nan"):
        with pytest.raises(ConfigError, match=rf"adapter_alpha={wrong} does not fit: it takes a number above 0"):
            run_export([*command, f"out={tmp_path / 'c.safetensors'}", f"adapter_alpha={wrong}"])
