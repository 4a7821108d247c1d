"""Adapters that cannot be applied are refused in one line, and the model does not change."""

import math
from dataclasses import replace

import pytest
import torch
from helpers_adapters import random_adapter, settings_of
from helpers_golden import golden_dit

from mochi_tune.adapters.files import LoraLayer
from mochi_tune.adapters.lora import apply_adapter, apply_lora
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.parallel.modulation import apply_host_modulation

LAYER = "blocks.0.attn.qkv_x"
ONE = LoraLayer(torch.ones(1, 192), torch.ones(576, 1), 1.0)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({LAYER: replace(ONE, a=torch.ones(1, 96))}, rf"{LAYER} is \(576, 96\) in the adapter and \(576, 192\) in the"),
        ({LAYER: replace(ONE, b=torch.ones(3, 1))}, rf"{LAYER} is \(3, 192\) in the adapter"),
        ({LAYER: replace(ONE, b=torch.ones(576, 2))}, "do not fit each other or this layer"),
        ({LAYER: replace(ONE, magnitude=torch.ones(5))}, r"its magnitudes have shape \(5,\), not"),
        ({LAYER: ONE, "blocks.9.attn.qkv_x": ONE}, r"the model has no Linear blocks\.9\.attn\.qkv_x"),
        ({"blocks.0.attn": ONE}, r"the model has no Linear blocks\.0\.attn"),
    ],
)
@pytest.mark.parametrize("is_second", [False, True])
def test_layers_that_do_not_fit_the_model_change_nothing(layers, said, is_second):
    dit = golden_dit()
    if is_second:
        apply_adapter(dit, random_adapter().layers, "first")
    before = list(dit.state_dict())
    with pytest.raises(CheckpointError, match=said) as caught:
        apply_adapter(dit, layers, "style")
    assert "\n" not in str(caught.value) and list(dit.state_dict()) == before


@pytest.mark.parametrize("name", ["my.lora", "", "keys", "training"])
def test_a_name_that_torch_cannot_take_is_refused(name):
    dit = golden_dit()
    before = list(dit.state_dict())
    with pytest.raises(ConfigError, match=f"an adapter cannot have the name '{name}': use another word"):
        apply_adapter(dit, {LAYER: ONE}, name)
    assert list(dit.state_dict()) == before


def test_a_strength_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="strength=nan is not possible"):
        apply_adapter(golden_dit(), {LAYER: ONE}, "style", math.nan)


def test_an_adapter_is_not_added_twice_by_one_name():
    dit, layers = golden_dit(), random_adapter().layers
    apply_adapter(dit, layers, "style")
    before = list(dit.state_dict())
    with pytest.raises(ConfigError, match=r"already has an adapter 'style' in blocks\.0\.attn.*: use another name"):
        apply_adapter(dit, layers, "style")
    assert list(dit.state_dict()) == before
    apply_adapter(dit, layers, "another")


def test_a_model_has_one_trainable_adapter():
    dit = golden_dit()
    apply_lora(dit, settings_of([LAYER], 2, 2.0, 0.0), seed=0)
    with pytest.raises(ConfigError, match="already has a trainable adapter: reload the model"):
        apply_lora(dit, settings_of(["blocks.1.attn.qkv_x"], 2, 2.0, 0.0), seed=0)


def test_a_trainable_layer_that_is_not_there_leaves_the_model_as_it_is():
    dit, one = golden_dit(), settings_of([LAYER], 2, 2.0, 0.0)[LAYER]
    with pytest.raises(ConfigError, match=r"the model has no Linear blocks\.99\.attn\.qkv_x: choose layers"):
        apply_lora(dit, {LAYER: one, "blocks.99.attn.qkv_x": one}, seed=0)
    apply_lora(dit, {LAYER: one}, seed=0)


def test_an_adapter_leaves_the_random_numbers_of_its_caller_alone():
    adapted, trained = golden_dit(), golden_dit()
    before = torch.get_rng_state()
    apply_adapter(adapted, {LAYER: ONE}, "style")
    apply_lora(trained, settings_of([LAYER], 2, 2.0, 0.0), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_modulation_in_host_memory_is_named_as_the_reason():
    dit = golden_dit()
    for block in dit.blocks:
        apply_host_modulation(block)
    with pytest.raises(CheckpointError, match=r"no Linear blocks\.0\.mod_x.* before their weights move to host"):
        apply_adapter(dit, {"blocks.0.mod_x": LoraLayer(torch.ones(1, 192), torch.ones(768, 1), 1.0)}, "style")
