"""Measures sampling, the VAE and training on random weights: seconds, memory, and the share of the arithmetic limit."""

import contextlib
import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from tqdm import tqdm

from mochi_tune import assets
from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.lora import LayerSettings, apply_lora, linear_shapes, lora_parameters
from mochi_tune.errors import ConfigError
from mochi_tune.models.device import DTYPES, find_device
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.flops import dit_flops
from mochi_tune.models.latents import check_geometry, latent_shape, num_visual_tokens
from mochi_tune.models.vae import DecoderConfig, EncoderConfig
from mochi_tune.models.vae_streaming import encode
from mochi_tune.parallel.forecast import ATTENTION_BACKWARD, Step, free_bytes
from mochi_tune.parallel.forecast_context import card_here
from mochi_tune.parallel.kernels import attention_by, preferred, time_attention
from mochi_tune.parallel.mesh import Mesh, Videos, choose_layout
from mochi_tune.parallel.modulation import HostModulation
from mochi_tune.parallel.precision import NEEDS, check_precision, shrink_block
from mochi_tune.parallel.recompute import POLICIES
from mochi_tune.recipes.measuring import (
    CPU_TOKENS,
    fastest,
    measure_attention_backward,
    measure_rates,
    most,
    timed,
    total,
)
from mochi_tune.sampling.render import Setup, choose_guide, decoded_frames, prepare_dit
from mochi_tune.sampling.sampler import PRESETS, draw_noise, sample_latents
from mochi_tune.training.loader import Inputs
from mochi_tune.training.memory_plan import MemoryPlan
from mochi_tune.training.objective import velocity_loss
from mochi_tune.training.optim import build_optimizer
from mochi_tune.weights.configs import read_official_config
from mochi_tune.weights.fill import build_random_model

WHAT = ("sample", "decode", "encode", "train")
MODELS = ("mochi_1", "toy", "tiny")
PROMPT_TOKENS = 256
# Tokens of the caption and rank of the adapter of what=train.
CAPTION_TOKENS, TRAIN_RANK = 128, 16
# What each of these settings applies to.
USED_BY = {
    "recompute": ("train",), "precision": ("train",), "lora_rank": ("sample", "train"), "compile": ("sample", "train"),
}  # fmt: skip
# Number of blocks that a CPU measures by default; the result says that it is reduced.
CPU_DEPTH = 1


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        depth: number of blocks; None for all of them on a GPU and CPU_DEPTH on a CPU.
        lora_rank: rank of an adapter on every attention layer; 0 for none, in `train` for TRAIN_RANK.
        compile: None for the default of `sample` and `train`.
        recompute: for `train`, as train.recompute.
        precision: for `train`, as model.precision.
        activations: for `train`, as memory.activations.
        limit_gib: limit of the GPU's memory, to emulate a smaller card; 0 for none.
    """

    what: str
    model: str = "mochi_1"
    num_frames: int = 37
    height: int = 480
    width: int = 848
    dit: str = "resident"
    device: str = "auto"
    dtype: str = "bf16"
    depth: int | None = None
    repeats: int = 3
    lora_rank: int = 0
    compile: bool | None = None
    recompute: str = "auto"
    precision: str = "bf16"
    activations: str = "keep"
    limit_gib: int = 0


def main(bench: Bench) -> dict[str, Any]:
    """Measures, in one process or in one of several; returns the results, which are equal on every rank.

    Raises:
        ConfigError: a value is not possible.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    device = check(bench, num_ranks)
    if bench.depth is None and device.type == "cpu":
        bench = replace(bench, depth=CPU_DEPTH)
    if bench.limit_gib and device.type == "cuda":
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, bench.limit_gib * 2**30 / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())
    stories = {"sample": bench_sample, "decode": bench_decode, "encode": bench_encode, "train": bench_train}
    measure = stories[bench.what]
    figures = measure(bench, device, num_ranks)
    figures["peak_gib"] = most(figures["peak_gib"], num_ranks)
    return {
        **asdict(bench),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processes": num_ranks,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("mochi-tune", "torch", "torchao")},
        **figures,
    }


