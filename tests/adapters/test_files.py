import itertools
import json
import os

import pytest
import torch
from helpers_adapters import (
    ALL,
    ATTENTION,
    GOLDEN,
    MIXED,
    UNIFORM,
    assert_same_change,
    base_shapes,
    base_weights,
    build_dit,
    delta64,
    delta_weight,
    random_adapter,
    with_magnitudes,
    write,
)
from safetensors import safe_open
from safetensors.torch import load_file

from mochi_tune.adapters.files import (
    check_adapter,
    load_adapter,
    save_adapter,
)
from mochi_tune.errors import CheckpointError

FORMATS = ("official", "diffusers", "comfyui", "native")


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


# Conversions between all pairs of formats


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("sizes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize("kinds", [ATTENTION, ALL, ("attn.qkv_y", "mlp_y.w1")], ids=["attention", "all", "some"])
def test_every_pair_of_formats_keeps_the_change(tmp_path, kinds, sizes, is_dora):
    adapter = random_adapter(kinds, sizes)
    formats = [to for to in FORMATS if to != "official" or kinds == ATTENTION]
    if is_dora:
        adapter, formats = with_magnitudes(adapter), ["diffusers", "native"]
    for first, second in itertools.product(formats, formats):
        save_adapter(tmp_path / "first.safetensors", adapter, first)
        middle = load_adapter(tmp_path / "first.safetensors")
        save_adapter(tmp_path / "second.safetensors", middle, second)
        for result in (middle, load_adapter(tmp_path / "second.safetensors")):
            assert_same_change(result, adapter)
            # Fusing q, k, v and dropping the padding restore the trained rank.
            assert {n: layer.rank for n, layer in result.layers.items()} == {
                n: layer.rank for n, layer in adapter.layers.items()
            }


def test_native_keeps_every_bit(tmp_path):
    adapter = random_adapter(ALL, MIXED)
    save_adapter(tmp_path / "a.safetensors", adapter)
    loaded = load_adapter(tmp_path / "a.safetensors")
    for name, layer in adapter.layers.items():
        assert torch.equal(loaded.layers[name].a, layer.a)
        assert torch.equal(loaded.layers[name].b, layer.b)
        assert loaded.layers[name].alpha == layer.alpha


def test_bf16_layers_are_scaled_in_fp32(tmp_path):
    adapter = random_adapter(sizes=((3, 1.0),))
    for layer in adapter.layers.values():
        layer.a, layer.b = layer.a.bfloat16(), layer.b.bfloat16()
    for to in FORMATS:
        save_adapter(tmp_path / "a.safetensors", adapter, to)
        assert_same_change(load_adapter(tmp_path / "a.safetensors"), adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loaded_layers_are_fp32(tmp_path, dtype):
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(GOLDEN / "lora.safetensors").items()}
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors, read_metadata(GOLDEN / "lora.safetensors")))
    for name, layer in adapter.layers.items():
        assert layer.a.dtype == layer.b.dtype == torch.float32
        assert torch.equal(layer.a, tensors[f"{name}.lora_A"].float())
        assert torch.equal(layer.b, tensors[f"{name}.lora_B"].float())


@pytest.mark.parametrize("to", ["official", "diffusers", "comfyui", "kohya"])
def test_what_is_made_from_an_export_states_the_alpha_of_its_layers(tmp_path, to):
    """Exports of earlier versions state the alpha of the training, and exports of mixed ranks that of the padding."""
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(ATTENTION, MIXED), to)
    write(path, load_file(path), read_metadata(path) | {"alpha": "8", "rslora": "true"})
    save_adapter(tmp_path / "native.safetensors", load_adapter(path))
    adapter = load_adapter(tmp_path / "native.safetensors")
    alphas = sorted({layer.alpha for layer in adapter.layers.values()})
    assert adapter.alpha == adapter.metadata["alpha"] == ",".join(f"{alpha:g}" for alpha in alphas)
    assert len(alphas) == 4 and "rslora" not in adapter.metadata and adapter.metadata["rank"] == "3,4,5,16"


def test_metadata_survives_every_conversion(tmp_path):
    adapter = random_adapter()
    known = {
        "base_model": "genmo/mochi-1-preview",
        "base_fingerprint": "abc",
        "rank": "16",
        "alpha": "64",
        "targets": "attn.*",
        "step": "900",
        "config_hash": "def",
        "num_blocks": "2",
    }
    adapter.metadata = known
    for order in itertools.permutations(FORMATS):
        current = adapter
        for to in order:
            save_adapter(tmp_path / "a.safetensors", current, to)
            current = load_adapter(tmp_path / "a.safetensors")
        given = {"created_by": current.metadata["created_by"], "modelspec.title": "LoRA"}
        # All layouts except the native one have alpha in the weights, and state that alpha.
        assert current.metadata == {**known, **given, "alpha": "16"}
        written = read_metadata(tmp_path / "a.safetensors")
        assert written["created_by"].startswith("mochi-tune ")
        assert written["format"] == {"native": "mochi-tune"}.get(order[-1], order[-1])
        assert ("kwargs" in written) == (order[-1] in ("official", "native"))


