"""What cannot be applied is refused in one line, and the model stays as it was."""

from dataclasses import replace

import pytest
import torch
from helpers_adapters import random_adapter
from helpers_golden import golden_dit

from mochi_tune.adapters.files import LoraLayer
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.errors import CheckpointError, ConfigError

LAYER = "blocks.0.attn.qkv_x"
ONE = LoraLayer(torch.ones(1, 192), torch.ones(576, 1), 1.0)


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ({LAYER: replace(ONE, a=torch.ones(1, 96))}, rf"{LAYER} is \(576, 96\) in the adapter and \(576, 192\) in the"),
        ({LAYER: replace(ONE, b=torch.ones(3, 1))}, rf"{LAYER} is \(3, 192\) in the adapter"),
        ({LAYER: replace(ONE, b=torch.ones(576, 2))}, "are no pair for this layer"),
        ({LAYER: replace(ONE, magnitude=torch.ones(5))}, "magnitudes are not one for each"),
        ({LAYER: ONE, "blocks.9.attn.qkv_x": ONE}, r"the model has no Linear blocks\.9\.attn\.qkv_x"),
        ({"blocks.0.attn": ONE}, r"the model has no Linear blocks\.0\.attn"),
    ],
)
@pytest.mark.parametrize("is_second", [False, True])
def test_layers_that_are_not_the_models_change_nothing(layers, said, is_second):
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
