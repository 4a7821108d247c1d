"""Trading time for memory, as functions over a model that knows nothing of it."""

import functools
import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock


def apply_activation_checkpointing(dit: nn.Module) -> None:
    """Keeps only each block's input for the backward pass and computes its inside again; gradients stay the same."""
    for block in dit.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


class TabulatedLinear(nn.Module):
    """Stands in for a Linear of few inputs, known beforehand: keeps their outputs, and its weights on the CPU."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__()
        # In a tuple, so that it is no part of the model: not moved with it, sharded or quantised.
        self.linear = (linear.to("cpu"),)
        self.device = device
        self.inputs = self.outputs = torch.empty(0)

    def tabulate(self, inputs: Tensor) -> None:
        """Takes the inputs (known, D) that will come; the weights visit the device for this."""
        (linear,) = self.linear
        self.inputs = inputs
        self.outputs = F.linear(inputs, linear.weight.to(self.device), linear.bias.to(self.device))

    def forward(self, c: Tensor) -> Tensor:
        """Returns the outputs (B, out) of the known inputs that c (B, D) are nearest to: rounding may differ."""
        distances = (c[:, None] - self.inputs).abs().sum(-1)  # (B, known)
        return self.outputs[distances.argmin(1)]


def fold_modulation(block: AsymmetricJointBlock, device: torch.device) -> None:
    """Moves a block's modulation layers, a quarter of the DiT, to the CPU; `tabulate_modulation` gives what they give.

    Args:
        block: with its weights.
        device: where it computes.
    """
    block.mod_x = TabulatedLinear(block.mod_x, device)
    block.mod_y = TabulatedLinear(block.mod_y, device)


@torch.no_grad()
def tabulate_modulation(dit: AsymmDiT, conditions: Tensor) -> None:
    """Prepares a folded model for the conditions (known, D) of a rendering, all that will come."""
    for module in dit.modules():
        if isinstance(module, TabulatedLinear):
            module.tabulate(conditions)


@torch.no_grad()
def known_conditions(dit: AsymmDiT, sigmas: Sequence[float], prompts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Returns the conditions (known, D) of every sigma with every prompt, embeddings (1, L, D) and mask (1, L)."""
    device = dit.pos_frequencies.device
    levels = torch.tensor(list(dict.fromkeys(sigmas)), device=device)
    rows = [
        dit.condition(levels, embeds.to(device).expand(len(levels), -1, -1), mask.expand(len(levels), -1))
        for embeds, mask in prompts
    ]
    return torch.cat(rows)


PRECISIONS = ("int8", "fp8")
# Where the DiT's weights are: on the device; there in 8 bits; on the CPU, two blocks at a time on the device; in
# shares on the devices that make one video together.
DIT_PLACES = ("resident", *PRECISIONS, "offload", "shard")


def quantize_block(block: nn.Module, precision: str) -> None:
    """Rounds the matrices of a block to 8 bits, by torchao: half the memory of bf16.

    "fp8" rounds the visual stream's activations too where the GPU multiplies fp8 (Hopper, Ada), row by row, and is
    faster there; the few text tokens', and elsewhere and with "int8" all, are multiplied as they are. Adapters stay.

    Args:
        block: on its device; its Linear layers' weights are replaced.
        precision: one of PRECISIONS.
    """
    assert precision in PRECISIONS, precision
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao import quantization
    if precision == "int8":
        quantization.quantize_(block, quantization.Int8WeightOnlyConfig())
        return
    weight = next(block.parameters())
    if weight.is_cuda and weight.dtype == torch.bfloat16 and torch.cuda.get_device_capability(weight.device) >= (8, 9):
        dynamic = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(block, dynamic, lambda module, name: isinstance(module, nn.Linear) and "_x" in name)
    alone = quantization.Float8WeightOnlyConfig()
    is_left = lambda module, _: isinstance(module, nn.Linear) and type(module.weight.data) is Tensor  # noqa: E731
    quantization.quantize_(block, alone, is_left)


def shard_block(block: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank a share of a block's weights (FSDP), which are whole while the block computes; adapters stay."""
    from torch.distributed.fsdp import fully_shard

    adapters = {parameter for name, parameter in block.named_parameters() if ".lora_" in name}
    fully_shard(block, mesh=mesh, ignored_params=adapters)


def apply_block_offload(dit: AsymmDiT, device: torch.device) -> None:
    """Keeps the blocks' weights on the CPU; each is on its way to the device while the block before it computes.

    At most two blocks are on the device. Adapters, and all that is outside of the blocks, are moved there for good.

    Args:
        dit: on the CPU, frozen, with its adapters.
        device: where it computes.
    """
    for name, child in dit.named_children():
        if name != "blocks":
            child.to(device)
    dit.pos_frequencies.data = dit.pos_frequencies.data.to(device)
    _Ferry(list(dit.blocks), device)


class _Ferry:
    """Brings blocks to the device and sends them home, by hooks of the blocks."""

    def __init__(self, blocks: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.home: list[list[tuple[nn.Parameter, Tensor]]] = []
        self.travelling: dict[int, list[Tensor]] = {}
        for i, block in enumerate(blocks):
            self.home.append([])
            for name, parameter in block.named_parameters():
                if ".lora_" in name:
                    parameter.data = parameter.data.to(device)
                    continue
                if self.stream is not None:
                    # Only from pinned memory does a copy run beside the arithmetic.
                    parameter.data = parameter.data.pin_memory()
                self.home[i].append((parameter, parameter.data))
            block.register_forward_pre_hook(functools.partial(self._arrive, i))
            block.register_forward_hook(functools.partial(self._leave, i))

    def _send(self, i: int) -> None:
        with torch.cuda.stream(self.stream):
            self.travelling[i] = [data.to(self.device, non_blocking=True, copy=True) for _, data in self.home[i]]

    def _arrive(self, i: int, *_) -> None:
        if i not in self.travelling:
            self._send(i)
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
        for (parameter, _), data in zip(self.home[i], self.travelling.pop(i), strict=True):
            if self.stream is not None:
                # Its memory may be used again only when the block has computed.
                data.record_stream(torch.cuda.current_stream())
            parameter.data = data
        self._send((i + 1) % len(self.home))

    def _leave(self, i: int, *_) -> None:
        for parameter, data in self.home[i]:
            parameter.data = data