# Official


def test_golden_adapter_has_the_alphas_of_its_kwargs():
    adapter = load_adapter(GOLDEN / "lora.safetensors")
    raw = load_file(GOLDEN / "lora.safetensors")
    assert {f"{name}.lora_A" for name in adapter.layers} == {key for key in raw if key.endswith("A")}
    for name, layer in adapter.layers.items():
        assert (layer.rank, layer.alpha) == ((4, 8.0) if "qkv" in name else (2, 2.0))
        assert torch.equal(layer.a, raw[f"{name}.lora_A"])
        assert torch.equal(layer.b, raw[f"{name}.lora_B"])
    assert (adapter.metadata["rank"], adapter.metadata["alpha"]) == ("2,4", "2,8")


@pytest.mark.parametrize("to", FORMATS)
def test_golden_adapter_merged_gives_the_golden_output(tmp_path, to):
    save_adapter(tmp_path / "a.safetensors", load_adapter(GOLDEN / "lora.safetensors"), to)
    weights = base_weights()
    for name, layer in load_adapter(tmp_path / "a.safetensors").layers.items():
        weights[f"{name}.weight"] += delta_weight(layer)
    io = load_file(GOLDEN / "dit_io.safetensors")
    with torch.no_grad():
        out = build_dit(weights)(io["train_z_dit_sigma"], io["sigma"], io["y_feat"], io["y_mask"].bool())
    assert (out - io["lora_out_dit"]).abs().max() <= 2e-5 * io["lora_out_dit"].abs().max()


def official_change(path):
    """Merges a file independently by the rule of the reference trainer: W' = W + alpha / r * B @ A."""
    kwargs, tensors = json.loads(read_metadata(path)["kwargs"]), load_file(path)
    change = {}
    for key in tensors:
        name, _, half = key.rpartition(".")
        if half == "lora_A":
            group = "qkv_proj" if "qkv" in name else "out_proj"
            rank = kwargs[f"{group}_lora_rank"]
            a, b = tensors[key].double(), tensors[f"{name}.lora_B"].double()
            assert len(a) == b.shape[1] == rank
            assert kwargs[f"{group}_lora_dropout"] == 0.0
            change[name] = kwargs[f"{group}_lora_alpha"] / rank * b @ a
    return change


OFFICIAL_KEYS = {
    f"blocks.{i}.attn.{kind}.{half}"
    for i in range(2)
    for kind in ("qkv_x", "qkv_y", "proj_x", "proj_y")
    for half in ("lora_A", "lora_B")
    if (i, kind) != (1, "proj_y")
}


@pytest.mark.parametrize("kinds", [ATTENTION, ("attn.qkv_x",), ("attn.proj_y",), ("attn.qkv_y", "attn.proj_x")])
def test_official_file_is_complete_and_right_for_the_reference(tmp_path, kinds):
    adapter, path = random_adapter(kinds, MIXED), tmp_path / "a.safetensors"
    save_adapter(path, adapter, "official")
    tensors, shapes = load_file(path), base_shapes()
    assert tensors.keys() == OFFICIAL_KEYS
    for name, change in official_change(path).items():
        assert change.shape == shapes[name]
        expected = delta64(adapter.layers[name]) if name in adapter.layers else torch.zeros(shapes[name]).double()
        assert (change - expected).abs().max() <= 1e-6 * max(expected.abs().max(), 1e-6)


def test_native_file_that_is_complete_and_uniform_loads_in_the_reference(tmp_path):
    path = tmp_path / "a.safetensors"
    adapter = random_adapter(ATTENTION, UNIFORM)
    save_adapter(path, adapter)
    for name, change in official_change(path).items():
        assert torch.allclose(change, delta64(adapter.layers[name]), rtol=0, atol=1e-9)
    for other in (random_adapter(ATTENTION, MIXED), random_adapter(("attn.qkv_x", "attn.proj_x")), random_adapter(ALL)):
        save_adapter(path, other)
        assert "kwargs" not in read_metadata(path)


def test_official_has_no_mlps(tmp_path):
    with pytest.raises(CheckpointError, match=r"no MLP layers.*blocks\.0\.mlp_x\.w1.*use to=diffusers or to=comfyui"):
        save_adapter(tmp_path / "a.safetensors", random_adapter(ALL), "official")
    assert list(tmp_path.iterdir()) == []


