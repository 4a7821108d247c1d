"""Adapters in the layouts of other programs: they give the same change of the weights, or are refused in one line."""

import json
import os

import pytest
import torch
from helpers_adapters import CONFIG, GOLDEN, MIXED, assert_same_change, base_weights, build_dit, delta64, write
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, check_adapter, load_adapter, save_adapter
from mochi_tune.adapters.layers import OUTER_MODULES, check_start, kind_of, split_layers
from mochi_tune.adapters.lora import all_linear_shapes, apply_adapter, switch_adapters
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.weights.key_map import diffusers_map

A, B = "lora_A.weight", "lora_B.weight"


def every_layer(sizes=MIXED, seed=0) -> Adapter:
    """An adapter of every Linear of the golden model, including those outside the blocks."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for i, (name, (num_out, num_in)) in enumerate(all_linear_shapes(build_dit(base_weights())).items()):
        rank, alpha = sizes[i % len(sizes)]
        a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
        layers[name] = LoraLayer(a, torch.randn(num_out, rank, generator=generator) / rank**0.5, alpha)
    return Adapter(layers, {"num_blocks": "2"})


def official_tensors(adapter, key) -> dict[str, torch.Tensor]:
    """The tensors of an adapter; `key` makes a key from the name of a layer and a part: A, B or alpha."""
    tensors = {}
    for name, layer in adapter.layers.items():
        tensors |= {key(name, A): layer.a, key(name, B): layer.b, key(name, "alpha"): torch.tensor(float(layer.alpha))}
    return tensors


def test_the_tables_are_those_of_the_weights():
    dit = build_dit(base_weights())
    mapping = diffusers_map(dit)
    for name in all_linear_shapes(dit):
        adapter = Adapter({name: every_layer().layers[name]}, {"num_blocks": "2"})
        pieces = mapping[f"{name}.weight"]
        modules = split_layers(adapter.layers, 2)
        assert [f"{module}.weight" for module in modules] == list(pieces.names)
        # Splitting the change of a weight gives the changes of its pieces.
        for piece, module in zip(pieces.split(delta64(adapter.layers[name])).values(), modules.values(), strict=True):
            assert (delta64(module) - piece).abs().max() <= 1e-6 * piece.abs().max()


def kohya(name, part):
    return f"lora_unet_{name.replace('.', '_')}.{part.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}"


OFFICIAL_KEYS = {
    "comfyui": lambda name, part: f"diffusion_model.{name}.{part}",
    "bare": lambda name, part: f"{name}.{part}",
    "peft": lambda name, part: f"base_model.model.{name}.{part}",
    "kohya": kohya,
    "down_up": lambda name, part: f"{name}.{part.replace('lora_A', 'lora_down').replace('lora_B', 'lora_up')}",
}
DIFFUSERS_KEYS = {
    "diffusers": lambda name, part: f"transformer.{name}.{part}",
    "bare": lambda name, part: f"{name}.{part}",
    "peft": lambda name, part: f"base_model.model.{name}.{part}",
    "default": lambda name, part: f"{name}.{part.replace('.weight', '.default.weight')}",
    "kohya": kohya,
    "dotted": lambda name, part: f"{name}.{part.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}",
}


@pytest.mark.parametrize("layout", OFFICIAL_KEYS)
def test_official_names(tmp_path, layout):
    adapter = every_layer()
    tensors = official_tensors(adapter, OFFICIAL_KEYS[layout])
    assert_same_change(load_adapter(write(tmp_path / "a.safetensors", tensors)), adapter)


@pytest.mark.parametrize("layout", DIFFUSERS_KEYS)
def test_diffusers_names(tmp_path, layout):
    adapter = every_layer()
    save_adapter(tmp_path / "b.safetensors", adapter, "diffusers")
    tensors = {}
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        name, half, _ = key.removeprefix("transformer.").rsplit(".", 2)
        # Twice the alpha and half of B give the same change.
        scale = 0.5 if half == "lora_B" else 1.0
        tensors[DIFFUSERS_KEYS[layout](name, f"{half}.weight")] = scale * tensor
        tensors[DIFFUSERS_KEYS[layout](name, "alpha")] = torch.tensor(2.0 * 16)
    loaded = load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert_same_change(loaded, adapter)
    assert loaded.metadata["num_blocks"] == "2"


@pytest.mark.parametrize("to", ["native", "comfyui", "diffusers"])
def test_layers_outside_of_the_blocks_are_written_and_read(tmp_path, to):
    adapter = every_layer()
    save_adapter(tmp_path / "a.safetensors", adapter, to)
    assert_same_change(load_adapter(tmp_path / "a.safetensors"), adapter)
    with pytest.raises(CheckpointError, match=r"the official format has no such layers, .* t_embedder\.mlp\.0"):
        save_adapter(tmp_path / "b.safetensors", adapter, "official")


def test_a_text_modulation_needs_the_number_of_blocks(tmp_path):
    adapter = every_layer()
    del adapter.metadata["num_blocks"]
    with pytest.raises(CheckpointError, match=r"mod_y.*use to=comfyui"):
        save_adapter(tmp_path / "a.safetensors", adapter, "diffusers")
    names = ["transformer_blocks.0.norm1_context.linear_1", "transformer_blocks.1.norm1_context.linear_1"]
    tensors = {f"{name}.{half}": torch.ones(2, 2) for name in names for half in (A, B)}
    with pytest.raises(CheckpointError, match="linear_1 is only in the last block, and others have it"):
        load_adapter(write(tmp_path / "a.safetensors", tensors))
    both = [names[0], names[0].removesuffix("_1")]
    tensors = {f"{name}.{half}": torch.ones(2, 2) for name in both for half in (A, B)}
    with pytest.raises(CheckpointError, match=r"blocks\.0\.mod_y is in it twice"):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("scales", [None, "scale_weight", "weight_scale", "rows"])
def test_fp8(tmp_path, dtype, scales):
    tensors, expected = {}, every_layer(((4, 4.0),))
    if scales:
        tensors["scaled_fp8"] = torch.empty(0).to(dtype)
    for name, layer in expected.layers.items():
        for key, part in ((A, "a"), (B, "b")):
            value = getattr(layer, part)
            shape = (len(value), 1) if scales == "rows" else ()
            scale = (value.abs().amax(1, keepdim=True) if shape else value.abs().max()) / 200 if scales else 1.0
            rounded = (value / scale).to(dtype)
            tensors[f"diffusion_model.{name}.{key}"] = rounded
            setattr(layer, part, rounded.float() * scale)
            if scales:
                suffix = "weight_scale" if scales == "rows" else scales
                tensors[f"diffusion_model.{name}.{key.replace('weight', suffix)}"] = scale
    assert_same_change(load_adapter(write(tmp_path / "a.safetensors", tensors)), expected)
    if scales:
        key = next(key for key in tensors if "scale" in key and key != "scaled_fp8")
        rest = {name: tensor for name, tensor in tensors.items() if name != key}
        # With the marker of one of the two forms, and without it.
        for each in (rest, {name: tensor for name, tensor in rest.items() if name != "scaled_fp8"}):
            with pytest.raises(CheckpointError, match="is fp8 without a scale in a file with scales"):
                load_adapter(write(tmp_path / "a.safetensors", each))
        with pytest.raises(CheckpointError, match="3 scales, not 1 or one per row"):
            load_adapter(write(tmp_path / "a.safetensors", tensors | {key: torch.ones(3)}))
        wide = {name: tensor.float() if tensor.dtype == dtype else tensor for name, tensor in tensors.items()}
        with pytest.raises(CheckpointError, match="has a scale but is not fp8"):
            load_adapter(write(tmp_path / "a.safetensors", wide))


GOOD = {f"blocks.0.attn.proj_x.{half}": torch.ones(shape) for half, shape in ((A, (2, 192)), (B, (192, 2)))}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["blocks.0.attn.proj_x.lokr_w1", "blocks.0.attn.proj_x.lokr_w2"], "a LoKr"),
        (["lora_unet_blocks_0_attn_proj_x.hada_w1_a", "lora_unet_blocks_0_attn_proj_x.hada_w1_b"], "a LoHa"),
        (["blocks.0.attn.proj_x.oft_blocks"], "an OFT"),
        (["base_model.model.transformer_blocks.0.attn1.to_q.boft_R"], "an OFT"),
        (["blocks.0.attn.proj_x.a1.weight", "blocks.0.attn.proj_x.b2.weight"], "a GLoRA"),
        (["base_model.model.transformer_blocks.0.attn1.to_q.ia3_l"], "an IA3"),
        (["base_model.vera_A", "base_model.model.transformer_blocks.0.attn1.to_q.vera_lambda_b"], "a VeRA"),
        (["blocks.0.attn.proj_x.diff"], "a difference of whole weights"),
        (["blocks.0.attn.proj_x.diff_b"], "a difference of whole weights"),
        (["blocks.0.attn.proj_x.lora_mid.weight"], "a LoCon with a middle factor"),
        (["transformer_blocks.0.attn1.to_q.lora_B.bias"], "a LoRA with trained biases"),
        (["blocks.0.attn.proj_x.dora_scale"], "a DoRA by rows of the base"),
        (["text_encoder.encoder.block.0.q.lora_A.weight"], "a LoRA of a text encoder"),
        (["lora_te_text_model_q.lora_down.weight"], "a LoRA of a text encoder"),
        (["transformer.patch_embed.proj.lora_A.weight"], "of the convolution x_embedder.proj"),
        (["lora_unet_x_embedder_proj.lora_down.weight"], "of the convolution x_embedder.proj"),
        (["blocks.0.attn.proj_x.weight"], "a model or a part of one"),
        (["lora_unet_blocks_0_attn_proj_z.lora_down.weight"], "1 of its keys fit no layer of Mochi"),
        (["lora_unet_blocks_00_attn_proj_x.lora_down.weight"], "1 of its keys fit no layer of Mochi"),
        (["lora_unet_double_blocks_0_img_attn_proj.lora_down.weight"], "1 of its keys fit no layer of Mochi"),
        (["blocks.1.t5_yproj.lora_A.weight"], "1 of its keys fit no layer of Mochi"),
        (["attn.proj_x.lora_A.weight"], "1 of its keys fit no layer of Mochi"),
        (["t5_yproj.lora_A.other.weight", "t5_yproj.lora_B.other.weight"], "adapters, one without a name, other"),
        (["blocks.0.attn.proj_x.lora_A.other", "blocks.0.attn.proj_x.lora_B.other"], "it holds several adapters"),
    ],
)
def test_other_kinds_and_unknown_modules_are_refused_by_name(tmp_path, keys, message):
    shapes = {"lora_A": (2, 256), "lora_B": (96, 2)}
    foreign = {key: torch.ones(next((s for half, s in shapes.items() if half in key), (2, 2))) for key in keys}
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(write(tmp_path / "a.safetensors", GOOD | foreign))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.diffusion_model.", "base_model.model._orig_mod.", "unet.", "dit.", "transformer."],
)
def test_wrappers_of_models_kernels_of_size_1_and_counters_change_nothing(tmp_path, prefix):
    tensors = {f"{prefix}{key.removesuffix('.weight')}.default": tensor for key, tensor in GOOD.items()}
    tensors = {key: tensor[:, :, None, None] for key, tensor in tensors.items()} | {"global_step": torch.tensor(7)}
    layers = load_adapter(write(tmp_path / "a.safetensors", tensors)).layers
    expected = load_adapter(write(tmp_path / "b.safetensors", GOOD)).layers
    assert list(layers) == ["blocks.0.attn.proj_x"] and layers["blocks.0.attn.proj_x"].shape == (192, 192)
    assert torch.equal(layers["blocks.0.attn.proj_x"].a, expected["blocks.0.attn.proj_x"].a)


# In a live model


def run_golden(dit):
    io = load_file(GOLDEN / "dit_io.safetensors")
    with torch.no_grad():
        return dit(io["z"], io["sigma"], io["y_feat"], io["y_mask"].bool())


def with_row_lengths(adapter) -> Adapter:
    weights, generator = base_weights(), torch.Generator().manual_seed(1)
    for name, layer in adapter.layers.items():
        lengths = weights[f"{name}.weight"].norm(dim=1)
        layer.magnitude = lengths * (0.8 + 0.4 * torch.rand(len(lengths), generator=generator))
    return adapter


@pytest.mark.parametrize("is_dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_a_live_model_computes_with_the_changed_weights(is_dora, strength):
    adapter, dit, weights = every_layer(((3, 0.3),)), build_dit(base_weights()), base_weights()
    if is_dora:
        with_row_lengths(adapter)
    base = run_golden(dit)
    apply_adapter(dit, adapter.layers, "all", strength)
    for name, layer in adapter.layers.items():
        weight = weights[f"{name}.weight"].double()
        changed = weight + delta64(layer)
        if is_dora:
            changed *= (layer.magnitude.double() / changed.norm(dim=1))[:, None]
        weights[f"{name}.weight"] = (weight + strength * (changed - weight)).float()
    expected = run_golden(build_dit(weights))
    assert (run_golden(dit) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 1e-2 * expected.abs().max()
    switch_adapters(dit, False)
    assert torch.equal(run_golden(dit), base)


def test_bf16_stays_bf16():
    dit = build_dit(base_weights()).to(torch.bfloat16)
    apply_adapter(dit, with_row_lengths(every_layer()).layers, "all")
    assert dit.dtype == dit.t_embedder.dtype == run_golden(dit).dtype == torch.bfloat16


def test_a_training_does_not_start_from_layers_that_it_does_not_adapt(tmp_path):
    layers = {name: layer for name, layer in every_layer().layers.items() if name in OUTER_MODULES}
    with pytest.raises(
        ConfigError, match=r"has t_embedder\.mlp\.0.* and training adapts attention and MLP layers only"
    ):
        check_start(layers, {}, False, "adapter a.safetensors")
    assert {kind_of(name) for name in layers} == set(OUTER_MODULES)


# The layout of public LoRAs


PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


POOLER = "transformer.time_embed.pooler.to_q"


def public_shapes(num_blocks, width, text_width):
    """The keys and shapes of peft's targets to_q, to_k, to_v and to_out.0; to_q is also a layer of the pooler."""
    shapes = {f"{POOLER}.{A}": (16, text_width), f"{POOLER}.{B}": (text_width, 16)}
    for i in range(num_blocks):
        for projection in PROJECTIONS:
            name = f"transformer.transformer_blocks.{i}.attn1.{projection}"
            shapes |= {f"{name}.{A}": (16, width), f"{name}.{B}": (width, 16)}
    return shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_convention_of_the_public_files(tmp_path, dtype):
    torch.manual_seed(0)
    shapes = public_shapes(2, 192, CONFIG["t5_feat_dim"])
    tensors = {key: (torch.randn(*shape) / 8).to(dtype) for key, shape in shapes.items()}
    write(tmp_path / "pytorch_lora_weights.safetensors", tensors, {"format": "pt"})
    adapter = load_adapter(tmp_path)
    in_blocks = {f"blocks.{i}.attn.{kind}" for i in range(2) for kind in ("qkv_x", "proj_x")}
    assert adapter.layers.keys() == in_blocks | {"t5_y_embedder.to_q"}
    assert adapter.metadata["rank"] == "16" and adapter.metadata["alpha"] == "16"
    changes = {"t5_y_embedder.to_q": [POOLER]}
    for i in range(2):
        *qkv, out = (f"transformer.transformer_blocks.{i}.attn1.{projection}" for projection in PROJECTIONS)
        changes |= {f"blocks.{i}.attn.qkv_x": qkv, f"blocks.{i}.attn.proj_x": [out]}
    for name, modules in changes.items():
        rows = [tensors[f"{module}.{B}"].double() @ tensors[f"{module}.{A}"].double() for module in modules]
        change, expected = delta64(adapter.layers[name]), torch.cat(rows)
        assert (change - expected).abs().max() <= 1e-6 * expected.abs().max()
    check_adapter(adapter, all_linear_shapes(build_dit(base_weights())), None)


def test_the_full_size_header_of_the_public_files(tmp_path):
    """In fp32 they have 76.1 MB; without the pooler, which these targets match too, they would have 75.6."""
    shapes = public_shapes(48, 3072, 4096)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for key, (rows, columns) in shapes.items():
        begin, end = end, end + 4 * rows * columns
        header[key] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(shapes) == 386 and round((8 + len(text) + end) / 1e6, 1) == 76.1
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    # The file is sparse: its weights take no disk space.
    os.truncate(path, 8 + len(text) + end)
    with pytest.raises(CheckpointError, match="nothing but zeros"):
        load_adapter(path)
