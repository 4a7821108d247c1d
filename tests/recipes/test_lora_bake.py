import errno
import inspect
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers_adapters import ALL, GOLDEN, MIXED, adapted64, base_weights, random_adapter, with_magnitudes
from helpers_dit import random_dit, relative_error, run_dit
from helpers_memory import HeldMemory
from helpers_weights import small_configs
from safetensors.torch import load_file, save_file

from mochi_tune import assets
from mochi_tune.adapters.files import Adapter, LoraLayer, save_adapter
from mochi_tune.cli.lora import run_lora
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.recipes import lora_bake
from mochi_tune.recipes.lora_bake import Settings, diffusers_config
from mochi_tune.weights.folder import WeightsFolder


def saved(folder, adapter):
    save_adapter(folder / "adapter.safetensors", adapter)
    return folder / "adapter.safetensors"


@pytest.fixture(scope="module")
def loras(tmp_path_factory):
    """Returns an adapter and a DoRA of all layers, with their files."""
    found = {}
    for kind, adapter in (("lora", random_adapter(ALL, MIXED)), ("dora", with_magnitudes(random_adapter(ALL, MIXED)))):
        found[kind] = adapter, saved(tmp_path_factory.mktemp(kind), adapter)
    return found


@pytest.mark.parametrize("to", ["official", "diffusers"])
@pytest.mark.parametrize(("kind", "strength"), [("lora", 1.0), ("lora", -0.7), ("dora", 1.0), ("dora", 0.6)])
def test_the_baked_model_is_the_base_with_the_adapter(tmp_path, loras, kind, strength, to):
    adapter, path = loras[kind]
    lora_bake.main(path, GOLDEN, tmp_path / "baked", Settings(strength, to, "fp32"))
    baked = WeightsFolder(tmp_path / "baked")
    for name, weight in base_weights().items():
        got, expected = torch.empty(weight.shape), weight.double()
        baked.read_dit_tensor(name, got)
        layer = adapter.layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(got, weight)
        else:
            expected = expected + strength * (adapted64(weight, layer) - expected)
            # Sums of at most 17 terms in fp32.
            assert relative_error(got.double(), expected) <= 1e-6
    beside = run_dit(GOLDEN, adapter, strength)
    assert relative_error(run_dit(tmp_path / "baked"), beside) <= 2e-5
    assert relative_error(run_dit(GOLDEN), beside) > 1e-2


