"""Measures sampling, the VAE and training on random weights: seconds, memory, and how near the arithmetic they are."""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from mochi_tune import assets
from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.lora import LayerSettings, apply_lora, linear_shapes, lora_parameters
from mochi_tune.errors import ConfigError
from mochi_tune.models.device import DTYPES, find_device, peak_gib, reset_peak, synchronize
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.flops import dit_flops
from mochi_tune.models.latents import TOKEN_PIXELS, check_geometry, latent_shape, num_latent_frames
from mochi_tune.models.layers import hidden_width
from mochi_tune.models.vae import DecoderConfig, EncoderConfig
from mochi_tune.models.vae_streaming import encode
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.parallel.mesh import Mesh, check_one_video, choose_layout
from mochi_tune.parallel.precision import NEEDS, apply_precision, check_precision
from mochi_tune.parallel.recompute import POLICIES, apply_activation_checkpointing
from mochi_tune.sampling.render import ATTENTION_KERNELS, Setup, choose_guide, decoded_frames, prepare_dit
from mochi_tune.sampling.sampler import PRESETS, draw_noise, sample_latents
from mochi_tune.training.memory_plan import free_bytes, recompute_policies, weight_bytes
from mochi_tune.training.objective import velocity_loss
from mochi_tune.training.optim import build_optimizer
from mochi_tune.weights.configs import read_official_config
from mochi_tune.weights.fill import build_random_model

WHAT = ("sample", "decode", "encode", "train")
MODELS = ("mochi_1", "toy", "tiny")
PROMPT_TOKENS = 256
# Of a training's caption, and the rank of its adapter.
CAPTION_TOKENS, TRAIN_RANK = 128, 16
# Products of attention's backward pass, of which it computes the scores again, over the two of its forward pass.
ATTENTION_BACKWARD = 2.5
# What a CPU does of the model, of which it says so.
CPU_DEPTH = 1
# Seconds that each rate is measured for, and the most tokens that it is measured with on a CPU.
RATE_SECONDS = 1.0
CPU_TOKENS = 4096


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        depth: blocks; None is every block on a GPU and CPU_DEPTH of them on a CPU.
        lora_rank: of an adapter on every attention layer; 0 is none, for `train` TRAIN_RANK.
        compile: None is what `sample` and `train` do by default.
        recompute: of `train`, as train.recompute.
        precision: of `train`, as model.precision.
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


def main(bench: Bench) -> dict[str, Any]:
    """Measures, in one process or as one of several; returns the figures, the same at every rank.

    Raises:
        ConfigError: a value that is not possible.
    """
    num_ranks = dist.get_world_size() if dist.is_initialized() else 1
    device = check(bench, num_ranks)
    if bench.depth is None and device.type == "cpu":
        bench = replace(bench, depth=CPU_DEPTH)
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
    """Refuses what cannot be measured by so many processes; returns the device."""
    for key, allowed in (("what", WHAT), ("model", MODELS), ("dtype", tuple(DTYPES))):
        if getattr(bench, key) not in allowed:
            raise ConfigError(f"{key}={getattr(bench, key)} is not possible: use {' or '.join(allowed)}.")
    check_geometry(bench.num_frames, bench.height, bench.width)
    if bench.what in ("encode", "train") and num_ranks > 1:
        raise ConfigError(f"what={bench.what} runs in one process: leave parallel.num_processes out.")
    if bench.recompute not in ("auto", *POLICIES):
        raise ConfigError(f"recompute={bench.recompute} is not possible: use {', '.join(('auto', *POLICIES))}.")
    check_one_video(num_ranks, sizes(bench.model, "dit").num_heads)
    if bench.precision not in ("bf16", *NEEDS):
        raise ConfigError(f"precision={bench.precision} is not possible: use {', '.join(('bf16', *NEEDS))}.")
    device = find_device(bench.device)
    check_precision(bench.precision, device)
    return device


