import pytest
import torch
from helpers_adapters import settings_of
from helpers_golden import TOLERANCE, golden_dit, relative_error, vectors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import (
    LayerSettings,
    apply_adapter,
    apply_lora,
    linear_shapes,
    lora_parameters,
    select_layers,
    settings_metadata,
    trained_layers,
)
from mochi_tune.errors import ConfigError

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
    apply_lora(dit, settings_of(layers, 4, 8, 0.0), seed=1)
    with torch.no_grad():
        assert torch.equal(dit(*INPUTS), before)
    parameters = lora_parameters(dit)
    assert len(parameters) == 26 and all(p.dtype == torch.float32 for p in parameters.values())
    trainable = {name for name, p in dit.named_parameters() if p.requires_grad}
    assert len(trainable) == 26 and all(".lora_" in name for name in trainable)


def test_the_seed_determines_the_initial_weights():
    starts = []
    for seed, disturbance in ((1, 0), (1, 5), (2, 0)):
        dit = golden_dit()
        torch.manual_seed(disturbance)
        apply_lora(dit, settings_of(list(linear_shapes(dit)), 2, 2, 0.0), seed=seed)
        starts.append(lora_parameters(dit)["blocks.1.attn.qkv_x.lora_A"].detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_every_b_gets_a_gradient_at_the_first_step(dit):
    apply_lora(dit, settings_of(list(linear_shapes(dit)), 2, 2, 0.0), seed=0)
    dit(*INPUTS).square().mean().backward()
    for name, parameter in lora_parameters(dit).items():
        assert bool(parameter.grad.any()) == name.endswith("lora_B"), name


def random_layers(dit, names, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraLayer(
            torch.randn(rank, i, generator=generator) / i, torch.randn(o, rank, generator=generator), rank / 2
        )
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
        for layer, change in layers.items():
            merged.get_submodule(layer).weight += 0.5 * change.b @ change.a
    assert relative_error(dit(*INPUTS), merged(*INPUTS)) <= 2e-5
    assert relative_error(dit(*INPUTS), golden_dit()(*INPUTS)) > 1e-2


@torch.no_grad()
def test_applying_never_touches_the_base(dit):
    before = {name: p.clone() for name, p in golden_dit().named_parameters()}
    apply_adapter(dit, random_layers(dit, list(linear_shapes(dit)), 2, 0), "one")
    after = {name.replace(".base_layer", ""): p for name, p in dit.named_parameters() if ".lora_" not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


# Settings of single layers

NAMES = [f"blocks.{i}.attn.{kind}" for i in range(2) for kind in ("qkv_x", "qkv_y", "proj_x")]


def test_a_pattern_must_match_the_whole_name():
    settings = settings_of(
        NAMES, 16, 32.0, 0.1,
        rank_pattern={r"blocks\.0\..*": 4, r".*\.proj_x": 4, r"blocks\.1\.attn\.qkv_x": 8},
        alpha_pattern={r".*qkv_[xy]": 2.0},
        dropout_pattern={r"blocks\.1\.attn\.qkv_y": 0.0},
    )  # fmt: skip
    assert [each.rank for each in settings.values()] == [4, 4, 4, 8, 16, 4]
    assert [each.alpha for each in settings.values()] == [2.0, 2.0, 32.0, 2.0, 2.0, 32.0]
    assert [each.dropout for each in settings.values()] == [0.1, 0.1, 0.1, 0.1, 0.0, 0.1]
    assert list(settings) == NAMES and not any(each.rslora for each in settings.values())
    assert settings_metadata(settings) == {"rank": "4,8,16", "alpha": "2,32"}
    assert settings_metadata(settings_of(NAMES, 4, 8, 0, rslora=True))["rslora"] == "true"


@pytest.mark.parametrize(
    ("patterns", "text"),
    [
        ({"rank_pattern": {".*0.attn.qkvx": 4}}, "lora.rank_pattern: '.*0.attn.qkvx' matches no chosen layer; chosen "
         "are blocks.N.{attn.proj_x, attn.qkv_x, attn.qkv_y}, for example 'blocks.0.attn.qkv_x'."),
        ({"alpha_pattern": {r".*mlp.*": 4}}, "lora.alpha_pattern: '.*mlp.*' matches no chosen layer"),
        ({"dropout_pattern": {"(": 0.5}}, "lora.dropout_pattern: '(' is not a regular expression"),
        ({"rank_pattern": {".*qkv_x": 4, ".*0.*": 8}}, "blocks.0.attn.qkv_x gets 4 by '.*qkv_x' and 8 by '.*0.*': let"),
    ],
)  # fmt: skip
def test_patterns_that_choose_nothing_or_contradict_are_refused(patterns, text):
    with pytest.raises(ConfigError) as error:
        settings_of(NAMES, 16, 16, 0.0, **patterns)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_ranks_alphas_and_dropouts_of_patterns_reach_the_layers(dit):
    names = list(linear_shapes(dit))
    first, second = names[0], names[1]
    settings = settings_of(names, 4, 8, 0.25, {first: 2}, {second: 3.0}, {first: 0.5, second: 0.0})
    apply_lora(dit, settings, seed=0)
    assert lora_parameters(dit)[f"{first}.lora_A"].shape[0] == 2 and dit.get_submodule(first).scaling == {"default": 4}
    assert lora_parameters(dit)[f"{second}.lora_B"].shape[1] == 4
    assert dit.get_submodule(second).scaling == {"default": 0.75}
    dropouts = [getattr(dit.get_submodule(name).lora_dropout["default"], "p", 0.0) for name in names]
    assert dropouts == [0.5, 0.0] + [0.25] * (len(names) - 2)


def test_a_dropout_drops_in_its_layer_alone_and_only_while_training(dit):
    torch.manual_seed(0)
    settings = settings_of(list(linear_shapes(dit)), 4, 8, 0.0, dropout_pattern={r"blocks\.1\.attn\.qkv_x": 0.5})
    apply_lora(dit, settings, seed=0)
    for parameter in lora_parameters(dit).values():
        parameter.data.normal_()
    x = torch.randn(1, 3, 192)
    with torch.no_grad():
        for name, differs in (("blocks.0.attn.qkv_x", False), ("blocks.1.attn.qkv_x", True)):
            layer = dit.get_submodule(name)
            assert torch.equal(layer.train()(x), layer(x)) != differs
            assert torch.equal(layer.eval()(x), layer(x))


def test_settings_other_than_the_rank_do_not_change_the_initial_weights():
    starts = []
    for options in ({}, {"alpha_pattern": {".*": 3.0}, "dropout_pattern": {".*": 0.5}, "rslora": True}, {"dora": True}):
        dit, dora = golden_dit(), options.pop("dora", False)
        apply_lora(dit, settings_of(list(linear_shapes(dit)), 2, 2, 0.0, **options), seed=3, dora=dora)
        starts.append(lora_parameters(dit))
    for name, parameter in starts[0].items():
        assert torch.equal(parameter, starts[1][name]) and torch.equal(parameter, starts[2][name])


# Saving and loading

KINDS = {
    "plain": {},
    "patterns": {"rank_pattern": {".*qkv_x": 2, r".*\.w1": 7}, "alpha_pattern": {".*proj_x": 1.5, r".*\.w1": 1.0}},
    "rslora": {"rslora": True, "rank_pattern": {".*qkv_y": 9}},
}


@pytest.mark.parametrize("to", ["native", "diffusers", "comfyui"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_trained_model_and_its_reloaded_adapter_compute_the_same(tmp_path, kind, to):
    trained, fresh = golden_dit(), golden_dit()
    settings = settings_of(list(linear_shapes(trained)), 4, 6, 0.0, **KINDS[kind])
    apply_lora(trained, settings, seed=1)
    torch.manual_seed(0)
    for parameter in lora_parameters(trained).values():
        parameter += 0.1 * torch.randn_like(parameter)
    layers = trained_layers(lora_parameters(trained), settings)
    save_adapter(tmp_path / "a.safetensors", Adapter(layers, settings_metadata(settings)), to)
    loaded = load_adapter(tmp_path / "a.safetensors")
    apply_adapter(fresh, loaded.layers, "adapter")
    got, expected = fresh(*INPUTS), trained.eval()(*INPUTS)
    assert relative_error(got, expected) <= TOLERANCE if to != "native" else torch.equal(got, expected)
    assert relative_error(expected, golden_dit()(*INPUTS)) > 1e-2
    assert loaded.metadata["rank"] == settings_metadata(settings)["rank"]
    assert loaded.metadata.get("rslora") == ("true" if kind == "rslora" and to == "native" else None)


@torch.no_grad()
def test_rslora_scales_by_the_root_of_the_rank():
    dit, plain = golden_dit(), golden_dit()
    for model, each in ((dit, LayerSettings(16, 8.0, rslora=True)), (plain, LayerSettings(16, 32.0))):
        apply_lora(model, {"blocks.0.attn.qkv_x": each}, seed=0)
        assert model.get_submodule("blocks.0.attn.qkv_x").scaling == {"default": 2.0}


class Shapes(TorchDispatchMode):
    """Records the dtype and the shape of every new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.made += [(t.dtype, tuple(t.shape)) for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


def test_an_adapter_multiplies_in_the_dtype_of_the_base_and_its_gradients_are_fp32():
    num_tokens, name = 50, "blocks.0.attn.qkv_x"
    dit = golden_dit(torch.bfloat16)
    apply_lora(dit, {name: LayerSettings(4, 8.0)}, seed=0)
    generator = torch.Generator().manual_seed(1)
    parameters = lora_parameters(dit)
    for parameter in parameters.values():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    layer = dit.get_submodule(name)
    x = torch.randn(1, num_tokens, 192, generator=generator).bfloat16().requires_grad_(True)
    gradient = torch.randn(1, num_tokens, 576, generator=generator).bfloat16()
    with Shapes() as shapes:
        out = layer(x)
        out.backward(gradient)
    assert out.dtype == x.grad.dtype == torch.bfloat16
    # No tensor with a token axis is copied to fp32.
    assert not [shape for dtype, shape in shapes.made if dtype == torch.float32 and num_tokens in shape]
    a, b = (parameters[f"{name}.lora_{half}"].detach().double() for half in "AB")
    x, gradient = x.detach()[0].double(), gradient[0].double()
    expected = {"A": 2.0 * (gradient @ b).t() @ x, "B": 2.0 * gradient.t() @ (x @ a.t())}
    for half, exact in expected.items():
        got = parameters[f"{name}.lora_{half}"].grad
        assert got.dtype == torch.float32
        # bf16 rounds each of several factors by 2^-9.
        assert relative_error(got, exact) <= 4 * 2**-9, half


def test_dropout_is_off_in_a_model_that_is_in_eval_mode(dit):
    apply_lora(dit.eval(), settings_of(list(linear_shapes(dit)), 2, 2.0, 0.5), seed=0)
    with torch.no_grad():
        for name, parameter in lora_parameters(dit).items():
            parameter.fill_(0.1 if name.endswith("lora_B") else 0.2)
        assert torch.equal(dit(*INPUTS), dit(*INPUTS))
        dit.train()
        assert not torch.equal(dit(*INPUTS), dit(*INPUTS))
