import pytest
import torch
from helpers_golden import golden_dit, relative_error, vectors

from mochi_tune.errors import ConfigError
from mochi_tune.lora import apply_adapter, apply_lora, linear_shapes, lora_parameters, select_layers

IO = vectors("dit_io")
INPUTS = (IO["z"], IO["sigma"], IO["y_feat"], IO["y_mask"])
ATTENTION = [r"blocks\.\d+\.attn\.(qkv_x|qkv_y|proj_x|proj_y)"]
MLP = [r"blocks\.\d+\.mlp_[xy]\.(w1|w2)"]


@pytest.fixture
def dit():
    return golden_dit()


def test_layers_are_all_linears_of_the_blocks(dit):
    shapes = linear_shapes(dit)
    kinds = {name.split(".", 2)[2] for name in shapes}
    assert kinds == {
        "attn.qkv_x", "attn.qkv_y", "attn.proj_x", "attn.proj_y", "mlp_x.w1", "mlp_x.w2", "mlp_y.w1", "mlp_y.w2",
    }  # fmt: skip
    assert len(shapes) == 13, "the last block has no proj_y and no mlp_y"
    assert shapes["blocks.0.attn.proj_y"] == (96, 192)


def test_presets_choose_their_layers(dit):
    names = list(linear_shapes(dit))
    assert len(select_layers(names, ATTENTION)) == 7
    assert len(select_layers(names, ATTENTION + MLP)) == 13
    assert select_layers(names, [r"blocks\.1\.attn\.qkv_x"]) == ["blocks.1.attn.qkv_x"]


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        (["attn.qkvx"], "matches no layer; layers are blocks.N.{attn.proj_x"),
        (["blocks.(0"], "is not a regular expression"),
        ([], "lora.targets is empty"),
    ],
)
def test_patterns_that_choose_nothing_are_refused(dit, patterns, text):
    with pytest.raises(ConfigError) as error:
        select_layers(linear_shapes(dit), patterns)
    assert text in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_nothing_and_is_fp32(dtype):
    dit = golden_dit(dtype)
    with torch.no_grad():
        before = dit(*INPUTS)
    layers = select_layers(linear_shapes(dit), ATTENTION + MLP)
    apply_lora(dit, layers, rank=4, alpha=8, dropout=0.0, seed=1)
    with torch.no_grad():
        assert torch.equal(dit(*INPUTS), before)
    parameters = lora_parameters(dit)
    assert len(parameters) == 26 and all(p.dtype == torch.float32 for p in parameters.values())
    trainable = {name for name, p in dit.named_parameters() if p.requires_grad}
    assert len(trainable) == 26 and all(".lora_" in name for name in trainable)


def test_the_seed_alone_decides_the_start():
    starts = []
    for seed, disturbance in ((1, 0), (1, 5), (2, 0)):
        dit = golden_dit()
        torch.manual_seed(disturbance)
        apply_lora(dit, list(linear_shapes(dit)), rank=2, alpha=2, dropout=0.0, seed=seed)
        starts.append(lora_parameters(dit)["blocks.1.attn.qkv_x.lora_A"].detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_every_b_gets_a_gradient_at_the_first_step(dit):
    apply_lora(dit, list(linear_shapes(dit)), rank=2, alpha=2, dropout=0.0, seed=0)
    dit(*INPUTS).square().mean().backward()
    for name, parameter in lora_parameters(dit).items():
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name


def random_layers(dit, names, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, i, generator=generator) / i, torch.randn(o, rank, generator=generator), 0.5)
        for name, (o, i) in linear_shapes(dit).items()
        if name in names
    }


@torch.no_grad()
def test_several_adapters_of_different_ranks_add_up_to_their_merged_weights():
    dit, merged = golden_dit(), golden_dit()
    names = list(linear_shapes(dit))
    adapters = {"one": random_layers(dit, names, 3, 1), "two": random_layers(dit, names[:5], 7, 2)}
    adapters["two"][names[0]] = random_layers(dit, names[:1], 2, 3)[names[0]]
    for name, layers in adapters.items():
        apply_adapter(dit, layers, name)
        for layer, (a, b, scale) in layers.items():
            merged.get_submodule(layer).weight += scale * b @ a
    assert relative_error(dit(*INPUTS), merged(*INPUTS)) <= 2e-5
    assert relative_error(dit(*INPUTS), golden_dit()(*INPUTS)) > 1e-2


@torch.no_grad()
def test_applying_never_touches_the_base(dit):
    before = {name: p.clone() for name, p in golden_dit().named_parameters()}
    apply_adapter(dit, random_layers(dit, list(linear_shapes(dit)), 2, 0), "one")
    after = {name.replace(".base_layer", ""): p for name, p in dit.named_parameters() if ".lora_" not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
