"""The golden model as diffusers', its output on the golden inputs, and a watch for what diffusers and peft warn of."""

import logging
import warnings
from contextlib import contextmanager

import torch
from helpers_adapters import CONFIG, GOLDEN, adapted64, build_dit
from safetensors.torch import load_file

from mochi_tune.weights.key_map import Pieces, diffusers_map


def to_diffusers(tensors: dict[str, torch.Tensor], mapping: dict[str, Pieces]) -> dict[str, torch.Tensor]:
    """Returns official tensors in the names and layouts of diffusers."""
    return {name: piece for key, tensor in tensors.items() for name, piece in mapping[key].split(tensor).items()}


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


class Recorder(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@contextmanager
def nothing_may_be_warned():
    recorder = Recorder()
    loggers = [logging.getLogger(name) for name in ("", "diffusers", "peft")]
    for logger in loggers:
        logger.addHandler(recorder)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for logger in loggers:
            logger.removeHandler(recorder)
    assert recorder.messages + [str(warning.message) for warning in caught] == []
