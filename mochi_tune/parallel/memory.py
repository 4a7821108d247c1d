"""Functions that trade time for memory in rendering: quantization, sharding and offloading of the DiT's blocks."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mochi_tune.models.dit import AsymmDiT
from mochi_tune.parallel.stream import BlockRing, Copier

PRECISIONS = ("int8", "fp8")
# Where the DiT's weights are: on the device; on the device in 8 bits; on the CPU, with two blocks at a time on the
# device; split over the devices that render one video together.
RESIDENCIES = ("resident", *PRECISIONS, "offload", "shard")
# The error for "shard" when each video is rendered by one process.
SHARD_ALONE = (
    "memory.dit=shard splits the weights over the processes of one video, but here each process renders a separate "
    "video: use parallel.num_processes=2 parallel.context=2, or memory.dit=offload"
)


def apply_quantization(
    block: nn.Module, precision: str, read_stored: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None
) -> None:
    """Quantizes the matrices of a block to 8 bits with torchao, which halves the memory of bf16.

    "int8" quantizes only weights. On GPUs that multiply fp8 (Hopper, Ada), "fp8" also quantizes the activations of the
    visual stream row by row, which is faster; the few text tokens are multiplied in the model's dtype. Adapters keep
    their precision.

    Training uses `models.eight_bit`, because it needs a backward pass. It always quantizes activations too, so "fp8"
    would require GPUs that multiply fp8, and videos would change more: by 2.3 % with int8 in a test where torchao's
    change is 1.8 %.

    Args:
        block: a block on its device; the weights of its Linear layers are replaced.
        precision: one of PRECISIONS.
        read_stored: returns the fp8 weight of this name in the checkpoint with its scale, or None. "fp8" uses it
            unchanged, because quantizing it again with scales per row would change its values.
    """
    assert precision in PRECISIONS, precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
    # torchao's inductor settings enable exhaustive tuning: after 110 s the first step was not finished.
    if precision == "int8":
        quantization.quantize_(
            block, quantization.Int8WeightOnlyConfig(set_inductor_config=False), _is_unquantized_linear
        )
        return
    weight = next(block.parameters())
    if weight.is_cuda and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (8, 9):
        dynamic = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow(), set_inductor_config=False
        )
        quantization.quantize_(
            block, dynamic, lambda module, name: _is_unquantized_linear(module, name) and "_x" in name
        )
    quantization.quantize_(
        block, quantization.Float8WeightOnlyConfig(set_inductor_config=False), _is_unquantized_linear
    )
    for name, module in block.named_modules():
        rounded: Any = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear) or not hasattr(rounded, "qdata"):
            continue
        # An adapter wraps its Linear as `base_layer`.
        if (stored := read_stored(f"{name.removesuffix('.base_layer')}.weight")) is not None:
            rounded.qdata.copy_(stored[0])
            rounded.scale.copy_(stored[1])


def apply_sharding(block: nn.Module, mesh: DeviceMesh) -> None:
    """Splits the base weights of a block over the processes (FSDP); they are gathered while the block computes."""
    from torch.distributed.fsdp import fully_shard

    adapters = {parameter for name, parameter in block.named_parameters() if ".lora_" in name}
    # Without a common root FSDP takes each block for one, whose weights it would keep complete after the first pass.
    fully_shard(block, mesh=mesh, ignored_params=adapters, reshard_after_forward=True)


def apply_block_offload(dit: AsymmDiT, device: torch.device, copier: Copier | None = None) -> None:
    """Keeps the blocks' weights on the CPU; those of the next block are copied to the device while a block computes.

    The device has two buffers for blocks. Adapters and all modules outside the blocks are moved to the device.
    Training uses `apply_streaming`, whose blocks also compute backward passes.

    Args:
        dit: the frozen model on the CPU, with its adapters.
        device: the device that computes.
        copier: copies the weights; None: the default of the device.
    """
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    dit.pos_frequencies.data = dit.pos_frequencies.data.to(device)
    ring = BlockRing(list(dit.blocks), device, copier, num_buffers=2)
    for number, block in enumerate(dit.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: ring.enter(number))


def _is_unquantized_linear(module: nn.Module, name: str) -> bool:
    """Whether a module is a Linear of the base that is not quantized yet."""
    return isinstance(module, nn.Linear) and ".lora_" not in name and type(module.weight.data) is Tensor