def test_official_needs_the_number_of_blocks(tmp_path):
    adapter = random_adapter()
    del adapter.metadata["num_blocks"]
    save_adapter(tmp_path / "whole.safetensors", adapter, "official")
    assert load_file(tmp_path / "whole.safetensors").keys() == OFFICIAL_KEYS
    adapter.layers = {name: layer for name, layer in adapter.layers.items() if name.startswith("blocks.0.")}
    save_adapter(tmp_path / "native.safetensors", adapter)
    assert "kwargs" not in read_metadata(tmp_path / "native.safetensors")
    with pytest.raises(CheckpointError, match="has no num_blocks"):
        save_adapter(tmp_path / "a.safetensors", adapter, "official")
    for stated, message in (("1", r"blocks\.0\.attn\.proj_y"), ("1000000000", "1 to 999"), ("two", "1 to 999")):
        adapter.metadata["num_blocks"] = stated
        with pytest.raises(CheckpointError, match=message):
            save_adapter(tmp_path / "a.safetensors", adapter, "official")


# ComfyUI


def comfyui_change(path, model_keys):
    """Merges by ComfyUI's rule for Mochi: names with and without the prefix; alpha / rank only with an `.alpha`."""
    tensors = load_file(path)
    change, used = {}, set()
    for model_key in model_keys:
        for name in (model_key, f"diffusion_model.{model_key}"):
            if f"{name}.lora_B" in tensors:
                a, b = tensors[f"{name}.lora_A"].double(), tensors[f"{name}.lora_B"].double()
                scale = tensors[f"{name}.alpha"].item() / len(a) if f"{name}.alpha" in tensors else 1.0
                change[model_key] = scale * b @ a
                used |= {f"{name}.lora_A", f"{name}.lora_B", f"{name}.alpha"}
    assert tensors.keys() <= used, "lora key not loaded"
    return change


@pytest.mark.parametrize("to", ["comfyui", "official"])
@pytest.mark.parametrize("kinds", [ATTENTION, ALL], ids=["attention", "all"])
def test_comfyui_applies_the_same_change(tmp_path, kinds, to):
    kinds = ATTENTION if to == "official" else kinds
    adapter, path = random_adapter(kinds, MIXED), tmp_path / "a.safetensors"
    save_adapter(path, adapter, to)
    change = comfyui_change(path, base_shapes())
    assert change.keys() == adapter.layers.keys()
    for name, layer in adapter.layers.items():
        expected = delta64(layer)
        assert (change[name] - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("suffix", ["", ".weight"])
@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_comfyui_files_are_read_at_the_scale_it_gives_them(tmp_path, prefix, alpha, suffix):
    torch.manual_seed(0)
    key = f"{prefix}blocks.0.mlp_x.w2"
    a, b = torch.randn(2, 512), torch.randn(192, 2)
    tensors = {f"{key}.lora_A{suffix}": a, f"{key}.lora_B{suffix}": b}
    if alpha:
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert torch.equal(delta_weight(adapter.layers["blocks.0.mlp_x.w2"]), (1.5 if alpha else 1.0) * (b @ a))


# Writing


def test_a_save_replaces_the_file_atomically(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(seed=1))
    old = path.read_bytes()
    with path.open("rb") as reader:
        save_adapter(path, random_adapter(seed=2))
        assert reader.read() == old
    assert path.read_bytes() != old
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_synced_before_the_rename(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    save_adapter(tmp_path / "a.safetensors", random_adapter())
    assert calls == ["fsync", "replace"]


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    path = tmp_path / "a.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        save_adapter(path, random_adapter())
    assert list(tmp_path.iterdir()) == [path]


# The base of an adapter


def test_an_adapter_of_this_base_passes():
    adapter = random_adapter(ALL)
    check_adapter(adapter, base_shapes(), "abc")
    adapter.metadata["base_fingerprint"] = "abc"
    check_adapter(adapter, base_shapes(), "abc")
    check_adapter(adapter, base_shapes(), None)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    path = tmp_path / "mine.safetensors"
    adapter = random_adapter()
    adapter.metadata["base_fingerprint"] = "abc"
    save_adapter(path, adapter)
    adapter = load_adapter(path)
    with pytest.raises(
        CheckpointError, match=r"mine\.safetensors was trained on another base: base_fingerprint is abc"
    ):
        check_adapter(adapter, base_shapes(), "xyz")
    adapter.metadata["base_fingerprint"] = "F8_E4M3:" + "a" * 64
    with pytest.raises(CheckpointError, match=f"is F8_E4M3:{'a' * 12}, this base's is F8_E4M3:{'b' * 12}:"):
        check_adapter(adapter, base_shapes(), "F8_E4M3:" + "b" * 64)
    shapes = base_shapes()
    shapes["blocks.0.attn.qkv_x"] = (9216, 3072)
    del shapes["blocks.1.attn.qkv_y"]
    with pytest.raises(CheckpointError) as error:
        check_adapter(adapter, shapes, "abc")
    assert "blocks.0.attn.qkv_x is 576x192, in the base 9216x3072" in str(error.value)
    assert "the base has no blocks.1.attn.qkv_y" in str(error.value)
