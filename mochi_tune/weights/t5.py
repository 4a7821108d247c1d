"""Sizes, tensor shapes and loading of the T5 encoder; only `build_t5` imports transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.files import read_json
from mochi_tune.models.eight_bit import Int8WeightLinear
from mochi_tune.models.text_encoder import quiet_transformers
from mochi_tune.weights.fill import fill_model

# T5 v1.1 XXL, which Mochi 1 was trained with. Source: its config.json, keys of the encoder.
_FULL_SIZE: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
# Older configurations leave these out.
_DEFAULTS = {name: _FULL_SIZE[name] for name in ("relative_attention_max_distance", "layer_norm_epsilon")}


def read_t5_config(path: Path) -> dict[str, Any]:
    """Reads the encoder's sizes from a config.json of transformers; full size if there is no such file.

    Raises:
        CheckpointError: the file is not a JSON object or that of another model, or a size is missing or not a number.
    """
    if not path.exists():
        return _FULL_SIZE
    values = _DEFAULTS | read_json(path)
    if values.get("model_type", "t5") != "t5" or values.get("feed_forward_proj") != "gated-gelu":
        raise CheckpointError(
            f"{path} describes a {values.get('model_type')} with feed_forward_proj={values.get('feed_forward_proj')}: "
            "Mochi's text encoder is a t5 with gated-gelu."
        )
    for name in _DEFAULTS:
        # The shapes of the tensors do not depend on these values.
        if values[name] != _FULL_SIZE[name]:
            raise CheckpointError(
                f"{path}: {name}={values[name]!r} does not fit; in Mochi's T5 it is {_FULL_SIZE[name]}."
            )
    for name, example in _FULL_SIZE.items():
        value = values.get(name)
        kind = (int, float) if isinstance(example, float) else type(example)
        if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise CheckpointError(f"{path}: {name}={value!r} does not fit; in Mochi's T5 it is {example}.")
    return {name: values[name] for name in _FULL_SIZE}


def t5_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of the encoder, by its name in transformers' T5EncoderModel."""
    width, inner, hidden = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    shapes: dict[str, tuple[int, ...]] = {
        "shared.weight": (config["vocab_size"], width),
        "encoder.final_layer_norm.weight": (width,),
    }
    for i in range(config["num_layers"]):
        attention, feed_forward = (f"encoder.block.{i}.layer.{layer}" for layer in (0, 1))
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, width) for name in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (width, inner)
        shapes |= {f"{feed_forward}.DenseReluDense.{name}.weight": (hidden, width) for name in ("wi_0", "wi_1")}
        shapes[f"{feed_forward}.DenseReluDense.wo.weight"] = (width, hidden)
        shapes |= {f"{layer}.layer_norm.weight": (width,) for layer in (attention, feed_forward)}
    # The first block holds the position biases of all blocks.
    buckets = config["relative_attention_num_buckets"]
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (buckets, config["num_heads"])
    return shapes


def keep_encoder(found: dict[str, Any]) -> dict[str, Any]:
    """Removes the tensors of T5's decoder and the second name of the embedding, if files have them."""
    second = "encoder.embed_tokens.weight"
    kept = {name: value for name, value in found.items() if not name.startswith(("decoder.", "lm_head."))}
    if second in kept:
        kept.setdefault("shared.weight", kept[second])
        del kept[second]
    return kept


def build_t5(config: dict[str, Any], write: Callable[[str, Tensor], object], device: Any, dtype: torch.dtype) -> Any:
    """Builds the encoder, frozen and in eval mode, and fills it with weights.

    Args:
        config: sizes from `read_t5_config`.
        write: function of a parameter's name and empty tensor that fills the tensor.
        device: device of the weights.
        dtype: dtype of the weights; torch.int8 holds the matrices of the blocks in 8 bits and computes in bf16.
    """
    from transformers import T5Config, T5EncoderModel

    with quiet_transformers(), torch.device("meta"):
        model: Any = T5EncoderModel(T5Config(**config, use_cache=False, is_encoder_decoder=False, dropout_rate=0.0))
    names = {name for name, _ in model.named_parameters()}
    assert names == t5_shapes(config).keys(), "the installed transformers has other names for the tensors of T5"
    if dtype == torch.int8:
        fill_model(model, write, device, torch.bfloat16, lambda _, block: _quantize_block(block))
    else:
        fill_model(model, write, device, dtype)
    assert isinstance(model.shared, nn.Embedding)
    model.encoder.embed_tokens.weight = model.shared.weight
    return model.requires_grad_(False)


def _quantize_block(block: nn.Module) -> None:
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            block.set_submodule(name, Int8WeightLinear(linear))