def bench_sample(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """One step with guidance, of a prompt and a negative prompt of 256 tokens."""
    config, full_depth = reduced(sizes(bench.model, "dit"), bench.depth)
    num_tokens = num_visual_tokens(bench)
    layout = choose_layout(num_ranks, config, 1, num_tokens, True, {"data": 1})
    mesh = Mesh(layout, device, 600) if num_ranks > 1 else None
    setup = Setup(device, DTYPES[bench.dtype], bench.dit, mesh, bool(bench.compile))
    with torch.device("meta"):
        adapters = {"adapter": (random_layers(AsymmDiT(config), bench.lora_rank), 1.0)} if bench.lora_rank else {}
    dit = prepare_dit(functools.partial(build_random_model, config), adapters, setup)
    prompt, negative_prompt = torch.randn(2, PROMPT_TOKENS, config.t5_feat_dim, dtype=setup.dtype)
    settings = replace(PRESETS["quality"], steps=bench.repeats + 1, guidance=4.0)
    noise = draw_noise(0, bench.num_frames, bench.height, bench.width)
    steps = sample_latents(dit, noise, prompt, negative_prompt, settings, choose_guide(setup))
    seconds, peak = timed(lambda: next(steps), bench.repeats, device)
    # Two passes a step.
    matrix, attention = (2 * flops for flops in dit_flops(config, num_tokens, PROMPT_TOKENS))
    matrix_rate, attention_rate = measure_rates(bench, config, num_tokens, device)
    floor = (matrix / matrix_rate + attention / attention_rate) / num_ranks
    return {
        "full_depth": full_depth,
        "is_reduced": config.depth < full_depth,
        "layout": asdict(layout),
        "num_tokens": num_tokens,
        "seconds_per_step": seconds,
        "peak_gib": peak,
        **shares(matrix + attention, seconds, floor, num_ranks),
        "matrix_tflops_per_s": round(matrix_rate / 1e12, 3),
        "attention_tflops_per_s": round(attention_rate / 1e12, 3),
    }


def bench_train(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """One step as `train` makes it: forward, backward, clipping and update of a LoRA, for one clip and its caption."""
    config, full_depth = reduced(sizes(bench.model, "dit"), bench.depth)
    dtype, num_tokens = DTYPES[bench.dtype], num_visual_tokens(bench)
    is_compiled = device.type == "cuda" if bench.compile is None else bench.compile
    with torch.device("meta"):
        weights = weight_bytes(AsymmDiT(config), dtype, bench.precision)
    policies = recompute_policies(bench.recompute, config, num_tokens, weights, free_bytes(device), is_compiled)
    dit = build_random_model(config, device, dtype, each_block=lambda _, block: apply_precision(block, bench.precision))
    settings = LayerSettings(bench.lora_rank or TRAIN_RANK, float(bench.lora_rank or TRAIN_RANK))
    apply_lora(dit, {name: settings for name in linear_shapes(dit) if ".attn." in name}, seed=0)
    apply_activation_checkpointing(dit, policies)
    if is_compiled:
        apply_compilation(dit, tqdm.write)
    parameters = lora_parameters(dit)
    optimizer = build_optimizer("adamw", parameters, 2e-4, 0.01, 1.0, device.type)
    noisy, target = torch.randn(2, 1, *latent_shape(bench.num_frames, bench.height, bench.width), device=device)
    prompt = torch.randn(1, CAPTION_TOKENS, config.t5_feat_dim, device=device, dtype=dtype)
    sigma, mask = torch.tensor([0.5], device=device), torch.ones(1, CAPTION_TOKENS, dtype=torch.bool)

    def step() -> None:
        velocity_loss(dit(noisy, sigma, prompt, mask), target).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    counters.clear()
    first, _ = timed(step, 1, device, num_warm_up=0)
    seconds, peak = timed(step, bench.repeats, device)
    matrix, attention = dit_flops(config, num_tokens, CAPTION_TOKENS)
    matrix_rate, attention_rate = measure_rates(bench, config, num_tokens, device)
    backward_rate = measure_attention_backward(bench, config, num_tokens, device)
    # Frozen weights have no gradient: of a product, the backward pass is one more, and so is what is recomputed.
    num_products = [3 if policy != "none" else 2 for policy in policies]
    num_attentions = [2 if policy == "block" else 1 for policy in policies]
    floor = matrix / matrix_rate * statistics.mean(num_products)
    floor += attention / attention_rate * statistics.mean(num_attentions)
    floor += ATTENTION_BACKWARD * attention / backward_rate
    work = matrix * statistics.mean(num_products)
    work += attention * (statistics.mean(num_attentions) + ATTENTION_BACKWARD)
    return {
        "full_depth": full_depth,
        "is_reduced": config.depth < full_depth,
        "num_tokens": num_tokens,
        "lora_rank": settings.rank,
        "compile": is_compiled,
        "blocks_recomputed_whole": policies.count("block"),
        "blocks_that_keep_attention": policies.count("attention"),
        "seconds_per_step": seconds,
        "first_step_seconds": first,
        "num_graphs": counters["stats"]["unique_graphs"],
        "peak_gib": peak,
        **shares(work, seconds, floor, 1),
        "matrix_tflops_per_s": round(matrix_rate / 1e12, 3),
        "attention_tflops_per_s": round(attention_rate / 1e12, 3),
        "attention_backward_tflops_per_s": round(backward_rate / 1e12, 3),
    }


def num_visual_tokens(bench: Bench) -> int:
    """Returns the visual tokens of a clip."""
    return num_latent_frames(bench.num_frames) * bench.height * bench.width // TOKEN_PIXELS**2


def bench_decode(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Decoding one video, chunk by chunk, or split over the ranks."""
    config, full_depth = reduced(sizes(bench.model, "decoder"), bench.depth)
    decoder = build_random_model(config, device, DTYPES[bench.dtype])
    latents = draw_noise(0, bench.num_frames, bench.height, bench.width)
    layout = choose_layout(num_ranks, sizes(bench.model, "dit"), 1, 1, True, {"data": 1})
    mesh = Mesh(layout, device, 600) if num_ranks > 1 else None

    def decode() -> None:
        for _ in decoded_frames(decoder, latents, mesh):
            pass

    return vae_figures(bench, decode, config, full_depth, device, num_ranks)


def bench_encode(bench: Bench, device: torch.device, num_ranks: int) -> dict[str, Any]:
    """Encoding one clip as `prepare` does."""
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
    with FlopCounterMode(display=False) as counter:
        run()
    flops = total(counter.get_total_flops(), num_ranks)
    seconds, peak = timed(run, bench.repeats, device, num_warm_up=0)
    matrix_rate, _ = measure_rates(bench, sizes(bench.model, "dit"), CPU_TOKENS, device)
    return {
        "full_depth": full_depth,
        "is_reduced": config.num_res_blocks != full_depth,
        "latent_shape": list(latent_shape(bench.num_frames, bench.height, bench.width)),
        "seconds": seconds,
        "peak_gib": peak,
        **shares(flops, seconds, flops / matrix_rate / num_ranks, num_ranks),
        "matrix_tflops_per_s": round(matrix_rate / 1e12, 3),
    }


def shares(flops: float, seconds: float, floor: float, num_ranks: int) -> dict[str, float]:
    """Returns the arithmetic, its rate on each device, and how near the time is to the arithmetic's own."""
    return {
        "tflop": round(flops / 1e12, 3),
        "tflops_per_s": round(flops / seconds / num_ranks / 1e12, 3),
        "floor_seconds": round(floor, 4),
        "share_of_floor": round(floor / seconds, 3),
    }


def sizes(model: str, part: str) -> Any:
    """Returns the configuration of a part: Mochi 1's own sizes, or those of a model that is shipped."""
    name = "dit_config.json" if part == "dit" else "vae_config.json"
    return read_official_config(Path(assets.__path__[0]) / model / name, part)


def reduced(config: Any, depth: int | None) -> tuple[Any, Any]:
    """Returns a configuration of at most `depth` blocks a stage, and the depth that it had."""
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


def timed(run: Callable[[], object], repeats: int, device: torch.device, num_warm_up: int = 1) -> tuple[float, float]:
    """Returns the median seconds of some runs, and the peak memory of all of them, in GiB."""
    reset_peak(device)
    seconds = []
    is_quiet = dist.is_initialized() and dist.get_rank() > 0
    for i in tqdm(range(num_warm_up + repeats), "bench", leave=False, disable=is_quiet, file=sys.stderr):
        synchronize(device)
        if dist.is_initialized():
            dist.barrier()
        started = time.perf_counter()
        run()
        synchronize(device)
        if i >= num_warm_up:
            seconds.append(time.perf_counter() - started)
    return round(statistics.median(seconds), 4), peak_gib(device)


def measure_rates(bench: Bench, config: DiTConfig, num_tokens: int, device: torch.device) -> tuple[float, float]:
    """Returns the FLOPs a second that this device does here and now, in the model's widest product and in attention."""
    num_tokens = min(num_tokens, CPU_TOKENS) if device.type == "cpu" else num_tokens
    dim, dtype = config.hidden_size_x, DTYPES[bench.dtype]
    x = torch.randn(num_tokens, dim, device=device, dtype=dtype)
    w = torch.randn(2 * hidden_width(dim, config.mlp_ratio_x), dim, device=device, dtype=dtype)
    multiply: Callable[[], Tensor] = functools.partial(F.linear, x, w)
    if (
        "fp8" in (bench.dit, bench.precision)
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 9)
    ):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        ones = torch.ones(num_tokens, 1, device=device), torch.ones(1, len(w), device=device)
        multiply = functools.partial(torch.ops.aten._scaled_mm, x8, w8.t(), *ones, out_dtype=dtype)
    q = torch.randn(1, config.num_heads, num_tokens, dim // config.num_heads, device=device, dtype=dtype)

    def compute_attention() -> Tensor:
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            return F.scaled_dot_product_attention(q, q, q)

    return (
        2.0 * num_tokens * dim * len(w) / fastest(multiply, device),
        4.0 * num_tokens**2 * dim / fastest(compute_attention, device),
    )


def measure_attention_backward(bench: Bench, config: DiTConfig, num_tokens: int, device: torch.device) -> float:
    """Returns the FLOPs a second of attention's backward pass here and now."""
    num_tokens = min(num_tokens, CPU_TOKENS) if device.type == "cpu" else num_tokens
    shape = (1, config.num_heads, num_tokens, config.hidden_size_x // config.num_heads)
    q, k, v = (torch.randn(shape, device=device, dtype=DTYPES[bench.dtype], requires_grad=True) for _ in range(3))
    with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
        out = F.scaled_dot_product_attention(q, k, v)
    gradient = torch.randn_like(out)
    seconds = fastest(lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True), device)
    return ATTENTION_BACKWARD * 4.0 * num_tokens**2 * config.hidden_size_x / seconds


@torch.no_grad()
def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Returns the seconds of the fastest of some runs."""
    best, begun = float("inf"), time.perf_counter()
    run()
    while best == float("inf") or time.perf_counter() - begun < RATE_SECONDS:
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def most(value: float, num_ranks: int) -> float:
    """Returns the largest of all ranks' values."""
    return value if num_ranks == 1 else _over_ranks(value, dist.ReduceOp.MAX)


def total(value: float, num_ranks: int) -> float:
    """Returns the sum of all ranks' values."""
    return float(value) if num_ranks == 1 else _over_ranks(value, dist.ReduceOp.SUM)


def _over_ranks(value: float, operation: dist.ReduceOp.RedOpType) -> float:
    joined = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(joined, op=operation)
    return joined.item()
