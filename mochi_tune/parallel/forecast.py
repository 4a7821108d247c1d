"""Estimates the GPU memory, by purpose, and the seconds of a run from sizes alone; `sample` has `forecast_sampling`.

Memory is the sum of all that is held. Time is the arithmetic at the GPU's rates, plus the bytes that operations between
matrix products move at its bandwidth. The constants are fitted to the rows of docs/benchmarks.md that were measured
at full size on an H200; tests/parallel/test_forecast.py requires that the estimate is within 10 % of each row.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.eight_bit import EIGHT_BIT
from mochi_tune.models.flops import dit_flops
from mochi_tune.parallel.precision import LARGE_LAYERS
from mochi_tune.parallel.stream import NUM_BUFFERS

GIB = 2**30
LARGE_WEIGHTS = tuple(f"{name}.weight" for name in LARGE_LAYERS)
# Peak bytes of one block per visual token and unit of the visual width: forward and backward in training, compiled or
# not, and one forward pass of the sampler. The constants down to ROUNDED_BYTES have the same unit.
INSIDE_BYTES = {"compiled": 50, "eager": 83, "sample": 24}
# Bytes that a block which recomputes nothing keeps for its backward pass.
KEPT_BYTES = {"compiled": 31, "eager": 83}
# Safety factor of `auto` on KEPT_BYTES: an adapter with dropout also keeps the input of the dropout.
KEPT_MARGIN = 1.1
# Memory traffic between the matrix products of one block: in training that keeps everything or is not compiled, and in
# a pass of the sampler.
MOVED_BYTES = {"compiled": 450, "eager": 3250, "sample": 130}
# Additional memory traffic of compiled blocks: for recomputing, and for rounding the factors of products to 8 bits.
RECOMPUTED_BYTES, ROUNDED_BYTES = 170, 170
# Bytes of torch, its kernels and the embedders; bytes left free for fragmentation and other programs.
BASE_BYTES, SPARE_BYTES = GIB // 4, GIB
# Arithmetic of attention's backward pass relative to its forward pass: 5 products, with the recomputed scores, to 2.
ATTENTION_BACKWARD = 2.5
# Bytes of the encoder per pixel for any number of frames, and for each frame.
ENCODER_PIXEL_BYTES, ENCODER_FRAME_BYTES = 1850, 154
# FLOPs per pixel of one frame, and the rate that the encoder reaches relative to that of matrix products.
ENCODER_PIXEL_FLOPS, ENCODER_SHARE = 63.9e12 / (37 * 480 * 848), 0.25
T5_PARAMETERS, ENCODER_PARAMETERS = 4.76e9, 0.098e9
# The part of T5's parameters that is never in 8 bits.
T5_EMBEDDING = 32128 * 4096
# State of each `train.optimizer`, in fp32 numbers per trained number.
OPTIMIZER_STATES = {"adamw": 2, "schedule_free": 2, "prodigy": 4, "muon": 1, "adamw_8bit": 0.57, "adafactor": 0.07}


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        gib: memory in GiB, as its driver reports it.
        matrix: dense bf16 FLOPs per second, from its data sheet.
        bandwidth: bytes per second to and from its memory, from its data sheet.
        host: approximate bytes per second to and from the host.
        has_fp8: whether it multiplies fp8, at twice the rate of bf16.
        nvlink: bytes per second to the other GPUs of its machine, each way; 0: there is no NVLink, transfers use the
            host.
    """

    gib: float
    matrix: float
    bandwidth: float
    host: float
    has_fp8: bool = False
    nvlink: float = 0.0

    @property
    def link(self) -> float:
        """Bytes per second to the other GPUs of its machine."""
        return self.nvlink or self.host


