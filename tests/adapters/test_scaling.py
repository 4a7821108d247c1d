import re
from dataclasses import replace

import pytest
import torch
from helpers_adapters import random_adapter, with_magnitudes
from helpers_golden import golden_dit, relative_error, vectors
from torch._dynamo.utils import counters

from mochi_tune.adapters.lora import apply_adapter, change_adapters
from mochi_tune.adapters.scaling import AdapterScaling, remove_adapter
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.sampling.render import Setup, prepare_dit

IO = vectors("dit_io")
INPUTS = (IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])


def adapters():
    """A LoRA and a DoRA that have some layers in common."""
    return {
        "lora": random_adapter(seed=1).layers,
        "dora": with_magnitudes(random_adapter(("attn.qkv_x", "mlp_x.w1"), seed=2)).layers,
    }


def adapted(strengths):
    dit = golden_dit()
    for name, layers in adapters().items():
        apply_adapter(dit, layers, name, strengths[name])
    return dit


@torch.no_grad()
def test_a_factor_multiplies_the_strength():
    dit = adapted({"lora": 0.8, "dora": 1.0})
    as_applied, scaling = dit(*INPUTS), AdapterScaling(dit, ["lora", "dora"])
    for factors in ({"lora": 0.5, "dora": 1.0}, {"lora": -1.0, "dora": 0.25}, {"lora": 0.0, "dora": 2.0}):
        scaling.set(factors)
        expected = adapted({"lora": 0.8 * factors["lora"], "dora": factors["dora"]})(*INPUTS)
        assert relative_error(dit(*INPUTS), expected) <= 2e-5
        assert relative_error(dit(*INPUTS), as_applied) > 1e-2
    # 0 gives the bits of the base and 1 the original ones, whatever the factor was before.
    scaling.set({"lora": 0.0, "dora": 0.0})
    assert torch.equal(dit(*INPUTS), golden_dit()(*INPUTS))
    scaling.set({"lora": 1.0, "dora": 1.0})
    assert torch.equal(dit(*INPUTS), as_applied)


@torch.no_grad()
def test_an_adapter_that_is_not_named_stays_as_it_is():
    for named, other in (("lora", "dora"), ("dora", "lora")):
        dit = adapted({"lora": 1.0, "dora": 1.0})
        AdapterScaling(dit, [named]).set({named: 0.0})
        expected = golden_dit()
        apply_adapter(expected, adapters()[other], other)
        assert relative_error(dit(*INPUTS), expected(*INPUTS)) <= 2e-5


@torch.no_grad()
def test_a_new_factor_does_not_recompile_blocks():
    dit, lines = adapted({"lora": 1.0, "dora": 1.0}), []
    scaling, inputs = AdapterScaling(dit, ["lora", "dora"]), (*INPUTS[:2], IO["y_feat"][:, :5], IO["y_mask"][:, :5])
    expected = {}
    for factor in (1.0, 0.5, 0.0):
        scaling.set({"lora": factor, "dora": 1.0 - factor})
        expected[factor] = dit(*inputs)
    counters.clear()
    apply_compilation(dit, lines.append, backend="eager")
    for factor in expected:
        scaling.set({"lora": factor, "dora": 1.0 - factor})
        assert relative_error(dit(*inputs), expected[factor]) <= 2e-5
        # One graph for each of the two kinds of blocks.
        assert counters["stats"]["unique_graphs"] == 2
    assert not lines and not counters["graph_break"]


@pytest.mark.parametrize("name", ["lora", "dora"])
@torch.no_grad()
def test_a_factor_of_a_block_scales_what_the_adapter_adds_there(name):
    def load(device, dtype, each_block):
        dit = golden_dit()
        for block in dit.blocks:
            each_block(dit, block)
        return dit

    layers = adapters()[name]
    dit = prepare_dit(load, {name: (layers, 0.8, {1: 0.5})}, Setup(torch.device("cpu"), torch.float32))
    base, generator = golden_dit(), torch.Generator().manual_seed(0)
    for layer, change in layers.items():
        weight = base.get_submodule(layer).weight.double()
        changed = weight + change.scale * change.b.double() @ change.a.double()
        if change.magnitude is not None:
            changed *= (change.magnitude.double() / changed.norm(dim=1))[:, None]
        x = torch.randn(3, weight.shape[1], generator=generator).double()
        strength = 0.8 * (0.5 if layer.startswith("blocks.1.") else 1.0)
        expected = x @ (weight + strength * (changed - weight)).T
        if (bias := base.get_submodule(layer).bias) is not None:
            expected += bias.double()
        # The factors of a DoRA were rounded to fp32; everything else is fp64 here.
        assert relative_error(dit.get_submodule(layer).double()(x), expected) <= (1e-12 if name == "lora" else 1e-6)


@torch.no_grad()
def test_factors_can_be_set_one_by_one_or_together():
    doras = {name: with_magnitudes(random_adapter(seed=seed)).layers for seed, name in enumerate(("a", "b"))}
    outs = []
    for calls in ([{"a": 0.5}, {"b": 0.25}], [{"a": 0.5, "b": 0.25}]):
        dit = golden_dit()
        for name, layers in doras.items():
            apply_adapter(dit, layers, name)
        scaling = AdapterScaling(dit, list(doras))
        for factors in calls:
            scaling.set(factors)
        outs.append(dit(*INPUTS))
    assert torch.equal(*outs)


@torch.no_grad()
def test_a_dora_that_a_lora_replaces_leaves_nothing_behind():
    dora, lora = with_magnitudes(random_adapter(seed=2)).layers, random_adapter(seed=1).layers
    changed, fresh = golden_dit(), golden_dit()
    apply_adapter(changed, dora, "a")
    change_adapters(changed, {"a": (lora, 1.0)})
    AdapterScaling(changed, ["a"]).set({"a": 0.5})
    apply_adapter(fresh, lora, "a", 0.5)
    assert relative_error(changed(*INPUTS), fresh(*INPUTS)) <= 2e-5


def test_an_adapter_of_other_ranks_or_layers_is_no_replacement():
    dit, layers = golden_dit(), random_adapter().layers
    apply_adapter(dit, layers, "a")
    before = dit(*INPUTS)
    first = next(iter(layers))
    narrow = replace(layers[first], a=layers[first].a[:1], b=layers[first].b[:, :1])
    for other in ({**layers, first: narrow}, {name: layers[name] for name in layers if name != first}):
        with pytest.raises(CheckpointError, match=f"'a' has other layers or ranks than the model: {re.escape(first)}"):
            change_adapters(dit, {"a": (other, 1.0)})
    assert torch.equal(dit(*INPUTS), before)


@torch.no_grad()
@pytest.mark.parametrize("order", [("lora", "dora"), ("dora", "lora")])
def test_an_adapter_that_is_removed_leaves_the_others_or_the_base(order):
    dit, alone, base = adapted({"lora": 0.8, "dora": 1.0}), golden_dit(), golden_dit()
    apply_adapter(alone, adapters()[order[1]], order[1], {"lora": 0.8, "dora": 1.0}[order[1]])
    remove_adapter(dit, order[0])
    assert torch.equal(dit(*INPUTS), alone(*INPUTS)) and list(dit.state_dict()) == list(alone.state_dict())
    with pytest.raises(ConfigError, match=f"the model has no adapter '{order[0]}'; it has {order[1]}"):
        remove_adapter(dit, order[0])
    remove_adapter(dit, order[1])
    assert torch.equal(dit(*INPUTS), base(*INPUTS)) and list(dit.state_dict()) == list(base.state_dict())
    # The name is free again.
    apply_adapter(dit, adapters()["lora"], order[0])
