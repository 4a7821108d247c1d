"""Fills a model on the meta device with weights, one tensor at a time, directly on the device and in the dtype."""

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.layers import RMSNorm
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder, EncoderConfig

# Seconds until the progress bar appears; small models load faster.
_BAR_DELAY_SECONDS = 2.0
# Number of random numbers drawn for a model on a CPU; no row of a matrix has a length that divides it.
_NUM_DRAWN = 2**20 + 7
_MODELS: dict[type, type[nn.Module]] = {DiTConfig: AsymmDiT, EncoderConfig: Encoder, DecoderConfig: Decoder}


def build_meta_model(config: DiTConfig | EncoderConfig | DecoderConfig) -> Any:
    """Builds the model of a configuration on the meta device, without weights."""
    with torch.device("meta"):
        return _MODELS[type(config)](config)


def build_random_model(
    config: DiTConfig | EncoderConfig | DecoderConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[Any, nn.Module], None] | None = None,
) -> Any:
    """Builds a model with random weights as the loaders do, for benchmarks; takes the arguments of `fill_model`.

    On a CPU, where drawing ten billion numbers would take minutes, it repeats the first ones.
    """
    model = build_meta_model(config)
    some = torch.randn(_NUM_DRAWN, device="cpu") * 0.02

    def write(_: str, tensor: Tensor) -> None:
        if tensor.device.type != "cpu" or tensor.numel() <= _NUM_DRAWN:
            tensor.normal_(0, 0.02)
            return
        # In memory order, whatever the strides are.
        numbers = tensor.as_strided((tensor.numel(),), (1,))
        for part in numbers.split(_NUM_DRAWN):
            part.copy_(some[: len(part)])

    fill_model(model, write, device, dtype, each_block)
    return model


def fill_model(
    model: nn.Module,
    write: Callable[[str, Tensor], object],
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[Any, nn.Module], None] | None = None,
) -> None:
    """Fills a model on the meta device with weights; freezes it and sets it to eval mode.

    Args:
        model: model on the meta device.
        write: function of a parameter's name and empty tensor that fills the tensor.
        device: device of the weights.
        dtype: dtype of the weights, except for `fp32_parameters`.
        each_block: called with the model and each of its blocks as soon as the block is filled.
    """
    fp32 = fp32_parameters(model)
    parameters = list(model.named_parameters())
    blocks = [_block_of(name) for name, _ in parameters]
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    bar = tqdm(
        parameters, type(model).__name__, leave=False, delay=_BAR_DELAY_SECONDS, disable=None if is_main else True
    )
    for i, (name, parameter) in enumerate(bar):
        tensor = torch.empty(parameter.shape, dtype=torch.float32 if name in fp32 else dtype, device=device)
        if tensor.ndim == 5:
            # The layout of the VAE's features; otherwise each convolution would convert its weight.
            tensor = tensor.to(memory_format=torch.channels_last_3d)
        write(name, tensor)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        if each_block and blocks[i] and blocks[i] not in blocks[i + 1 : i + 2]:
            each_block(model, model.get_submodule(blocks[i]))
    assert not any(buffer.is_meta for buffer in model.buffers()), "the model has a buffer that nothing fills"
    model.eval()


def fp32_parameters(model: nn.Module) -> set[str]:
    """Returns the names of parameters that are always fp32: weights and biases of norms, and `pos_frequencies`."""
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm | nn.GroupNorm)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    return norms | {"pos_frequencies"}


def _block_of(name: str) -> str:
    """Returns the block of a parameter of the DiT or of T5, such as "blocks.3", or "" outside the blocks."""
    block = re.match(r"(blocks|encoder\.block)\.\d+", name)
    return block[0] if block else ""
