"""Training that starts from an adapter file: the first output is that of the file."""

import pytest
import torch
from helpers_adapters import ALL, ATTENTION, MIXED, random_adapter, settings_of, with_magnitudes
from helpers_golden import GOLDEN, TOLERANCE, golden_dit, relative_error, vectors

from mochi_tune.adapters.files import load_adapter, save_adapter
from mochi_tune.adapters.layers import check_start
from mochi_tune.adapters.lora import (
    apply_adapter,
    apply_lora,
    linear_shapes,
    load_start_adapter,
    lora_parameters,
)
from mochi_tune.errors import ConfigError

IO = vectors("dit_io")
INPUTS = (IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])


def of_kinds(kinds):
    return [name for name in linear_shapes(golden_dit()) if name.endswith(tuple(kinds))]


@pytest.mark.parametrize("dora", [False, True], ids=["as_lora", "as_dora"])
@pytest.mark.parametrize(
    "options", [{"alpha": 64.0}, {"alpha": 5.0}, {"alpha": 5.0, "rslora": True, "alpha_pattern": {".*proj_x": 1.0}}]
)
@pytest.mark.parametrize("to", ["native", "official", "diffusers", "comfyui"])
def test_the_start_is_the_files_change_whatever_its_format_and_alpha(tmp_path, to, options, dora):
    save_adapter(tmp_path / "a.safetensors", random_adapter(ATTENTION, MIXED), to)
    adapter, dit, sampled = load_adapter(tmp_path / "a.safetensors"), golden_dit(), golden_dit()
    settings = settings_of(of_kinds(ATTENTION), rank=16, dropout=0.0, **options)
    check_start(adapter.layers, settings, dora, str(adapter))
    apply_lora(dit, settings, seed=4, dora=dora)
    fresh = {name: parameter.detach().clone() for name, parameter in lora_parameters(dit).items()}
    load_start_adapter(dit, adapter.layers)
    apply_adapter(sampled, adapter.layers, "adapter")
    with torch.no_grad():
        expected = sampled(*INPUTS)
        assert relative_error(dit(*INPUTS), expected) <= TOLERANCE
        assert relative_error(golden_dit()(*INPUTS), expected) > 1e-2
    for name, layer in adapter.layers.items():
        a, b = (lora_parameters(dit)[f"{name}.lora_{half}"].detach() for half in "AB")
        assert torch.equal(a[: layer.rank], layer.a)
        assert torch.equal(a[layer.rank :], fresh[f"{name}.lora_A"][layer.rank :])
        assert not b[:, layer.rank :].any()
        if layer.alpha / layer.rank == settings[name].plain_alpha / 16:
            assert torch.equal(b[:, : layer.rank], layer.b)
    dit(*INPUTS).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in lora_parameters(dit).values())


@pytest.mark.parametrize("to", ["native", "diffusers"])
@torch.no_grad()
def test_a_dora_continues_as_a_dora(tmp_path, to):
    save_adapter(tmp_path / "a.safetensors", with_magnitudes(random_adapter(ALL, MIXED)), to)
    adapter, dit, sampled = load_adapter(tmp_path / "a.safetensors"), golden_dit(), golden_dit()
    settings = settings_of(of_kinds(ALL), rank=16, alpha=3.0, dropout=0.0)
    check_start(adapter.layers, settings, True, str(adapter))
    apply_lora(dit, settings, seed=4, dora=True)
    load_start_adapter(dit, adapter.layers)
    apply_adapter(sampled, adapter.layers, "adapter")
    assert relative_error(dit(*INPUTS), sampled(*INPUTS)) <= TOLERANCE
    for name, layer in adapter.layers.items():
        assert torch.equal(lora_parameters(dit)[f"{name}.lora_magnitude"], layer.magnitude)


@pytest.mark.parametrize(
    ("kinds", "rank", "options", "text"),
    [
        (ATTENTION[:2], 4, {}, "has blocks.0.attn.proj_x, blocks.0.attn.proj_y, blocks.1.attn.proj_x, which"),
        (ALL, 4, {}, "has no blocks.0.mlp_x.w1, blocks.0.mlp_x.w2, blocks.0.mlp_y.w1, blocks.0.mlp_y.w2 and 2"),
        (ATTENTION, 3, {}, "has rank 4 in blocks.0.attn.qkv_x, which would be trained at rank 3: use lora.rank=4"),
        (ATTENTION, 4, {"rank_pattern": {".*1.*proj_x": 1}}, "has rank 2 in blocks.1.attn.proj_x"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(kinds, rank, options, text):
    adapter = load_adapter(GOLDEN / "lora.safetensors")
    settings = settings_of(of_kinds(kinds), rank, 1.0, 0.0, **options)
    with pytest.raises(ConfigError) as error:
        check_start(adapter.layers, settings, False, str(adapter))
    assert str(error.value).startswith(f"lora.init_from: adapter {GOLDEN / 'lora.safetensors'} {text}")
    assert "\n" not in str(error.value)


def test_a_dora_does_not_continue_as_a_plain_lora():
    layers = with_magnitudes(random_adapter()).layers
    with pytest.raises(ConfigError, match=r"is a DoRA: use lora\.dora=true\."):
        check_start(layers, settings_of(of_kinds(ATTENTION), 16, 1.0, 0.0), False, "the adapter")
