"""DoRA: training of the norms of an adapted weight's rows besides their directions."""

import pytest
import torch
from helpers_adapters import adapted64, settings_of
from helpers_golden import GOLDEN, TOLERANCE, golden_dit, relative_error, vectors

from mochi_tune.adapters.files import Adapter, load_adapter, save_adapter
from mochi_tune.adapters.linears import StretchedLinear
from mochi_tune.adapters.lora import (
    apply_adapter,
    apply_lora,
    linear_shapes,
    lora_parameters,
    switch_adapters,
    trained_layers,
)
from mochi_tune.errors import CheckpointError
from mochi_tune.parallel.memory import apply_block_offload, apply_quantization
from mochi_tune.parallel.recompute import apply_activation_checkpointing
from mochi_tune.weights.folder import WeightsFolder

IO = vectors("dit_io")
INPUTS = (IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
TARGET = torch.randn(IO["out_cond"].shape, generator=torch.Generator().manual_seed(9))


def settings_of_all(dit, **options):
    return settings_of(list(linear_shapes(dit)), 3, 6.0, 0.0, **options)


def disturbed(dit, seed=0, **options):
    """Returns a model with a trained DoRA, and the settings of its layers."""
    settings = settings_of_all(dit, **options)
    apply_lora(dit, settings, seed=1, dora=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(dit).items():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * noise * (parameter if name.endswith("magnitude") else 1)
    return dit, settings


def adapter_of(dit, settings) -> Adapter:
    return Adapter(trained_layers(lora_parameters(dit), settings), {"num_blocks": "2"})


def merged(dit, adapter: Adapter):
    """The definition: each row of W + scale * B A scaled to its magnitude; the gradient ignores its own norm."""
    weights = {}
    for name, layer in adapter.layers.items():
        weight = dit.get_submodule(name).weight.double()
        direction = weight + layer.alpha / layer.rank * layer.b.double() @ layer.a.double()
        weights[name] = (layer.magnitude.double() / direction.norm(dim=1).detach())[:, None] * direction
    return {f"{name}.weight": weight.float() for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_dora_changes_nothing_and_trains_the_length_of_each_row(dtype):
    dit = golden_dit(dtype)
    with torch.no_grad():
        before = dit(*INPUTS)
    apply_lora(dit, settings_of_all(dit), seed=1, dora=True)
    assert torch.equal(dit(*INPUTS), before)
    parameters, shapes = lora_parameters(dit), linear_shapes(golden_dit())
    assert len(parameters) == 3 * len(shapes) and all(p.dtype == torch.float32 for p in parameters.values())
    assert {name for name, p in dit.named_parameters() if p.requires_grad} == {
        name for name, _ in dit.named_parameters() if ".lora_" in name
    }
    for name, (num_out, _) in shapes.items():
        magnitude = parameters[f"{name}.lora_magnitude"]
        assert magnitude.shape == (num_out,)
        assert torch.allclose(magnitude, dit.get_submodule(name).base_layer.weight.float().norm(dim=1), rtol=1e-6)
    (dit(*INPUTS).float() - TARGET).square().mean().backward()
    for name, parameter in parameters.items():
        assert bool(parameter.grad.any()) == (not name.endswith("lora_A")), name


def test_outputs_and_gradients_are_those_of_the_definition():
    dit, settings = disturbed(golden_dit())
    plain, adapter = golden_dit(), adapter_of(dit, settings)
    weights = merged(plain, adapter)
    expected = torch.func.functional_call(plain, weights, INPUTS)
    output = dit(*INPUTS)
    assert relative_error(output, expected) <= 2e-5
    with torch.no_grad():
        assert relative_error(plain(*INPUTS), expected) > 1e-2
    parameters = lora_parameters(dit)
    gradients, theirs = (
        torch.autograd.grad((out - TARGET).square().mean(), list(parameters.values())) for out in (output, expected)
    )
    for name, ours, reference in zip(parameters, gradients, theirs, strict=True):
        assert relative_error(ours, reference) <= 1e-4, name


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for is_checkpointed in (False, True):
        dit, _ = disturbed(golden_dit())
        if is_checkpointed:
            apply_activation_checkpointing(dit, ["block"] * len(dit.blocks))
        loss = (dit.train()(*INPUTS) - TARGET).square().mean()
        gradients.append(torch.autograd.grad(loss, list(lora_parameters(dit).values())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*gradients, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, TOLERANCE), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("options", [{}, {"rslora": True, "rank_pattern": {".*qkv_x": 7, r".*\.w1": 2}}])
@pytest.mark.parametrize("to", ["native", "diffusers"])
@torch.no_grad()
def test_a_trained_dora_and_its_reloaded_file_compute_the_same_and_switch_off(tmp_path, to, options, dtype, tolerance):
    dit, settings = disturbed(golden_dit(dtype), **options)
    save_adapter(tmp_path / "a.safetensors", adapter_of(dit, settings), to)
    save_adapter(tmp_path / "b.safetensors", load_adapter(tmp_path / "a.safetensors"))
    loaded, fresh = load_adapter(tmp_path / "b.safetensors"), golden_dit(dtype)
    assert loaded.is_dora and {n: x.rank for n, x in loaded.layers.items()} == {n: x.rank for n, x in settings.items()}
    apply_adapter(fresh, loaded.layers, "adapter")
    got, expected = fresh(*INPUTS), dit.eval()(*INPUTS)
    assert got.dtype == dtype and relative_error(got, expected) <= tolerance
    for model in (dit, fresh):
        switch_adapters(model, on=False)
        assert torch.equal(model(*INPUTS), golden_dit(dtype)(*INPUTS))
        switch_adapters(model, on=True)
        assert torch.equal(model(*INPUTS), expected if model is dit else got)


@torch.no_grad()
def test_a_dora_whose_directions_stayed_keeps_its_lengths(tmp_path):
    dit, settings = golden_dit(), settings_of_all(golden_dit())
    apply_lora(dit, settings, seed=1, dora=True)
    for name, parameter in lora_parameters(dit).items():
        parameter *= 1.5 if name.endswith("magnitude") else 0
    save_adapter(tmp_path / "a.safetensors", adapter_of(dit, settings))
    fresh = golden_dit()
    apply_adapter(fresh, load_adapter(tmp_path / "a.safetensors").layers, "adapter")
    assert relative_error(fresh(*INPUTS), dit(*INPUTS)) <= TOLERANCE
    assert relative_error(fresh(*INPUTS), golden_dit()(*INPUTS)) > 1e-2


@torch.no_grad()
def test_blocks_that_come_and_go_compute_the_same():
    dit, settings = disturbed(golden_dit())
    fresh = golden_dit()
    apply_adapter(fresh, adapter_of(dit, settings).layers, "adapter")
    expected = fresh(*INPUTS)
    apply_block_offload(fresh, torch.device("cpu"))
    assert torch.equal(fresh(*INPUTS), expected) and relative_error(expected, dit.eval()(*INPUTS)) <= TOLERANCE


@pytest.mark.parametrize(("precision", "tolerance"), [("int8", 0.02), ("fp8", 0.08)])
@torch.no_grad()
def test_a_dora_works_on_eight_bit_weights(precision, tolerance):
    dit, settings = disturbed(golden_dit())
    small = WeightsFolder(GOLDEN).load_dit("cpu", torch.bfloat16, lambda _, block: apply_quantization(block, precision))
    half = golden_dit(torch.bfloat16)
    for model in (small, half):
        apply_adapter(model, adapter_of(dit, settings).layers, "adapter")
    got, expected = small(*INPUTS).float(), half(*INPUTS).float()
    assert 1e-4 < (got - expected).norm() / expected.norm() < tolerance
    assert (got - golden_dit()(*INPUTS)).norm() / expected.norm() > 0.1


@pytest.fixture(scope="module")
def trained():
    return adapter_of(*disturbed(golden_dit()))


@pytest.mark.parametrize("to", ["official", "comfyui"])
def test_a_format_that_cannot_hold_a_dora_refuses_it(tmp_path, trained, to):
    with pytest.raises(CheckpointError, match=f"is a DoRA, and {to} has no form .*: use to=diffusers, or") as error:
        save_adapter(tmp_path / "a.safetensors", trained, to)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@torch.no_grad()
def test_strengths_and_other_adapters_add_up_as_changes_of_the_weights():
    layers = [adapter_of(*disturbed(golden_dit(), seed=seed)).layers for seed in (0, 1)]
    layers.append(load_adapter(GOLDEN / "lora.safetensors").layers)
    for order in ((0, 1, 2), (2, 1, 0)):
        dit, weights = golden_dit(), {name: p.double() for name, p in golden_dit().named_parameters()}
        base = dict(weights)
        for i, strength in zip(order, (0.6, -0.4, 1.5), strict=True):
            apply_adapter(dit, layers[i], f"adapter_{i}", strength)
            for name, layer in layers[i].items():
                weight = base[f"{name}.weight"]
                weights[f"{name}.weight"] = weights[f"{name}.weight"] + strength * (adapted64(weight, layer) - weight)
        expected = torch.func.functional_call(golden_dit(), {name: w.float() for name, w in weights.items()}, INPUTS)
        assert relative_error(dit(*INPUTS), expected) <= 2e-5
        switch_adapters(dit, on=False)
        assert torch.equal(dit(*INPUTS), golden_dit()(*INPUTS))


def test_an_applied_dora_keeps_no_copy_of_the_weight():
    dit, settings = disturbed(golden_dit())
    applied = golden_dit()
    apply_adapter(applied, adapter_of(dit, settings).layers, "style")
    stretched = [module for module in applied.modules() if isinstance(module, StretchedLinear)]
    assert stretched
    for module in stretched:
        assert module.changes["style"].grad_fn is None and not module.lora_stretch.requires_grad
