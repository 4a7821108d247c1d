import os

import pytest
import torch
from helpers_adapters import ALL, GOLDEN, MIXED, base_weights, delta64, random_adapter
from helpers_dit import random_dit, write_dit
from helpers_memory import HeldMemory
from safetensors.torch import load_file

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.adapters.tools import compare_adapters
from mochi_tune.errors import CheckpointError
from mochi_tune.recipes import lora_bake, lora_extract
from mochi_tune.weights.folder import WeightsFolder


@pytest.mark.parametrize("to", ["official", "diffusers"])
def test_a_known_change_comes_back(tmp_path, to):
    """The tuned checkpoint may have another layout than the base."""
    adapter = random_adapter(ALL, MIXED)
    save_adapter(tmp_path / "known.safetensors", adapter)
    lora_bake.main(tmp_path / "known.safetensors", GOLDEN, tmp_path / "tuned", lora_bake.Settings(0.5, to, "fp32"))
    made = lora_extract.main(GOLDEN, tmp_path / "tuned", tmp_path / "out.safetensors", 16)
    found = load_adapter(tmp_path / "out.safetensors")
    assert found.layers.keys() == adapter.layers.keys() and not made.not_held
    for layer in adapter.layers.values():
        layer.alpha *= 0.5
    # The tuned weights are rounded to fp32, by 6e-8 of values that are not much larger than the changes.
    assert max(compare_adapters(found, adapter).differences.values()) <= 2e-6
    assert made.errors is not None and made.errors.total <= 2e-6
    assert found.metadata["base_fingerprint"] == WeightsFolder(GOLDEN).base_identity()
    assert found.metadata["num_blocks"] == "2"


def test_a_lower_rank_reports_the_tail(tmp_path):
    weights = base_weights()
    generator = torch.Generator().manual_seed(3)
    changes = {
        name: 0.1 * torch.randn(weights[f"{name}.weight"].shape, generator=generator)
        for name in random_adapter(ALL).layers
    }
    tuned = write_dit(
        tmp_path / "tuned", {k: w + changes.get(k.removesuffix(".weight"), 0) for k, w in weights.items()}
    )
    made = lora_extract.main(GOLDEN, tuned, tmp_path / "out.safetensors", 5)
    found = load_adapter(tmp_path / "out.safetensors")
    assert made.errors is not None
    for name, change in changes.items():
        values = torch.linalg.svdvals(change.double())
        expected = float(values[5:].norm() / values.norm())
        assert made.errors.layers[name] == pytest.approx(expected, rel=1e-5)
        assert float((delta64(found.layers[name]) - change).norm() / change.norm()) == pytest.approx(expected, rel=1e-5)


def test_tensors_that_an_adapter_cannot_hold_are_reported(tmp_path):
    weights = {name: weight.clone() for name, weight in base_weights().items()}
    weights["blocks.0.attn.proj_x.bias"] *= 1.5
    weights["blocks.0.mlp_x.w1.weight"] += 0.1
    weights["blocks.1.attn.qkv_x.weight"] += 0.1
    made = lora_extract.main(GOLDEN, write_dit(tmp_path / "tuned", weights), tmp_path / "o.safetensors", 2, "attention")
    assert list(made.adapter.layers) == ["blocks.1.attn.qkv_x"]
    assert made.not_held.keys() == {"blocks.0.attn.proj_x.bias", "blocks.0.mlp_x.w1.weight"}
    assert made.not_held["blocks.0.attn.proj_x.bias"] == pytest.approx(0.5, rel=1e-6)
    assert "2 other tensors differ and are not held" in str(made)


def test_a_folder_without_a_model_is_named_by_its_setting(tmp_path):
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run" / "adapter.safetensors", random_adapter(ALL))
    for key, folders in (("base", (tmp_path / "run", GOLDEN)), ("tuned", (GOLDEN, tmp_path / "run"))):
        with pytest.raises(CheckpointError, match=rf"^{key}=.*run has no DiT: name a folder or a file of weights\.$"):
            lora_extract.main(*folders, tmp_path / "out.safetensors", 2)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = base_weights()
    weights["blocks.0.attn.qkv_x.weight"] = torch.full((576, 192), float("nan"))
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.qkv_x\.weight holds NaN or infinity"):
        lora_extract.main(GOLDEN, write_dit(tmp_path / "tuned", weights), tmp_path / "out.safetensors", 2)
    assert not (tmp_path / "out.safetensors").exists()


def test_memory_does_not_grow_with_the_blocks(tmp_path):
    peaks = []
    for depth in (2, 8):
        base = random_dit(tmp_path / f"base_{depth}", depth)
        tensors = load_file(base / "dit.safetensors")
        tensors["blocks.0.mlp_x.w1.weight"] += 0.1
        tuned = write_dit(tmp_path / f"tuned_{depth}", tensors, WeightsFolder(base).dit_skeleton().config)
        with HeldMemory() as memory:
            lora_extract.main(base, tuned, tmp_path / f"{depth}.safetensors", 2)
        peaks.append(memory.peak)
    assert peaks[1] == peaks[0] < os.path.getsize(tmp_path / "base_8" / "dit.safetensors") / 2
