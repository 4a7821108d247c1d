"""Random adapters for the golden DiT, and the golden files that their tests read."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mochi_tune.adapters.files import Adapter, LoraLayer
from mochi_tune.adapters.lora import LayerSettings, layer_settings
from mochi_tune.models.dit import AsymmDiT, DiTConfig

GOLDEN = Path(__file__).parent / "golden"
CONFIG = json.loads((GOLDEN / "dit_config.json").read_text())
ATTENTION = ("attn.qkv_x", "attn.qkv_y", "attn.proj_x", "attn.proj_y")
MLPS = ("mlp_x.w1", "mlp_x.w2", "mlp_y.w1", "mlp_y.w2")
ALL = ATTENTION + MLPS
# (rank, alpha), taken in turn by the layers
UNIFORM = ((16, 64.0),)
MIXED = ((4, 8.0), (16, 64.0), (3, 1.0), (5, 7.0))


def base_weights() -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(GOLDEN / "dit.safetensors").items()}


def base_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of the Linears that can be adapted, read off the golden weights."""
    return {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in load_file(GOLDEN / "dit.safetensors").items()
        if name.endswith(tuple(f".{kind}.weight" for kind in ATTENTION + MLPS))
    }


def random_adapter(kinds=ATTENTION, sizes=UNIFORM, seed=0) -> Adapter:
    """Layers of the given kinds in every block that has them; `sizes` are (rank, alpha), taken in turn."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for i, (name, (num_out, num_in)) in enumerate(base_shapes().items()):
        if name.endswith(tuple(kinds)):
            rank, alpha = sizes[i % len(sizes)]
            a = torch.randn(rank, num_in, generator=generator) / num_in**0.5
            b = torch.randn(num_out, rank, generator=generator) / rank**0.5
            layers[name] = LoraLayer(a, b, alpha)
    return Adapter(layers, {"num_blocks": str(CONFIG["depth"]), "base_model": "mochi-tiny", "step": "12"})


def with_magnitudes(adapter: Adapter, seed=3) -> Adapter:
    """The adapter as a DoRA, whose rows have other lengths than the base's."""
    generator, weights = torch.Generator().manual_seed(seed), base_weights()
    for name, layer in adapter.layers.items():
        lengths = weights[f"{name}.weight"].norm(dim=1)
        layer.magnitude = lengths * (1 + 0.3 * torch.randn(len(lengths), generator=generator))
    return adapter


def adapted64(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """The adapted weight by its definition, in fp64."""
    changed = weight.double() + delta64(layer)
    if layer.magnitude is None:
        return changed
    return layer.magnitude.double()[:, None] * changed / changed.norm(dim=1, keepdim=True)


def delta64(layer: LoraLayer) -> torch.Tensor:
    """The definition, in fp64."""
    return layer.alpha / layer.a.shape[0] * layer.b.double() @ layer.a.double()


def delta_weight(layer: LoraLayer) -> torch.Tensor:
    """What a layer that is no DoRA adds to its Linear's weight, in fp32, or in fp64 where a or b is fp64."""
    dtype = torch.promote_types(torch.promote_types(layer.a.dtype, layer.b.dtype), torch.float32)
    return layer.scale * (layer.b.to(dtype) @ layer.a.to(dtype))


def assert_same_change(actual: Adapter, expected: Adapter, tolerance=1e-6) -> None:
    assert actual.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        want = delta64(layer)
        error = (delta64(actual.layers[name]) - want).abs().max() / want.abs().max()
        assert error <= tolerance, f"{name}: {error}"
        other = actual.layers[name].magnitude
        assert (layer.magnitude is None) == (other is None) and (other is None or torch.equal(other, layer.magnitude))


def build_dit(weights):
    config = DiTConfig(**{key: value for key, value in CONFIG.items() if key in DiTConfig.__dataclass_fields__})
    dit = AsymmDiT(config)
    dit.load_state_dict(weights)
    return dit


def write(path, tensors, metadata=None):
    save_file(tensors, path, metadata)
    return path


def settings_of(layers, rank, alpha, dropout, *patterns, rslora=False, **more) -> dict[str, LayerSettings]:
    """Returns the settings of layers, of which only some differ."""
    return layer_settings(layers, LayerSettings(rank, alpha, dropout, rslora), *patterns, **more)