def check(bench: Bench, num_ranks: int) -> torch.device:
    """Refuses a bench that this number of processes or this device cannot run; returns the device."""
    for key, allowed in (("what", WHAT), ("model", MODELS), ("dtype", tuple(DTYPES))):
        if getattr(bench, key) not in allowed:
            raise ConfigError(f"{key}={getattr(bench, key)} is not possible: use {' or '.join(allowed)}.")
    check_geometry(bench.num_frames, bench.height, bench.width)
    if bench.what in ("encode", "train") and num_ranks > 1:
        raise ConfigError(f"what={bench.what} runs in one process: leave parallel.num_processes out.")
    if bench.recompute not in ("auto", *POLICIES):
        raise ConfigError(f"recompute={bench.recompute} is not possible: use {', '.join(('auto', *POLICIES))}.")
    if bench.precision not in ("bf16", *NEEDS):
        raise ConfigError(f"precision={bench.precision} is not possible: use {', '.join(('bf16', *NEEDS))}.")
    for key, users in USED_BY.items():
        value = getattr(bench, key)
        if bench.what not in users and value != getattr(Bench, key):
            text = str(value).lower() if isinstance(value, bool) else value
            raise ConfigError(
                f"{key}={text} does nothing with what={bench.what}: use what={' or '.join(users)}, or leave it out."
            )
    if bench.dit == "auto":
        raise ConfigError("memory=auto depends on the free memory: name another memory=, and use limit_gib=.")
    if bench.what == "train" and bench.recompute == "none" and bench.activations == "offload":
        raise ConfigError(
            "memory=12gb keeps the inputs of blocks in host memory, and recompute=none keeps all activations of each "
            "block on the device: leave one of them out."
        )
    part = {"encode": "encoder", "decode": "decoder"}.get(bench.what, "dit")
    full_depth = reduced(sizes(bench.model, part), None)[1]
    most_blocks = max(full_depth) if isinstance(full_depth, tuple) else full_depth
    if bench.depth is not None and bench.depth > most_blocks:
        raise ConfigError(
            f"depth={bench.depth} is more than the {part} of model={bench.model} has: use at most {most_blocks}."
        )
    device = find_device(bench.device)
    check_precision(bench.precision, device)
    if bench.limit_gib and device.type != "cuda":
        raise ConfigError(f"limit_gib={bench.limit_gib} limits the memory of a GPU: use device=cuda, or leave it out.")
    return device


