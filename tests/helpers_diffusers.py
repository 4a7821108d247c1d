"""The golden model as diffusers', and its output on the golden inputs."""

import torch
from helpers_adapters import CONFIG, GOLDEN, adapted64, build_dit
from safetensors.torch import load_file

from mochi_tune.weights.key_map import diffusers_map, to_diffusers


def diffusers_model(weights):
    from diffusers import MochiTransformer3DModel

    model = MochiTransformer3DModel(
        num_attention_heads=CONFIG["num_heads"],
        attention_head_dim=CONFIG["hidden_size_x"] // CONFIG["num_heads"],
        num_layers=CONFIG["depth"],
        pooled_projection_dim=CONFIG["hidden_size_y"],
        text_embed_dim=CONFIG["t5_feat_dim"],
    )
    model.load_state_dict(to_diffusers(weights, diffusers_map(build_dit(weights))))
    return model.eval()


def run_diffusers(model):
    io = load_file(GOLDEN / "dit_io.safetensors")
    with torch.no_grad():
        return model(io["z"], io["y_feat"], (1 - io["sigma"]) * 1000, io["y_mask"].float(), return_dict=False)[0]


def merged(weights, adapter):
    layers = {f"{name}.weight": layer for name, layer in adapter.layers.items()}
    return {key: adapted64(w, layers[key]).float() if key in layers else w for key, w in weights.items()}