# Source: the makers' data sheets. Only the H200 was measured.
CARDS = {
    "h200": Card(139.8, 989e12, 4.8e12, 50e9, True, 450e9),
    "h100": Card(79.2, 989e12, 3.35e12, 50e9, True, 450e9),
    "a100": Card(79.3, 312e12, 2.04e12, 25e9, nvlink=300e9),
    "a100-40": Card(39.4, 312e12, 1.56e12, 25e9, nvlink=300e9),
    "l40s": Card(44.4, 362e12, 0.864e12, 25e9, True),
    "a6000": Card(47.5, 155e12, 0.768e12, 25e9),
    "5090": Card(31.4, 209e12, 1.79e12, 50e9, True),
    "4090": Card(23.6, 165e12, 1.01e12, 25e9, True),
    "3090": Card(23.7, 71e12, 0.936e12, 25e9),
    "4080": Card(15.6, 97e12, 0.717e12, 25e9, True),
    "3060": Card(11.8, 25e12, 0.36e12, 25e9),
}
# `memory.dit` of `sample` for each preset of memory=, the fastest first.
SAMPLING = {"80gb": "resident", "24gb": "fp8", "16gb": "offload", "12gb": "offload"}
# Fractions of the data sheet's rate that matrix products and attention, forward and backward, reach on an H200.
MATRIX_SHARE, ATTENTION_SHARE, BACKWARD_SHARE = 0.77, 0.58, 0.53


