"""Adapters of a rendering, by name and in every residency: `sample` computes with the adapted weights."""

import json
import os
import sys

import pytest
import torch
from helpers_adapters import delta_weight
from helpers_road import road
from helpers_video import keeping_frames
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.alphas import ASSUMED
from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import all_linear_shapes, switch_adapters
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.files import file_sha256
from mochi_tune.recipes import sample as recipe
from mochi_tune.recipes.verify import TOLERANCE
from mochi_tune.sampling.adapters import RenderAdapter
from mochi_tune.sampling.render import Setup, prepare_dit
from mochi_tune.sampling.sampler import SamplerSettings, draw_noise, sample_latents
from mochi_tune.weights.folder import WeightsFolder

TINY = WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"])))
SCHEDULE, STEPS = SamplerSettings(2, 2.0, 0.025), ["sample.steps=2", "sample.guidance=2", "sample.prompt=a red ball"]


def every_layer(seed=0, scale=1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: LoraLayer(
            torch.randn(2, i, generator=generator) / i**0.5, scale * torch.randn(o, 2, generator=generator) / 8, 4.0
        )
        for name, (o, i) in all_linear_shapes(TINY.dit_skeleton()).items()
    }
    return Adapter(layers, {"num_blocks": "2", "base_fingerprint": TINY.base_identity()})


def features():
    generator = torch.Generator().manual_seed(3)
    width = TINY.dit_skeleton().config.t5_feat_dim
    return torch.randn(5, width, generator=generator), torch.zeros(0, width)


def render(dit) -> torch.Tensor:
    *_, latents = sample_latents(dit.eval(), draw_noise(0, 7, 32, 48), *features(), SCHEDULE)
    return latents


def changed(adapter, strength) -> torch.nn.Module:
    """Returns the model with the weights W + strength * dW."""
    dit = TINY.load_dit("cpu", torch.float32)
    for name, layer in adapter.layers.items():
        dit.get_submodule(name).weight.data += strength * delta_weight(layer)
    return dit


def bound(latents) -> float:
    # Two forward passes differ by TOLERANCE, and a guidance of 2 triples the difference.
    return 3 * TOLERANCE["fp32"] * latents.abs().max()


@pytest.mark.parametrize("residency", ["resident", "offload"])
def test_every_layer_is_adapted_wherever_its_weights_are(residency):
    adapter, other = every_layer(), every_layer(seed=1)
    setup = Setup(torch.device("cpu"), torch.float32, residency)
    dit = prepare_dit(TINY.load_dit, {"one": (adapter.layers, 0.6, {})}, setup)
    expected = render(changed(adapter, 0.6))
    assert (render(dit) - expected).abs().max() <= bound(expected)
    base = render(TINY.load_dit("cpu", torch.float32))
    assert not torch.allclose(base, expected, atol=1e-2)
    switch_adapters(dit, False)
    assert (render(dit) - base).abs().max() <= bound(base)
    two = prepare_dit(TINY.load_dit, {"one": (adapter.layers, 0.6, {}), "two": (other.layers, 1.0, {})}, setup)
    both = changed(adapter, 0.6)
    for name, layer in other.layers.items():
        both.get_submodule(name).weight.data += delta_weight(layer)
    expected = render(both)
    assert (render(two) - expected).abs().max() <= bound(expected)


@pytest.mark.parametrize("residency", ["int8", "fp8"])
def test_a_base_in_8_bits_leaves_the_adapters_as_they_are(residency):
    adapter = every_layer()
    dit = prepare_dit(
        TINY.load_dit, {"one": (adapter.layers, 1.0, {})}, Setup(torch.device("cpu"), torch.float32, residency)
    )
    for name, layer in adapter.layers.items():
        module = dit.get_submodule(name)
        assert type(module.lora_A["one"].weight.data) is torch.Tensor
        assert torch.equal(module.lora_A["one"].weight, layer.a) and torch.equal(module.lora_B["one"].weight, layer.b)
    # Quantizing this base to 8 bits changes it by about 2 %.
    expected = render(changed(adapter, 1.0))
    assert (render(dit) - expected).norm() <= 0.1 * expected.norm()


def sample(tmp_path, *more):
    settings = road(tmp_path, *STEPS, "sample.save_latents=true", f"sample.prompt_cache={tmp_path / 'cache'}", *more)
    with keeping_frames(recipe, tmp_path / "frames"):
        [video] = recipe.main(load_config("my_lora", settings))
    record = json.loads(video.with_suffix(".json").read_text())
    return load_file(video.with_suffix(".safetensors"))["latents"], record["adapters"]


def peft_folder(folder, alpha):
    """Writes a folder as peft saves it, with the pooler and the projection of a block."""
    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    shapes = all_linear_shapes(TINY.dit_skeleton())
    names = {
        "t5_y_embedder.to_q": "time_embed.pooler.to_q",
        "blocks.0.attn.proj_x": "transformer_blocks.0.attn1.to_out.0",
    }
    for name, module in names.items():
        num_out, num_in = shapes[name]
        key = f"base_model.model.{module}.lora"
        tensors[f"{key}_A.weight"] = torch.randn(2, num_in, generator=generator) / num_in**0.5
        tensors[f"{key}_B.weight"] = torch.randn(num_out, 2, generator=generator) / 4
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if alpha:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": alpha}))
    return folder


