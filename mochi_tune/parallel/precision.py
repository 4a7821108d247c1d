"""The precision of the frozen base in training: its large matrices in 8 bits, or in 4 bits for the smallest GPUs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import ConfigError
from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock
from mochi_tune.models.eight_bit import EIGHT_BIT, EightBitLinear
from mochi_tune.parallel.modulation import apply_host_modulation

# Matrices of the visual stream: 5.4 of the 7.2 billion parameters besides modulation. The text stream, which has few
# tokens, keeps its dtype.
LARGE_LAYERS = ("attn.qkv_x", "attn.proj_x", "mlp_x.w1", "mlp_x.w2")
# Minimum compute capability of each precision.
NEEDS = {"fp8": (8, 9), "int8": (8, 0), "nf4": (7, 5)}


def check_precision(precision: str, device: torch.device) -> None:
    """Refuses a precision that the GPU does not support; a CPU emulates all of them.

    Raises:
        ConfigError: the GPU's compute capability is too low; names the precisions that it supports.
    """
    if precision == "bf16" or device.type != "cuda":
        return
    have = torch.cuda.get_device_capability(device)
    if have < NEEDS[precision]:
        possible = ["bf16", *(name for name, need in NEEDS.items() if have >= need)]
        raise ConfigError(
            f"model.precision={precision} needs a GPU of compute capability {'.'.join(map(str, NEEDS[precision]))}, "
            f"but {torch.cuda.get_device_name(device)} has {'.'.join(map(str, have))}: use {' or '.join(possible)}."
        )


def shrink_block(
    dit: AsymmDiT,
    block: nn.Module,
    precision: str,
    read_fp8: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None,
    has_host_modulation: bool = True,
) -> None:
    """Makes a block small as soon as it is read: modulation goes to host memory, large matrices to fewer bits.

    Args:
        dit: the model that is being loaded.
        block: one of its blocks, on its device.
        precision: as in `apply_precision`.
        read_fp8: `WeightsFolder.read_fp8` of the base.
        has_host_modulation: whether modulation is computed in host memory.
    """
    assert isinstance(block, AsymmetricJointBlock)
    if has_host_modulation:
        apply_host_modulation(block)
    number = next(i for i, each in enumerate(dit.blocks) if each is block)
    apply_precision(block, precision, lambda name: read_fp8(f"blocks.{number}.{name}"))


def apply_precision(
    block: nn.Module, precision: str, read_stored: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None
) -> None:
    """Quantizes the large matrices of a block. Adapters must be added afterwards.

    Args:
        block: a block of the DiT, on its device.
        precision: "fp8", "int8", "nf4", or "bf16", which changes nothing.
        read_stored: returns the fp8 weight of this name in the checkpoint with its scale, or None.
    """
    if precision == "bf16":
        return
    for name in LARGE_LAYERS:
        linear = block.get_submodule(name)
        assert type(linear) is nn.Linear, linear
        if precision in EIGHT_BIT:
            stored = read_stored(f"{name}.weight") if precision == "fp8" else None
            block.set_submodule(name, EightBitLinear(linear, precision, stored))
        else:
            block.set_submodule(name, _four_bit(linear, precision))


def _four_bit(linear: nn.Linear, precision: str) -> nn.Module:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made = Linear4bit(
        linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=linear.weight.dtype,
        quant_type=precision, device="meta",
    )  # fmt: skip
    weight: Any = Params4bit
    made.weight = weight(linear.weight.data, requires_grad=False, quant_type=precision)
    made.bias = linear.bias
    # On a CPU that multiplies bf16, a pass without gradients would permanently convert the weight to a layout without
    # a backward pass.
    made.support_avx512bf16_for_cpu = False
    return made.to(linear.weight.device)