@dataclass(frozen=True)
class Step:
    """A training step of one micro-batch on one device.

    Attributes:
        config: sizes of the DiT.
        num_tokens: visual tokens of one process.
        text_tokens: text tokens of the caption.
        adapter_bytes: bytes of the adapter's fp32 parameters.
        dtype_bytes: bytes of one number of the DiT.
        precision: precision of the DiT's large matrices, see `parallel.precision`.
        recompute: `train.recompute`.
        is_compiled: whether the blocks are compiled.
        holds_modulation: whether the modulation layers are on the device; in `train` only with ZeRO-3.
        num_shards: number of processes over which ZeRO-3 splits the weights.
        may_stream: whether the blocks' weights may be in host memory.
        split: number of processes that share the tokens, as (heads, ring).
        num_clips: clips of the micro-batch. Together they have `num_tokens`; each attends to itself.
        needs_exact: whether the base's matrices must not be rounded, because a DoRA measures their rows.
        optimizer: `train.optimizer`.
        has_average: whether there is a moving average of the adapter.
        weights: bytes of the DiT's weights, by purpose.
    """

    config: DiTConfig
    num_tokens: int
    adapter_bytes: int = 0
    text_tokens: int = 128
    dtype_bytes: int = 2
    precision: str = "bf16"
    recompute: str = "auto"
    is_compiled: bool = True
    holds_modulation: bool = False
    num_shards: int = 1
    may_stream: bool = True
    split: tuple[int, int] = (1, 1)
    num_clips: int = 1
    needs_exact: bool = False
    optimizer: str = "adamw"
    has_average: bool = False
    weights: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", weight_bytes(self.config, self.dtype_bytes, self.precision))

    def policies(self, free: int | None, is_streamed: bool = False, is_offloaded: bool = False) -> list[str]:
        """Returns the recompute policy of each block, one of `parallel.recompute.POLICIES`.

        Args:
            free: free bytes of the device before the weights are loaded; None: unlimited.
            is_streamed: whether the blocks' weights are in host memory.
            is_offloaded: whether the blocks' inputs are in host memory.
        """
        depth = self.config.depth
        if self.recompute != "auto":
            return [self.recompute] * depth
        if self.num_shards > 1:
            # ZeRO-3 gathers weights inside a block, so selective checkpointing would count operations wrongly.
            return ["block"] * depth
        if free is None:
            return ["attention"] * depth
        left = free - sum(self.held(["block"] * depth, is_streamed, is_offloaded).values()) - SPARE_BYTES
        num_kept = min(depth, max(0, int(left // self._attention_bytes)))
        policies = ["block"] * (depth - num_kept) + ["attention"] * num_kept
        # Streamed weights are no longer on the device in the backward pass, and only inputs can be offloaded.
        if num_kept < depth or is_streamed or is_offloaded or not self.is_compiled:
            return policies
        left -= depth * self._attention_bytes
        num_whole = min(depth, int(left // (KEPT_MARGIN * self._kept_bytes - self._attention_bytes)))
        # A third policy needs another compiled graph, which does not pay for a few blocks.
        return policies[num_whole:] + ["none"] * num_whole if num_whole >= depth / 4 else policies

    def held(self, policies: Sequence[str], is_streamed: bool = False, is_offloaded: bool = False) -> dict[str, int]:
        """Returns the bytes on the device at the step's peak, by purpose."""
        weights = bytes_on_device(self.weights, self.config, is_streamed)
        weights += self.weights["modulation"] if self.holds_modulation else 0
        one_input = 2 * self.num_tokens * self.config.hidden_size_x
        kind, numbers = "compiled" if self.is_compiled else "eager", self.num_tokens * self.config.hidden_size_x
        inside = INSIDE_BYTES[kind] * numbers
        # Of offloaded inputs, two are on the device at a time, on their way to host memory or back.
        kept = one_input * (min(2, len(policies)) if is_offloaded else len(policies))
        kept += self._attention_bytes * policies.count("attention") + self._kept_bytes * policies.count("none")
        return {
            "weights": weights // self.num_shards,
            # Parameters, gradients, the state of the optimizer and the average.
            "adapter": int((2 + OPTIMIZER_STATES[self.optimizer] + self.has_average) * self.adapter_bytes),
            "kept": kept,
            "largest block": inside,
            "other": BASE_BYTES,
        }

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint: adapter, optimizer state, and the average, which "schedule_free" always has."""
        has_average = self.has_average or self.optimizer == "schedule_free"
        return int((1 + OPTIMIZER_STATES[self.optimizer] + has_average) * self.adapter_bytes)

    def host_bytes(self, is_streamed: bool, is_offloaded: bool) -> int:
        """Returns the bytes of pinned host memory for the blocks' weights and for their inputs.

        For each tensor, torch rounds pinned memory up to a power of two.
        Source: pytorch/pytorch@v2.11.0 aten/src/ATen/core/CachingHostAllocator.h (allocate).
        """
        sizes = parameter_bytes(self.config, self.dtype_bytes, self.precision)
        tensors = [size for part, size in sizes if part == "blocks"] if is_streamed else []
        one_input = self.dtype_bytes * self.num_tokens * self.config.hidden_size_x
        tensors += [one_input] * self.config.depth if is_offloaded else []
        return sum(1 << (math.ceil(size) - 1).bit_length() for size in tensors)

    @property
    def _attention_bytes(self) -> int:
        """Bytes kept of one block's attention: the output in 16 bits and the log-sum-exp in 32."""
        return self.num_tokens * (2 * self.config.hidden_size_x + 4 * self.config.num_heads)

    @property
    def _kept_bytes(self) -> int:
        """Bytes kept of one block that recomputes nothing, besides its input."""
        return KEPT_BYTES["compiled" if self.is_compiled else "eager"] * self.num_tokens * self.config.hidden_size_x

    def seconds(self, policies: Sequence[str], card: Card, is_streamed: bool = False) -> float:
        """Returns the seconds of the step's forward and backward pass; the optimizer's update is negligible."""
        matrix, _ = dit_flops(self.config, self.num_tokens, self.text_tokens)
        # The tokens of a process attend to those of all processes, but only within their clip.
        num_parts = self.num_clips / (self.split[0] * self.split[1])
        attention = dit_flops(self.config, round(self.num_tokens / num_parts), self.text_tokens)[1] * num_parts
        # Frozen weights have no gradient, so the backward pass has one product per product, and recomputing another.
        products = 3 - policies.count("none") / len(policies)
        attentions = 1 + policies.count("block") / len(policies)
        rate = card.matrix * MATRIX_SHARE
        # int8 products, for which torch calls cuBLAS, are not faster than bf16.
        rate *= 2 if self.precision == "fp8" and card.has_fp8 else 1
        moved: float = MOVED_BYTES["compiled" if self.is_compiled else "eager"]
        if self.is_compiled:
            moved += RECOMPUTED_BYTES * (1 - policies.count("none") / len(policies))
            moved += ROUNDED_BYTES if self.precision in EIGHT_BIT else 0
        moved *= self.num_tokens * self.config.hidden_size_x * self.config.depth
        computed = (
            matrix * products / rate
            + attention * attentions / (card.matrix * ATTENTION_SHARE)
            + attention * ATTENTION_BACKWARD / (card.matrix * BACKWARD_SHARE)
            + moved / card.bandwidth
        )
        # Streamed weights are copied once forward and once backward, in parallel with the arithmetic.
        return max(computed, 2 * self.weights["blocks"] / card.host) if is_streamed else computed


def encoding_held(num_frames: int, height: int, width: int, dtype_bytes: int = 2) -> dict[str, int]:
    """Returns the bytes on the device while a clip is encoded."""
    held = int((ENCODER_PIXEL_BYTES + ENCODER_FRAME_BYTES * num_frames) * height * width * dtype_bytes / 2)
    return {"weights": int(ENCODER_PARAMETERS * dtype_bytes), "largest block": held, "other": BASE_BYTES}


def encoding_seconds(num_frames: int, height: int, width: int, card: Card) -> float:
    """Returns the seconds of encoding a clip in bf16."""
    return ENCODER_PIXEL_FLOPS * num_frames * height * width / (card.matrix * MATRIX_SHARE * ENCODER_SHARE)


def text_held(dtype_bytes: int) -> dict[str, int]:
    """Returns the bytes on the device while T5-XXL encodes one prompt."""
    embedding = T5_EMBEDDING if dtype_bytes == 1 else 0
    return {"weights": int(T5_PARAMETERS * dtype_bytes + embedding), "other": BASE_BYTES}


def fits(held: dict[str, int], free: int) -> bool:
    """Whether a device with `free` bytes can hold this with SPARE_BYTES left."""
    return sum(held.values()) + SPARE_BYTES <= free


def free_bytes(device: torch.device) -> int | None:
    """Returns the smallest free GPU memory of all processes, in bytes; None for a CPU, whose memory is not counted.

    Processes that share the tokens of a sample communicate while they recompute, so all must use the same policies.
    """
    if device.type != "cuda":
        return None
    free = torch.tensor(torch.cuda.mem_get_info(device)[0], device=device)
    if dist.is_initialized():
        dist.all_reduce(free, op=dist.ReduceOp.MIN)
    return int(free.item())


def weight_bytes(config: DiTConfig, dtype_bytes: int, precision: str = "bf16") -> dict[str, int]:
    """Returns the bytes of a DiT's "blocks", of their "modulation", and of the "rest"; see `parameter_bytes`."""
    sizes = {"blocks": 0.0, "modulation": 0.0, "rest": 0.0}
    for part, size in parameter_bytes(config, dtype_bytes, precision):
        sizes[part] += size
    return {part: int(size) for part, size in sizes.items()}


@functools.cache
def parameter_bytes(config: DiTConfig, dtype_bytes: int, precision: str) -> tuple[tuple[str, float], ...]:
    """Returns the part, as in `weight_bytes`, and the bytes of each parameter of a DiT.

    Args:
        config: sizes of the DiT.
        dtype_bytes: bytes of one number.
        precision: precision of the large matrices, see `parallel.precision`.
    """
    with torch.device("meta"):
        dit = AsymmDiT(config)
    rounded, sizes = {"fp8": 1.0, "int8": 1.0, "nf4": 0.57}.get(precision, dtype_bytes), []
    for name, parameter in dit.named_parameters():
        part = "rest" if not name.startswith("blocks.") else "modulation" if ".mod_" in name else "blocks"
        sizes.append((part, parameter.numel() * (rounded if name.endswith(LARGE_WEIGHTS) else dtype_bytes)))
    return tuple(sizes)


def bytes_on_device(weights: dict[str, int], config: DiTConfig, is_streamed: bool) -> int:
    """Returns the bytes of `weights` on the device: not the modulation, and only the buffers of streamed blocks."""
    blocks = weights["blocks"] * min(NUM_BUFFERS, config.depth) // config.depth if is_streamed else weights["blocks"]
    return blocks + weights["rest"]


def known_card(name: str) -> Card | None:
    """Returns the GPU whose key in CARDS is contained in the driver's name of it, None if there is none."""
    words = name.lower().replace(" ", "")
    # The longest key is the most specific: the driver's name contains the memory size of an A100.
    fitting = [key for key in CARDS if all(part in words for part in key.split("-"))]
    return CARDS[max(fitting, key=len)] if fitting else None


def short_seconds(seconds: float) -> str:
    """Formats seconds without an exponent."""
    if seconds < 0.0001:
        return "under 0.0001 s"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s" if seconds >= 0.01 else f"{seconds:.4f} s"


def in_words(seconds: float) -> str:
    """Formats a duration in hours, minutes or seconds, of at least 1 s."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} hours"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{max(seconds, 1):.0f} s"
