"""Where the alpha of an adapter is found, and contradictions that are refused."""

import json

import pytest
import torch
from helpers_adapters import ATTENTION, MIXED, delta64, random_adapter, write
from safetensors.torch import load_file

from mochi_tune.adapters.alphas import ASSUMED
from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.errors import CheckpointError

NAME = "transformer_blocks.0.attn1.to_out.0"
RANK = 4
PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32}


def halves(name=NAME, prefix="", down="lora_A", up="lora_B", rank=RANK):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, 192, generator=generator), torch.randn(192, rank, generator=generator)
    return {f"{prefix}{name}.{down}.weight": a, f"{prefix}{name}.{up}.weight": b}


def alpha_of(path, **more):
    """Returns the alpha of the only layer and its source; checks the scale of the change."""
    adapter = load_adapter(path, **more)
    [layer] = adapter.layers.values()
    a, b = halves().values()
    expected = layer.alpha / RANK * (b.double() @ a.double())
    assert (delta64(layer) - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert f"alpha {layer.alpha:g} " in adapter.alpha_note or adapter.alpha_source == ASSUMED
    assert adapter.metadata["alpha"] == f"{layer.alpha:g}" and adapter.metadata["rank"] == str(RANK)
    return layer.alpha, adapter.alpha_source


@pytest.mark.parametrize(
    ("metadata", "alpha", "source"),
    [
        ({"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": RANK})}, 8,
         "its metadata `lora_adapter_metadata`"),
        ({"ss_network_alpha": "8.0", "ss_network_dim": "4"}, 8, "its metadata `ss_network_alpha`"),
        ({"ss_network_alpha": "8"}, 8, "its metadata `ss_network_alpha`"),
        ({"ss_network_alpha": "11.313708498984761"}, 11.313708498984761, "its metadata `ss_network_alpha`"),
        ({"lora_alpha": "12"}, 12, "its metadata `lora_alpha`"),
        ({"network_alpha": "12", "network_dim": "4"}, 12, "its metadata `network_alpha`"),
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, RANK, ASSUMED),
        ({"ss_network_alpha": "None", "ss_network_dim": "None"}, RANK, ASSUMED),
        # Another tool's description of its training does not state an alpha.
        ({"alpha": "32", "rank": "8", "format": "pt"}, RANK, ASSUMED),
    ],
)  # fmt: skip
def test_metadata(tmp_path, metadata, alpha, source):
    path = write(tmp_path / "a.safetensors", halves(), metadata)
    assert alpha_of(path) == (alpha, source)
    # A conversion states no other alpha.
    for to in ("diffusers", "comfyui", "native"):
        save_adapter(tmp_path / "b.safetensors", load_adapter(path), to)
        [layer] = load_adapter(tmp_path / "b.safetensors").layers.values()
        assert layer.scale == pytest.approx(alpha / RANK if to == "native" else 1.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_tensors_in_any_dtype(tmp_path, dtype):
    tensors = halves("transformer_blocks_0_attn1_to_out_0", "lora_unet_", "lora_down", "lora_up")
    tensors["lora_unet_transformer_blocks_0_attn1_to_out_0.alpha"] = torch.tensor(6).to(dtype)
    assert alpha_of(write(tmp_path / "a.safetensors", tensors)) == (6, "its .alpha tensors")


def test_a_rounded_alpha_agrees_with_the_exact_one(tmp_path):
    alpha = 8 * 2**0.5
    tensors = halves() | {f"{NAME}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)}
    found, source = alpha_of(write(tmp_path / "a.safetensors", tensors, {"lora_alpha": f"{alpha:.9f}"}))
    assert found == pytest.approx(alpha, rel=1e-9) and source == "its .alpha tensors and its metadata `lora_alpha`"


@pytest.mark.parametrize(
    ("file", "config", "alpha"),
    [
        ("adapter_config.json", PEFT, 32),
        ("adapter_config.json", PEFT | {"use_rslora": True}, 64),
        ("adapter_config.json", PEFT | {"alpha_pattern": {"attn1.to_out.0": 6}, "use_dora": False}, 6),
        (
            "adapter_config.json",
            PEFT
            | {
                "alpha_pattern": {
                    r"blocks\.\d+\.attn1\.(to_q|to_k)": 5,
                    r"transformer_blocks\.\d+\.(?:attn1|ff)\.(to_q|to_out\.0)": 6,
                }
            },
            6,
        ),
        (
            "adapter_config.json",
            PEFT | {"r": 64, "rank_pattern": {r"transformer_blocks\.0\.attn1\.to_out\.0": RANK}},
            32,
        ),
        ("lora_config.json", {"step": 9, "lora_params": {"lora_rank": RANK, "lora_alpha": 8, "target_modules": []}}, 8),
    ],
)
def test_a_config_next_to_the_file_states_alpha(tmp_path, file, config, alpha):
    (tmp_path / file).write_text(json.dumps(config))
    path = write(tmp_path / "any_name.safetensors", halves(prefix="base_model.model."))
    assert alpha_of(path) == (alpha, f"{file} next to it")
    assert alpha_of(tmp_path) == (alpha, f"{file} next to it")
    assert alpha_of(path, alpha=float(alpha))[0] == alpha
    # Configs next to an export of mochi-tune are ignored.
    save_adapter(tmp_path / "mine.safetensors", load_adapter(path), "diffusers")
    assert load_adapter(tmp_path / "mine.safetensors").alpha_source.startswith("this program's export")


@pytest.mark.parametrize(
    "pattern", ["(a+)+b", r".*\.(to_q|to_k).*", "(a|a)(a|a)(a|a)(a|a)", "(to_q|to_k)*", "attn[12]"]
)
def test_a_pattern_that_might_never_end_is_not_reported_as_damage(tmp_path, pattern):
    config = PEFT | {"alpha_pattern": {pattern: 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"next to it has the pattern .*write the names of the") as error:
        load_adapter(write(tmp_path / "a.safetensors", halves(prefix="base_model.model.")))
    assert pattern in str(error.value) and "damaged" not in str(error.value)


def test_an_alpha_that_nothing_states_is_assumed(tmp_path):
    path = write(tmp_path / "a.safetensors", halves())
    assert alpha_of(path) == (RANK, ASSUMED)
    assert load_adapter(path).alpha_note.endswith("adapter_alpha=N of `sample` and `export` sets another one")
    assert alpha_of(path, alpha=8.0) == (8, "adapter_alpha=8")


TENSOR = {f"{NAME}.alpha": torch.tensor(8.0)}


@pytest.mark.parametrize(
    ("tensors", "metadata", "config", "message"),
    [
        (TENSOR, {"lora_alpha": "4"}, None, r"\.alpha tensors and .*`lora_alpha` differ, alpha is 8 and 4"),
        (TENSOR, {}, PEFT, r"\.alpha tensors and adapter_config\.json next to it differ, alpha is 8 and 32"),
        ({}, {"ss_network_alpha": "8", "lora_alpha": "4"}, None, "differ, alpha is 8 and 4"),
        ({}, {"lora_alpha": "much"}, None, "`lora_alpha` is not a number but 'much'"),
        ({}, {"ss_network_alpha": "nan"}, None, "no usable alpha .* in its metadata `ss_network_alpha`"),
        ({}, {"ss_network_dim": "16"}, None, "rank 4, and its metadata `ss_network_dim` says 16"),
        ({}, {"lora_adapter_metadata": '{"transformer.r": 8, "transformer.lora_alpha": 8}'}, None, "rank 4.* says 8"),
        ({}, {}, PEFT | {"r": 8}, r"rank 4, and adapter_config\.json next to it says 8"),
        ({}, {}, PEFT | {"use_dora": True}, "says use_dora=True, but the file lacks magnitudes"),
        ({}, {}, PEFT | {"peft_type": "LOHA"}, "says peft_type='LOHA', and only LORA"),
        ({}, {}, PEFT | {"use_qalora": True}, "sets use_qalora"),
        ({}, {}, PEFT | {"init_lora_weights": "pissa_niter_4"}, "=pissa_niter_4, which changes the base"),
        ({}, {}, PEFT | {"lora_alpha": None}, r"no usable alpha .* in adapter_config\.json"),
        ({}, {}, {"lora_params": {"lora_rank": 8, "lora_alpha": 8}}, r"rank 4, and lora_config\.json .* says 8"),
        ({}, {}, {"lora_params": []}, "no `lora_params`"),
        ({"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.ones(RANK, 192),
          "transformer_blocks.0.attn1.to_q.lora_B.weight": torch.ones(192, RANK)} | TENSOR, {}, None,
         r"no usable alpha for transformer_blocks\.0\.attn1\.to_q in its \.alpha tensors"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(tmp_path, tensors, metadata, config, message):
    if config is not None:
        file = "lora_config.json" if "lora_params" in config else "adapter_config.json"
        (tmp_path / file).write_text(json.dumps(config))
    path = write(tmp_path / "a.safetensors", halves() | tensors, metadata)
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_given_alpha_does_not_overrule_one_that_is_known(tmp_path):
    path = write(tmp_path / "a.safetensors", halves() | TENSOR)
    with pytest.raises(CheckpointError, match=r"\.alpha tensors and adapter_alpha=4 differ"):
        load_adapter(path, alpha=4.0)


def test_native_files_have_their_alphas_as_tensors_too(tmp_path):
    adapter, path = random_adapter(ATTENTION, MIXED), tmp_path / "a.safetensors"
    save_adapter(path, adapter)
    tensors = load_file(path)
    for name, layer in adapter.layers.items():
        alpha = tensors[f"{name}.alpha"]
        assert alpha.dtype == torch.float32 and alpha.shape == () and alpha.item() == layer.alpha
        # ComfyUI computes alpha / rank * up @ down.
        a, b = tensors[f"{name}.lora_A"].double(), tensors[f"{name}.lora_B"].double()
        assert torch.allclose(alpha.item() / len(a) * b @ a, delta64(layer), rtol=0, atol=1e-12)
    assert load_adapter(path).alpha_source == "its .alpha tensors and its metadata `alphas`"


def test_native_files_of_earlier_versions_state_alphas_only_in_the_metadata(tmp_path):
    adapter, path = random_adapter(ATTENTION, MIXED), tmp_path / "a.safetensors"
    save_adapter(path, adapter)
    alphas = json.dumps({name: layer.alpha for name, layer in adapter.layers.items()})
    metadata = {"format": "mochi-tune", "alphas": alphas, "num_blocks": "2"}
    kept = {key: tensor for key, tensor in load_file(path).items() if not key.endswith(".alpha")}
    loaded = load_adapter(write(path, kept, metadata))
    assert {n: layer.alpha for n, layer in loaded.layers.items()} == {n: x.alpha for n, x in adapter.layers.items()}
    wrong = load_file(write(path, kept | {"blocks.0.attn.qkv_x.alpha": torch.tensor(1.0)}, metadata))
    with pytest.raises(CheckpointError, match=r"no usable alpha for blocks\.0\..* in its \.alpha tensors"):
        load_adapter(path)
    for name, layer in adapter.layers.items():
        wrong[f"{name}.alpha"] = torch.tensor(2 * layer.alpha)
    with pytest.raises(CheckpointError, match=r"its \.alpha tensors and its metadata `alphas` differ"):
        load_adapter(write(path, wrong, metadata))