def test_a_base_may_be_one_file(tmp_path, loras):
    _, path = loras["lora"]
    base = small_configs(tmp_path / "models") / "mochi.safetensors"
    shutil.copy(GOLDEN / "dit.safetensors", base)
    command = ["bake", str(path), f"model.weights={base}", f"out={tmp_path / 'baked'}", "dtype=fp32"]
    assert run_lora(command) == 0
    lora_bake.main(path, GOLDEN, tmp_path / "other", Settings(dtype="fp32"))
    one, other = (load_file(tmp_path / name / "dit.safetensors") for name in ("baked", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_diffusers_loads_what_was_baked(tmp_path, loras):
    from diffusers import MochiTransformer3DModel

    adapter, path = loras["lora"]
    lora_bake.main(path, GOLDEN, tmp_path / "baked", Settings(to="diffusers", dtype="fp32"))
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("diffusers").addHandler(handler)
    try:
        model = MochiTransformer3DModel.from_pretrained(tmp_path / "baked", subfolder="transformer")
    finally:
        logging.getLogger("diffusers").removeHandler(handler)
    # diffusers would warn of unknown keys in the configuration.
    assert said == []
    io = load_file(GOLDEN / "dit_io.safetensors")
    with torch.no_grad():
        got = model(io["z"], io["y_feat"], (1 - io["sigma"]) * 1000, io["y_mask"].float(), return_dict=False)[0]
    assert relative_error(got, run_dit(GOLDEN, adapter)) <= 2e-5


def test_layers_outside_of_the_blocks_are_baked(tmp_path):
    names = ("t5_y_embedder.to_q", "t_embedder.mlp.0", "final_layer.linear")
    weights = base_weights()
    layers = {}
    for name in names:
        (out, width), values = weights[f"{name}.weight"].shape, torch.Generator().manual_seed(0)
        a, b = torch.randn(2, width, generator=values), torch.randn(out, 2, generator=values)
        layers[name] = LoraLayer(a, b, alpha=3.0)
    lora_bake.main(saved(tmp_path, Adapter(layers)), GOLDEN, tmp_path / "baked", Settings(dtype="fp32"))
    baked = load_file(tmp_path / "baked" / "dit.safetensors")
    for name, weight in weights.items():
        layer = layers.get(name.removesuffix(".weight"))
        expected = weight.double() if layer is None else adapted64(weight, layer)
        assert relative_error(baked[name].double(), expected) <= 1e-6


def test_the_official_file_has_the_official_keys(tmp_path, loras):
    lora_bake.main(loras["lora"][1], GOLDEN, tmp_path / "baked", Settings())
    baked, base = load_file(tmp_path / "baked" / "dit.safetensors"), load_file(GOLDEN / "dit.safetensors")
    assert {name: t.shape for name, t in baked.items()} == {name: t.shape for name, t in base.items()}
    assert baked["blocks.0.attn.qkv_x.weight"].dtype == torch.bfloat16
    assert baked["blocks.0.attn.q_norm_x.weight"].dtype == baked["pos_frequencies"].dtype == torch.float32
    record = json.loads((tmp_path / "baked" / "baked.json").read_text())
    assert (
        record["base_fingerprint"] == WeightsFolder(GOLDEN).base_identity() and len(record["adapter"]["sha256"]) == 64
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sums_are_rounded_once(tmp_path, loras, dtype):
    for each in (dtype, "fp32"):
        lora_bake.main(loras["lora"][1], GOLDEN, tmp_path / each, Settings(dtype=each))
    rounded, exact = (load_file(tmp_path / each / "dit.safetensors") for each in (dtype, "fp32"))
    for name, tensor in rounded.items():
        assert torch.equal(tensor, exact[name].to(tensor.dtype)), name


def test_the_folder_has_every_part_and_takes_no_more_space(tmp_path):
    """Symbolic links, as in the hub's cache, are resolved."""
    base = tmp_path / "base"
    base.mkdir()
    for path in (Path(assets.__path__[0]) / "tiny").iterdir():
        (base / path.name).symlink_to(path)
    layer = LoraLayer(torch.ones(1, 192), torch.ones(576, 1), 1.0)
    path = saved(tmp_path, Adapter({"blocks.0.attn.qkv_x": layer}))
    baked = lora_bake.main(path, base, tmp_path / "baked", Settings())
    WeightsFolder(tmp_path / "baked").check(("dit", "encoder", "decoder", "text_encoder"))
    assert "text_encoder" in baked.others and "sha256.json" not in baked.others
    assert not (tmp_path / "baked" / "encoder.safetensors").is_symlink()


def test_what_cannot_be_baked_leaves_nothing(tmp_path, loras):
    path = loras["lora"][1]
    out = tmp_path / "new" / "baked"
    with pytest.raises(CheckpointError, match="too large for the dtype"):
        lora_bake.main(path, GOLDEN, out, Settings(1e8, dtype="fp16"))
    for dtype in ("bf16", "fp32"):
        with pytest.raises(CheckpointError, match=r"^blocks\.0\..*weight: .* at strength=1e\+39: use a smaller one"):
            lora_bake.main(path, GOLDEN, out, Settings(1e39, dtype=dtype))
    (tmp_path / "other").mkdir()
    wide = Adapter({"blocks.5.attn.proj_x": LoraLayer(torch.ones(1, 192), torch.ones(192, 1), 1.0)})
    with pytest.raises(CheckpointError, match=r"the base has no blocks\.5\.attn\.proj_x"):
        lora_bake.main(saved(tmp_path / "other", wide), GOLDEN, out, Settings())
    assert list(tmp_path.rglob("*baked*")) == []
    out.mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists and is never overwritten"):
        lora_bake.main(path, GOLDEN, out, Settings())


def test_a_base_that_is_not_finite_is_named_and_not_the_adapter(tmp_path, loras):
    base = shutil.copytree(GOLDEN, tmp_path / "base")
    tensors = load_file(base / "dit.safetensors")
    tensors["blocks.1.attn.qkv_x.weight"][3, 5] = torch.nan
    save_file(tensors, base / "dit.safetensors")
    with pytest.raises(CheckpointError, match=r"^blocks\.1\.attn\.qkv_x\.weight: the base has NaN or infinity"):
        lora_bake.main(loras["lora"][1], base, tmp_path / "baked", Settings())


def test_where_no_links_can_be_made_files_are_copied(tmp_path, loras, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    lora_bake.main(loras["lora"][1], GOLDEN, tmp_path / "baked", Settings())
    assert (tmp_path / "baked" / "encoder.safetensors").read_bytes() == (GOLDEN / "encoder.safetensors").read_bytes()


def test_the_sizes_of_mochi_1_are_diffusers_defaults():
    from diffusers import MochiTransformer3DModel

    parameters = inspect.signature(MochiTransformer3DModel.__init__).parameters
    defaults = {name: each.default for name, each in parameters.items() if name != "self"}
    assert diffusers_config(DiTConfig()) == {"_class_name": "MochiTransformer3DModel", **defaults}


def test_sizes_that_diffusers_lacks_are_refused():
    for config in (DiTConfig(hidden_size_x=240, num_heads=6), DiTConfig(out_bias=False), DiTConfig(mlp_ratio_y=2.0)):
        with pytest.raises(ConfigError, match="to=diffusers does not fit"):
            diffusers_config(config)


def test_memory_does_not_grow_with_the_blocks(tmp_path):
    layer = LoraLayer(torch.ones(4, 192), torch.ones(1024, 4), 4.0)
    path = saved(tmp_path, Adapter({"blocks.0.mlp_x.w1": layer}))
    peaks = []
    for depth in (2, 8):
        base = random_dit(tmp_path / f"base_{depth}", depth)
        with HeldMemory() as memory:
            lora_bake.main(path, base, tmp_path / f"baked_{depth}", Settings(to="diffusers"))
        peaks.append(memory.peak)
    assert peaks[1] == peaks[0] < os.path.getsize(tmp_path / "base_8" / "dit.safetensors") / 4
