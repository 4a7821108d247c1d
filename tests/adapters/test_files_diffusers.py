import pytest
import torch
from helpers_adapters import (
    ALL,
    ATTENTION,
    MIXED,
    UNIFORM,
    base_shapes,
    base_weights,
    delta64,
    delta_weight,
    random_adapter,
    with_magnitudes,
    write,
)
from helpers_diffusers import diffusers_model, merged, nothing_may_be_warned, run_diffusers
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.errors import CheckpointError


def num_adapted(model):
    from peft.tuners.lora import LoraLayer as PeftLoraLayer

    return sum(isinstance(module, PeftLoraLayer) for module in model.modules())


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("sizes", [UNIFORM, MIXED], ids=["uniform", "mixed"])
@pytest.mark.parametrize(("kinds", "count"), [(ATTENTION, 15), (ALL, 21)], ids=["attention", "all"])
@pytest.mark.parametrize("how", ["model", "pipeline"])
def test_diffusers_loads_the_export_without_a_warning(tmp_path, how, kinds, count, sizes, is_dora):
    from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline

    adapter, path, weights = random_adapter(kinds, sizes), tmp_path / "a.safetensors", base_weights()
    if is_dora:
        with_magnitudes(adapter)
    assert len(save_adapter(path, adapter, "diffusers")) == count
    assert not [key for key in load_file(path) if key.endswith(".alpha")]
    model = diffusers_model(weights)
    before = run_diffusers(model)
    with nothing_may_be_warned():
        if how == "model":
            model.load_lora_adapter(str(path), use_safetensors=True)
        else:
            MochiPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, model).load_lora_weights(str(path))
    assert num_adapted(model) == count
    expected = run_diffusers(diffusers_model(merged(weights, adapter)))
    assert (run_diffusers(model) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn1.to_k": 3.0, "^transformer_blocks.0.ff.net.2": 1.0}},
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"to_v": 3, "add_q_proj": 2}},
        {"r": 4, "lora_alpha": 4, "use_dora": True},
        {"r": 4, "lora_alpha": 6, "use_dora": True, "use_rslora": True, "rank_pattern": {"to_v": 3}},
    ],
    ids=["plain", "alpha_pattern", "rslora_and_ranks", "dora", "dora_rslora_and_ranks"],
)
@pytest.mark.parametrize("how", ["model", "pipeline"])
def test_files_that_diffusers_writes(tmp_path, how, options):
    from diffusers import MochiPipeline
    from peft import LoraConfig, get_peft_model_state_dict

    targets = (
        r"transformer_blocks\.\d+\.(attn1\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff\w*\.net\.(0\.proj|2))"
    )
    weights = base_weights()
    model = diffusers_model(weights)
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **options), adapter_name="default")
    assert num_adapted(model) == 21
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    if how == "model":
        model.save_lora_adapter(tmp_path)
    else:
        layers = get_peft_model_state_dict(model)
        config = model.peft_config["default"].to_dict()
        MochiPipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    adapter = load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    assert adapter.is_dora == ("use_dora" in options)
    assert adapter.layers.keys() == base_shapes().keys()
    if "rank_pattern" not in options:
        # q, k and v have their own A, so the fused layer holds the components of all three.
        assert adapter.layers["blocks.1.attn.qkv_y"].rank == 12
    expected = run_diffusers(model)
    actual = run_diffusers(diffusers_model(merged(weights, adapter)))
    assert (actual - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert adapter.metadata["rank"].split(",")[-1] == "4"


def split_tensors(projections=("to_q", "to_k", "to_v"), prefix="transformer.", blocks=(0, 1), shared=False):
    torch.manual_seed(0)
    tensors = {}
    for i in blocks:
        a = torch.randn(4, 192)
        for name in projections:
            key = f"{prefix}transformer_blocks.{i}.attn1.{name}"
            tensors[f"{key}.lora_A.weight"] = a.clone() if shared else torch.randn(4, 192)
            tensors[f"{key}.lora_B.weight"] = torch.randn(192, 4)
    return tensors


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize("shared", [True, False])
def test_split_projections_fuse_exactly(tmp_path, prefix, shared):
    tensors = split_tensors(prefix=prefix, shared=shared)
    adapter = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert adapter.layers.keys() == {"blocks.0.attn.qkv_x", "blocks.1.attn.qkv_x"}
    assert adapter.metadata["rank"] == "4"
    for i in range(2):
        layer = adapter.layers[f"blocks.{i}.attn.qkv_x"]
        assert layer.rank == (4 if shared else 12)
        keys = [f"{prefix}transformer_blocks.{i}.attn1.{name}" for name in ("to_q", "to_k", "to_v")]
        expected = [tensors[f"{k}.lora_B.weight"].double() @ tensors[f"{k}.lora_A.weight"].double() for k in keys]
        assert torch.allclose(delta64(layer), torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_a_choice_of_projections_leaves_the_others_at_zero(tmp_path, shared):
    tensors = split_tensors(("to_q", "to_v"), shared=shared)
    layer = load_adapter(write(tmp_path / "a.safetensors", tensors)).layers["blocks.1.attn.qkv_x"]
    key = "transformer.transformer_blocks.1.attn1"
    q, v = (tensors[f"{key}.{n}.lora_B.weight"] @ tensors[f"{key}.{n}.lora_A.weight"] for n in ("to_q", "to_v"))
    assert torch.allclose(delta_weight(layer), torch.cat([q, torch.zeros(192, 192), v]), rtol=0, atol=1e-5)
    assert layer.rank == (4 if shared else 8)


def test_a_dora_of_some_projections_is_refused(tmp_path):
    tensors = split_tensors(("to_q", "to_v"))
    names = [key.removesuffix("A.weight") for key in tensors if key.endswith("A.weight")]
    tensors |= {f"{name}magnitude_vector": torch.ones(192) for name in names}
    with pytest.raises(CheckpointError, match=r"attn\.qkv_x: a DoRA of only some of q, k and v .*: adapt all three\."):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


def test_a_projection_missing_in_one_block_is_refused(tmp_path):
    tensors = split_tensors()
    del tensors["transformer.transformer_blocks.1.attn1.to_k.lora_A.weight"]
    del tensors["transformer.transformer_blocks.1.attn1.to_k.lora_B.weight"]
    with pytest.raises(CheckpointError, match=r"missing: transformer_blocks\.1\.attn1\.to_k"):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diffusers_loads_an_export_of_16_bits(tmp_path, dtype):
    """The base has the same dtype; the weights are the same bits, and there is no warning."""
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(ALL, MIXED), "diffusers", dtype)
    model = diffusers_model(base_weights()).to(dtype)
    with nothing_may_be_warned():
        model.load_lora_adapter(str(path), use_safetensors=True)
    loaded = model.state_dict()
    for key, tensor in load_file(path).items():
        name = key.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert tensor.dtype == dtype and torch.equal(loaded[name], tensor)


def test_an_official_export_of_some_blocks_of_mochi_1_has_all_blocks(tmp_path):
    """Without metadata, the last block with a layer need not be the last block of the model."""
    shapes = {"attn.qkv_x": (9216, 3072), "attn.proj_x": (3072, 3072)}
    layers = {
        f"blocks.{block}.{kind}": LoraLayer(torch.ones(1, num_in), torch.ones(num_out, 1), 1.0)
        for block in range(2)
        for kind, (num_out, num_in) in shapes.items()
    }
    save_adapter(tmp_path / "official.safetensors", Adapter(layers, {}), "official")
    names = load_file(tmp_path / "official.safetensors").keys()
    assert {int(name.split(".")[1]) for name in names} == set(range(48))
