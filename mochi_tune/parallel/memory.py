"""Trading time for memory, as functions over a model that knows nothing of it."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mochi_tune.models.dit import AsymmDiT

PRECISIONS = ("int8", "fp8")
# Where the DiT's weights are: on the device; there in 8 bits; on the CPU, with two blocks at a time on the device; a
# share of them on each of the devices that render one video together.
RESIDENCIES = ("resident", *PRECISIONS, "offload", "shard")
# Why "shard" is refused where a video is rendered by one process.
SHARD_ALONE = (
    "memory.dit=shard splits the weights over the processes of one video, and here each has a video of its own: use "
    "parallel.num_processes=2 parallel.context=2, or memory.dit=offload"
)


def apply_quantization(
    block: nn.Module, precision: str, read_stored: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None
) -> None:
    """Rounds the matrices of a block to 8 bits, by torchao: half the memory of bf16.

    "int8" rounds weights alone. "fp8" rounds the visual stream's activations too, row by row, where the GPU multiplies
    fp8 (Hopper, Ada), and is faster there; the few text tokens are multiplied in the model's dtype. Adapters keep
    their precision.

    `models.eight_bit`, which training needs for its backward pass, rounds the factors of its weights, too. Here that
    would take GPUs that multiply fp8 for "fp8", and change a video more: by 2.3 % with int8 in the test where this
    does by 1.8 %.

    Args:
        block: on its device; its Linear layers' weights are replaced.
        precision: one of PRECISIONS.
        read_stored: returns the weight of this name as the file has it in fp8, with its scale, or None: "fp8" takes
            those numbers as they are, which rounding again by each row's maximum would move.
    """
    assert precision in PRECISIONS, precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
    # torchao would have the compiler tune every kernel in all directions: the first step is not there after 110 s.
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
        # A layer with an adapter has it around its Linear.
        if (stored := read_stored(f"{name.removesuffix('.base_layer')}.weight")) is not None:
            rounded.qdata.copy_(stored[0])
            rounded.scale.copy_(stored[1])


def apply_sharding(block: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each process a share of a block's weights (FSDP), gathered while the block computes; adapters stay."""
    from torch.distributed.fsdp import fully_shard

    adapters = {parameter for name, parameter in block.named_parameters() if ".lora_" in name}
    fully_shard(block, mesh=mesh, ignored_params=adapters)


def apply_block_offload(dit: AsymmDiT, device: torch.device) -> None:
    """Keeps the blocks' weights on the CPU; each block's are copied while the block before it computes.

    At most two blocks are on the device. Adapters, and all modules outside of the blocks, are moved there for good.

    Args:
        dit: on the CPU, frozen, with its adapters.
        device: where it computes.
    """
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    dit.pos_frequencies.data = dit.pos_frequencies.data.to(device)
    _BlockOffloader(list(dit.blocks), device)


class _BlockOffloader:
    """Copies blocks to the device before they compute and drops the copies after it, by hooks of the blocks."""

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Of each block, its parameters and their data on the CPU.
        self.cpu_data: list[list[tuple[nn.Parameter, Tensor]]] = []
        # Copies that are under way, by the number of the block.
        self.copies: dict[int, list[Tensor]] = {}
        for i, block in enumerate(blocks):
            self.cpu_data.append([])
            for name, parameter in block.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(device)
                    continue
                if self.stream is not None:
                    # Only from pinned memory does a copy run beside the arithmetic.
                    parameter.data = parameter.data.pin_memory()
                self.cpu_data[i].append((parameter, parameter.data))
            block.register_forward_pre_hook(functools.partial(self._load, i))
            block.register_forward_hook(functools.partial(self._unload, i))

    def _start_copy(self, i: int) -> None:
        with torch.cuda.stream(self.stream):
            self.copies[i] = [data.to(self.device, non_blocking=True, copy=True) for _, data in self.cpu_data[i]]

    def _load(self, i: int, *_) -> None:
        """Gives block i its copy, and starts that of the next block."""
        if i not in self.copies:
            self._start_copy(i)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        for (parameter, _), data in zip(self.cpu_data[i], self.copies.pop(i), strict=True):
            if self.stream is not None:
                # Its memory may be used again only when the block has computed.
                data.record_stream(torch.cuda.current_stream())
            parameter.data = data
        self._start_copy((i + 1) % len(self.cpu_data))

    def _unload(self, i: int, *_) -> None:
        for parameter, data in self.cpu_data[i]:
            parameter.data = data


def _is_unquantized_linear(module: nn.Module, name: str) -> bool:
    """Whether a module is a Linear of the base in its full precision."""
    return isinstance(module, nn.Linear) and ".lora_" not in name and type(module.weight.data) is Tensor
