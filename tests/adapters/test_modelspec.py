"""Metadata for other programs, checked by the rules with which they read it."""

import hashlib
import json

import pytest
import torch
from helpers_adapters import ALL, ATTENTION, GOLDEN, MIXED, delta64, random_adapter, with_magnitudes
from safetensors import safe_open
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, save_adapter
from mochi_tune.adapters.modelspec import has_official_shapes, official_base
from mochi_tune.errors import CheckpointError

FORMATS = ("official", "diffusers", "comfyui", "kohya", "native")


def read_metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def full_size_adapter(kinds=("attn.qkv_x", "mlp_y.w2")):
    shapes = json.loads((GOLDEN / "full_size_keys.json").read_text())["dit"]
    names = [f"blocks.0.{kind}" for kind in kinds]
    sizes = {name: shapes[f"{name}.weight"] for name in names}
    return Adapter(
        {n: LoraLayer(torch.ones(1, num_in), torch.ones(num_out, 1), 1.0) for n, (num_out, num_in) in sizes.items()}
    )


@pytest.mark.parametrize("to", FORMATS)
def test_every_format_has_the_keys_that_modelspec_asks_for(tmp_path, to):
    adapter = random_adapter(ATTENTION)
    given = {
        "title": "A title",
        "author": "Ada",
        "trigger_phrase": "zyx",
        "resolution": "848x480",
        "date": "2026-01-02",
    }
    adapter.metadata |= {f"modelspec.{key}": value for key, value in given.items()}
    # Keys of another file, which are not carried over.
    adapter.metadata |= {"modelspec.hash_sha256": "0x0", "modelspec.implementation": "sgm", "ss_network_alpha": "999"}
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter, to)
    found = {k.removeprefix("modelspec."): v for k, v in read_metadata(path).items() if k.startswith("modelspec.")}
    code = "diffusers" if to == "diffusers" else "mochi"
    content = path.read_bytes()
    behind_header = content[8 + int.from_bytes(content[:8], "little") :]
    assert found == {
        **given,
        "sai_model_spec": "1.0.0",
        "architecture": "mochi-tiny/lora",
        "implementation": f"https://github.com/{'huggingface' if code == 'diffusers' else 'genmoai'}/{code}",
        "hash_sha256": f"0x{hashlib.sha256(behind_header).hexdigest()}",
    }
    assert read_metadata(path).get("ss_network_alpha") == ("16" if to == "kohya" else None)


def test_an_adapter_of_mochi_1_is_known_by_its_base_or_its_shapes(tmp_path):
    adapter = full_size_adapter()
    save_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert metadata["modelspec.architecture"] == "genmo-mochi-1/lora" and metadata["modelspec.title"] == "LoRA"
    assert metadata["ss_base_model_version"] == "genmo-mochi-1"
    assert official_base({}, adapter.layers) == "genmo/mochi-1-preview"
    assert official_base({"base_model": "mochi_1"}, adapter.layers) == "genmo/mochi-1-preview"
    # Another base of the same sizes, such as distilled weights.
    assert official_base({"base_model": "fast_mochi"}, adapter.layers) is None
    assert official_base({}, random_adapter(ATTENTION).layers) is None
    assert has_official_shapes(
        full_size_adapter(("attn.qkv_y", "attn.proj_x", "mlp_x.w1", "mlp_x.w2", "mlp_y.w1")).layers
    )


def test_kohyas_file_gives_the_change_by_comfyuis_rule(tmp_path):
    """ComfyUI names a Linear lora_unet_NAME with underscores, and adds alpha / rank * up @ down."""
    adapter = random_adapter(ALL, MIXED)
    save_adapter(tmp_path / "a.safetensors", adapter, "kohya")
    tensors = load_file(tmp_path / "a.safetensors")
    for name, layer in adapter.layers.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up, alpha = (tensors.pop(f"{key}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
        change = alpha.item() / len(down) * up.double() @ down.double()
        assert (change - delta64(layer)).abs().max() <= 1e-6 * delta64(layer).abs().max()
    assert not tensors
    metadata = read_metadata(tmp_path / "a.safetensors")
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "Dynamic"


def test_kohya_has_no_dora(tmp_path):
    with pytest.raises(CheckpointError, match="is a DoRA, and kohya has no form"):
        save_adapter(tmp_path / "a.safetensors", with_magnitudes(random_adapter(ATTENTION)), "kohya")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", FORMATS)
def test_each_number_is_rounded_once(tmp_path, to, dtype):
    """The fp32 values include alpha / rank; scaling a bf16 matrix would round twice."""
    adapter = random_adapter(ATTENTION, sizes=((3, 1.0),))
    layers = save_adapter(tmp_path / "a.safetensors", adapter, to, dtype)
    save_adapter(tmp_path / "b.safetensors", adapter, to)
    tensors, in_fp32 = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert tensors.keys() == in_fp32.keys()
    for name, layer in layers.items():
        for exact in (layer.a, layer.b):
            assert any(torch.equal(t, exact.to(dtype)) for k, t in tensors.items() if k.startswith(f"{name}.lora"))
    assert {t.dtype for k, t in tensors.items() if not k.endswith(".alpha")} == {dtype}
    assert {t.dtype for k, t in tensors.items() if k.endswith(".alpha")} <= {torch.float32}


def test_what_fp16_cannot_hold_is_refused(tmp_path):
    adapter = random_adapter(ATTENTION)
    adapter.layers["blocks.0.attn.qkv_x"].b[3, 2] = 1e5
    with pytest.raises(
        CheckpointError, match=r"qkv_x holds 1e\+05, and the largest number of float16 is 6.55e\+04: use"
    ):
        save_adapter(tmp_path / "a.safetensors", adapter, "native", torch.float16)
    assert not list(tmp_path.iterdir())
    save_adapter(tmp_path / "a.safetensors", adapter, "native", torch.bfloat16)