def bench_sample(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Measures one step with guidance, with a prompt and a negative prompt of 256 tokens."""
    config, full_depth = reduced(sizes(bench.model, "dit"), bench.depth)
    num_tokens = num_visual_tokens(bench.num_frames, bench.height, bench.width)
    layout = choose_layout(num_ranks, config, Videos(1, num_tokens, True), {"data": 1}, card_here())
    mesh = Mesh(layout, device, 600) if num_ranks > 1 else None
    setup = Setup(
        device, DTYPES[bench.dtype], "offload" if bench.dit == "stream" else bench.dit, mesh, bool(bench.compile)
    )
    with torch.device("meta"):
        adapters = {"adapter": (random_layers(AsymmDiT(config), bench.lora_rank), 1.0, {})} if bench.lora_rank else {}
    dit = prepare_dit(functools.partial(build_random_model, config), adapters, setup)
    prompt, negative_prompt = torch.randn(2, PROMPT_TOKENS, config.t5_feat_dim, dtype=setup.dtype)
    settings = replace(PRESETS["quality"], steps=bench.repeats + 2, guidance=4.0)
    noise = draw_noise(0, bench.num_frames, bench.height, bench.width)
    steps = sample_latents(dit, noise, prompt, negative_prompt, settings, choose_guide(setup))
    first, _ = timed(lambda: next(steps), 1, device, num_warm_up=0)
    seconds, peak = timed(lambda: next(steps), bench.repeats, device, num_warm_up=0)
    # Two passes per step.
    matrix, attention = (2 * flops for flops in dit_flops(config, num_tokens, PROMPT_TOKENS))
    matrix_rate, attention_rate = measure_rates(config, num_tokens, device, setup.dtype, bench.dit == "fp8")
    floor = (matrix / matrix_rate + attention / attention_rate) / num_ranks
    return {
        "full_depth": full_depth,
        "is_reduced": config.depth < full_depth,
        "layout": asdict(layout),
        "num_tokens": num_tokens,
        "seconds_per_step": seconds,
        "first_step_seconds": first,
        "peak_gib": peak,
        **shares(matrix + attention, seconds, floor, num_ranks),
        "matrix_tflops_per_s": round(matrix_rate / 1e12, 3),
        "attention_tflops_per_s": round(attention_rate / 1e12, 3),
    }


def bench_train(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Measures one step of `train`: forward, backward, clipping and update of a LoRA, for one clip and its caption."""
    config, full_depth = reduced(sizes(bench.model, "dit"), bench.depth)
    dtype = DTYPES[bench.dtype]
    num_tokens = num_visual_tokens(bench.num_frames, bench.height, bench.width)
    settings = LayerSettings(bench.lora_rank or TRAIN_RANK, float(bench.lora_rank or TRAIN_RANK))
    is_compiled = device.type == "cuda" if bench.compile is None else bench.compile
    free = free_bytes(device)
    if free is not None and bench.limit_gib:
        free = min(free, bench.limit_gib * 2**30)
    is_streamed, is_offloaded = bench.dit in ("stream", "offload"), bench.activations == "offload"
    kinds = {"precision": bench.precision, "recompute": bench.recompute, "is_compiled": is_compiled}
    policies = Step(config, num_tokens, dtype_bytes=dtype.itemsize, **kinds).policies(free, is_streamed, is_offloaded)
    memory = MemoryPlan(policies, is_compiled, is_streamed, is_offloaded)

    shrink = functools.partial(shrink_block, precision=bench.precision)
    dit = build_random_model(config, "cpu" if memory.is_streamed else device, dtype, shrink)
    prompt, host_modulation = torch.randn(1, CAPTION_TOKENS, config.t5_feat_dim), HostModulation(dit)
    mask, sigma = torch.ones(1, CAPTION_TOKENS, dtype=torch.bool), torch.tensor([0.5])
    ahead = fastest(lambda: host_modulation(sigma, prompt, mask), torch.device("cpu"))
    apply_lora(dit, {name: settings for name in linear_shapes(dit) if ".attn." in name}, seed=0)
    memory.apply(dit, device, functools.partial(tqdm.write, file=sys.stderr))
    step = make_step(dit, host_modulation, prompt, (bench.num_frames, bench.height, bench.width), device)
    shape = config.num_heads, num_tokens + CAPTION_TOKENS, config.hidden_size_x // config.num_heads
    kernels = time_attention(shape, device, dtype) if device.type == "cuda" else {}
    kernel = preferred(kernels, False) if kernels else None
    # Imported here because it would take a second of every start; compiled blocks have imported it already.
    from torch._dynamo.utils import counters

    counters.clear()
    with attention_by(kernel) if kernel else contextlib.nullcontext():
        first, _ = timed(step, 1, device, num_warm_up=0)
        seconds, peak = timed(step, bench.repeats, device, num_warm_up=0)
    rates = (
        *measure_rates(config, num_tokens, device, dtype, bench.precision == "fp8"),
        measure_attention_backward(config, num_tokens, device, dtype),
    )
    work, floor = training_floor(dit_flops(config, num_tokens, CAPTION_TOKENS), rates, policies)
    return {
        "full_depth": full_depth,
        "is_reduced": config.depth < full_depth,
        "num_tokens": num_tokens,
        "lora_rank": settings.rank,
        "compile": is_compiled,
        "attention": kernel,
        "blocks_recomputed_whole": policies.count("block"),
        "blocks_that_keep_attention": policies.count("attention"),
        "seconds_per_step": seconds,
        "first_step_seconds": first,
        # Computed in the background during the previous step.
        "modulation_seconds": round(ahead, 4),
        "num_graphs": counters["stats"]["unique_graphs"],
        "peak_gib": peak,
        **shares(work, seconds, floor, 1),
        "matrix_tflops_per_s": round(rates[0] / 1e12, 3),
        "attention_tflops_per_s": round(rates[1] / 1e12, 3),
        "attention_backward_tflops_per_s": round(rates[2] / 1e12, 3),
    }


def training_floor(
    flops: tuple[float, float], rates: tuple[float, float, float], policies: list[str]
) -> tuple[float, float]:
    """Returns the operations of a training step, and its seconds if nothing but arithmetic took time.

    Args:
        flops: operations of a forward pass, of matrix products and of attention.
        rates: operations per second of matrix products, of attention, and of attention's backward pass.
        policies: the recompute policy of each block.
    """
    (matrix, attention), (matrix_rate, attention_rate, backward_rate) = flops, rates
    # Frozen weights have no gradient: the backward pass of a product is one product, and recomputing it is another.
    num_products = statistics.mean(3 if policy != "none" else 2 for policy in policies)
    num_attentions = statistics.mean(2 if policy == "block" else 1 for policy in policies)
    work = matrix * num_products + attention * (num_attentions + ATTENTION_BACKWARD)
    floor = matrix / matrix_rate * num_products + attention / attention_rate * num_attentions
    return work, floor + ATTENTION_BACKWARD * attention / backward_rate


def make_step(
    dit: AsymmDiT, host_modulation: HostModulation, prompt: Tensor, size: tuple[int, int, int], device: torch.device
) -> Callable[[], None]:
    """Returns a function that runs a training step on random latents: forward, backward, clipping and update.

    Args:
        dit: the DiT with its adapter, prepared for the device.
        host_modulation: computes the modulation in host memory.
        prompt: features of the captions (B, L, D).
        size: frames, height and width of the clips.
        device: of the step.
    """
    parameters, num_clips = lora_parameters(dit), len(prompt)
    optimizer = build_optimizer("adamw", parameters, 2e-4, 0.01, 1.0, device.type)
    noisy, target = torch.randn(2, num_clips, *latent_shape(*size))
    mask, sigma = torch.ones(prompt.shape[:2], dtype=torch.bool), torch.full((num_clips,), 0.5)
    modulation, weight = host_modulation(sigma, prompt, mask), torch.ones(num_clips)
    inputs = Inputs([], sigma, mask, 0, noisy, target, prompt, weight, modulation).moved(lambda x: x.to(device))

    def step() -> None:
        velocity = dit(inputs.noisy, inputs.sigma, inputs.prompt, inputs.mask, inputs.modulation)
        (velocity_loss(velocity, inputs.target) * inputs.weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bench_decode(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Measures decoding one video, chunk by chunk, or split over the ranks."""
    config, full_depth = reduced(sizes(bench.model, "decoder"), bench.depth)
    decoder = build_random_model(config, device, DTYPES[bench.dtype])
    latents = draw_noise(0, bench.num_frames, bench.height, bench.width)
    layout = choose_layout(num_ranks, sizes(bench.model, "dit"), Videos(1, 1, True), {"data": 1}, card_here())
    mesh = Mesh(layout, device, 600) if num_ranks > 1 else None

    def decode() -> None:
        for _ in decoded_frames(decoder, latents, mesh):
            pass

    return vae_figures(bench, decode, config, full_depth, device, num_ranks)


def bench_encode(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Measures encoding one clip as `prepare` does."""
    config, full_depth = reduced(sizes(bench.model, "encoder"), bench.depth)
    encoder = build_random_model(config, device, DTYPES[bench.dtype])
    pixels = torch.rand(1, 3, bench.num_frames, bench.height, bench.width) * 2 - 1
    return vae_figures(bench, lambda: encode(encoder, pixels), config, full_depth, device, num_ranks)


def vae_figures(
    bench: Bench,
    run: Callable[[], object],
    config: EncoderConfig | DecoderConfig,
    full_depth: tuple[int, ...],
    device: torch.device,
    num_ranks: int,
) -> dict[str, Any]:
    """Times a pass of the VAE; its FLOPs are counted while it warms up."""
    # torch only counts its own convolutions; on a CPU, the VAE calls those of oneDNN.
    counted: dict[Any, Any] = {torch.ops.aten.mkldnn_convolution: _convolution_flops}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        run()
    flops = total(counter.get_total_flops(), num_ranks)
    seconds, peak = timed(run, bench.repeats, device, num_warm_up=0)
    matrix_rate, _ = measure_rates(sizes(bench.model, "dit"), CPU_TOKENS, device, DTYPES[bench.dtype])
    return {
        "full_depth": full_depth,
        "is_reduced": config.num_res_blocks != full_depth,
        "latent_shape": list(latent_shape(bench.num_frames, bench.height, bench.width)),
        "seconds": seconds,
        "peak_gib": peak,
        **shares(flops, seconds, flops / matrix_rate / num_ranks, num_ranks),
        "matrix_tflops_per_s": round(matrix_rate / 1e12, 3),
    }


def _convolution_flops(x: list[int], weight: list[int], *_: object, out_shape: list[int], **__: object) -> int:
    return conv_flop_count(x, weight, out_shape)


def shares(flops: float, seconds: float, floor: float, num_ranks: int) -> dict[str, float]:
    """Returns the FLOPs, their rate per device, the minimum time that they need, and its share of the seconds."""
    return {
        "tflop": round(flops / 1e12, 3),
        "tflops_per_s": round(flops / seconds / num_ranks / 1e12, 3),
        "floor_seconds": round(floor, 4),
        "share_of_floor": round(floor / seconds, 3),
    }


def sizes(model: str, part: str) -> Any:
    """Returns the configuration of a part of Mochi 1, or of a shipped model."""
    name = "dit_config.json" if part == "dit" else "vae_config.json"
    return read_official_config(assets.FOLDER / model / name, part)


def reduced(config: Any, depth: int | None) -> tuple[Any, Any]:
    """Returns a configuration with at most `depth` blocks per stage, and its full depth."""
    if isinstance(config, DiTConfig):
        return (replace(config, depth=min(depth, config.depth)) if depth else config), config.depth
    full = config.num_res_blocks
    return replace(config, num_res_blocks=tuple(min(depth or n, n) for n in full)), full


def random_layers(dit: AsymmDiT, lora_rank: int) -> dict[str, LoraLayer]:
    """Returns a random adapter for every attention layer."""
    shapes = {name: shape for name, shape in linear_shapes(dit).items() if ".attn." in name}
    with torch.device("cpu"):
        return {
            name: LoraLayer(
                torch.randn(lora_rank, num_in) * 0.01, torch.randn(num_out, lora_rank) * 0.01, float(lora_rank)
            )
            for name, (num_out, num_in) in shapes.items()
        }