def test_an_adapter_can_be_a_folder_and_an_assumed_alpha_is_reported(tmp_path, capsys):
    stated, bare = peft_folder(tmp_path / "stated", 8), peft_folder(tmp_path / "bare", None)
    right, [record] = sample(tmp_path, f"sample.adapter={stated}")
    assert record["file"] == str(stated / "adapter_model.safetensors")
    assert (record["alpha"], record["alpha_source"]) == ("8", "adapter_config.json next to it")
    assert "x 1.0, alpha 8 (stated in adapter_config.json next to it)" in capsys.readouterr().err
    weak, [record] = sample(tmp_path, f"sample.adapter={bare}")
    assert (record["alpha"], record["alpha_source"]) == ("2", ASSUMED)
    assert f"alpha is {ASSUMED}: adapter_alpha=N of `sample`" in capsys.readouterr().err
    given, [record] = sample(tmp_path, f"sample.adapter={bare}", "sample.adapter_alpha=8")
    assert (record["alpha"], record["alpha_source"]) == ("8", "adapter_alpha=8")
    assert torch.equal(given, right)
    stronger, _ = sample(tmp_path, f"sample.adapter={bare}", "sample.adapter_strength=4")
    assert (stronger - right).abs().max() <= bound(right)
    assert not torch.allclose(weak, right, atol=1e-3)


def test_given_alphas_are_one_or_one_each(tmp_path):
    bare = peft_folder(tmp_path / "bare", None)
    with pytest.raises(ConfigError, match="adapter_alpha has 3 values for 2 adapters"):
        sample(tmp_path, f"sample.adapter=[{bare},{bare}]", "sample.adapter_alpha=[1,2,3]")
    with pytest.raises(ConfigError, match=r"adapter_alpha=8\.0 has no adapter"):
        sample(tmp_path, "sample.adapter_alpha=8")
    _, records = sample(tmp_path, f"sample.adapter=[{bare},{bare}]", "sample.adapter_alpha=[4,8]")
    assert [record["alpha"] for record in records] == ["4", "8"]
    save_adapter(tmp_path / "a.safetensors", every_layer())
    with pytest.raises(CheckpointError, match="and adapter_alpha=8 differ"):
        sample(tmp_path, f"sample.adapter={tmp_path / 'a.safetensors'}", "sample.adapter_alpha=8")


def test_sample_computes_with_the_changed_weights(tmp_path):
    adapter = every_layer(scale=0.5)
    save_adapter(tmp_path / "a.safetensors", adapter, "diffusers")
    latents, _ = sample(tmp_path, f"sample.adapter={tmp_path / 'a.safetensors'}", "sample.adapter_strength=0.5")
    prompts = TINY.load_text_encoder("cpu", torch.float32).encode(["a red ball", ""])
    *_, expected = sample_latents(changed(adapter, 0.5).eval(), draw_noise(0, 7, 32, 48), *prompts, SCHEDULE)
    assert (latents - expected).abs().max() <= bound(expected)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("blocks.0.attn.qkv_x", True),
        ("t5_yproj", True),
        ("final_layer.linear", True),
        ("blocks.0.mod_x", False),
        # Part of an adapter that diffusers trains on every `to_q`.
        ("t5_y_embedder.to_q", False),
        ("t_embedder.mlp.0", False),
    ],
)
def test_a_schedule_is_refused_for_layers_that_are_computed_before_the_steps(tmp_path, name, fits):
    whole = every_layer()
    adapter = Adapter({name: whole.layers[name]}, whole.metadata)
    save_adapter(tmp_path / "one.safetensors", adapter)
    settings = (f"sample.adapter={tmp_path / 'one.safetensors'}", "sample.strength_schedule=[0,0]")
    if not fits:
        with pytest.raises(ConfigError, match=rf"adapts modulation \({name}\)\. Modulation is computed once"):
            sample(tmp_path, *settings)
        return
    faded, _ = sample(tmp_path, *settings)
    assert torch.equal(faded, sample(tmp_path, "sample.adapter=[]")[0])


def test_an_adapter_that_is_replaced_while_it_is_read_is_the_file_of_its_record(tmp_path):
    """`train` publishes by renaming; here it does so at the second time that the program opens the file."""
    path, newer = tmp_path / "adapter.safetensors", tmp_path / "newer.safetensors"
    save_adapter(path, every_layer(seed=1))
    save_adapter(newer, every_layer(seed=2))
    sums, opened = (file_sha256(path), file_sha256(newer)), []

    def replace(event: str, arguments: tuple) -> None:
        if event == "open" and newer.exists() and str(arguments[0]).startswith((str(path), "/proc/self/fd/")):
            opened.append(arguments[0])
            if len(opened) == 2:
                os.replace(newer, path)

    sys.addaudithook(replace)
    loaded = load_adapter(path)
    assert file_sha256(path) == sums[1], "it was replaced"
    assert loaded.path is not None
    assert RenderAdapter(loaded.path, 1.0, loaded).record()["sha256"] == sums[0]
    again = load_adapter(path)
    assert again.sha256 == sums[1]
    assert not torch.equal(again.layers["blocks.0.attn.proj_x"].a, loaded.layers["blocks.0.attn.proj_x"].a)
