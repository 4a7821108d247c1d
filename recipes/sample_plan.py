"""Checks a rendering before a weight is read: what is rendered, by which processes, and where the weights are held."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mochi_tune.adapters.lora import all_linear_shapes
from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.config.sample import SampleConfig
from mochi_tune.errors import ConfigError
from mochi_tune.files import file_sha256
from mochi_tune.models.device import DTYPES
from mochi_tune.models.latents import num_visual_tokens
from mochi_tune.models.text_encoder import MAX_TOKENS, may_be_cut, measure_caption
from mochi_tune.models.vae import DecoderConfig
from mochi_tune.models.vae_streaming import WHOLE, check_tiles
from mochi_tune.parallel.forecast import GIB, SAMPLING, free_bytes
from mochi_tune.parallel.forecast_advice import for_decoding
from mochi_tune.parallel.forecast_context import card_here
from mochi_tune.parallel.forecast_sampling import decoding_held, sampling_held
from mochi_tune.parallel.memory import PRECISIONS, SHARD_ALONE
from mochi_tune.parallel.mesh import Layout, Videos, choose_layout
from mochi_tune.recipes.start_video import check_starts, starts_of
from mochi_tune.sampling.adapters import RenderAdapter, load_render_adapters
from mochi_tune.sampling.record import Sampled, read_latents
from mochi_tune.sampling.requests import Request, read_requests, request_of_latents
from mochi_tune.sampling.strengths import check_schedules
from mochi_tune.training.memory_plan import describe, fits
from mochi_tune.weights.folder import WeightsFolder

# Parts of the weights that each process loads, and entries of `RenderPlan.common` that change what it computes.
PARTS, COMMON = ("dit", "decoder"), ("adapters", "dtype", "memory", "layout")
# Seconds that compiling 8-bit blocks saves per pass and visual token, and seconds that compiling takes.
COMPILED_SAVES, COMPILE_SECONDS = 15e-6, 40.0
# Entries of the .json next to a video that are not about its latents.
OF_THE_FILE = ("encoding", "device", "seconds", "peak_gib")


@dataclass(frozen=True)
class RenderPlan:
    """The videos to render, checked as far as possible before a weight is read.

    Attributes:
        weights: folder of the models.
        requests: the videos of all processes.
        adapters: adapters that are applied to the base.
        variants: parts of each video, left to right: "base", "adapted" or both.
        num_tokens: visual tokens of the largest video.
        layout: how the processes share the work.
        common: settings of all videos, for the .json files next to them.
        start_sums: sha256 of each file that a video starts from.
        saved: the latents of `sample.latents`, which are only decoded.
    """

    weights: WeightsFolder
    requests: list[Request]
    adapters: list[RenderAdapter]
    variants: list[str]
    num_tokens: int
    layout: Layout
    common: dict[str, Any]
    start_sums: dict[Path, str]
    saved: Sampled | None = None

    def shared_facts(self) -> dict[str, object]:
        """Returns what must be equal on all processes, by its name in errors; reads samples of the weights."""
        facts: dict[str, object] = {
            f"the files of the {part} in model.weights": self.fingerprints[part]
            for part in PARTS
            if part in self.fingerprints
        }
        if self.saved is not None:
            facts["the file sample.latents"] = self.saved.record["latents"]["sha256"]
        facts |= {f"the adapter {each['file']}": each["sha256"] for each in self.common["adapters"]}
        requests = [asdict(replace(request, video=Path())) for request in self.requests]
        return facts | {f"the setting {key}": str(self.common[key]) for key in COMMON} | {"the requests": str(requests)}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the weights that are used, by part; reads samples of large files, once."""
        parts = ["text_encoder", "dit", "decoder", *(["encoder"] if self.start_sums else [])]
        parts = parts if self.saved is None else ["decoder"]
        return {part: self.weights.fingerprint(part) for part in parts}

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts and negative prompts, in order."""
        return list(dict.fromkeys(text for r in self.requests for text in (r.prompt, r.negative_prompt)))

    def held(self, residency: str, dtype_bytes: int, is_compiled: bool = True) -> dict[str, int]:
        """Returns the bytes on one device while the largest video is sampled, by purpose; see `sampling_held`."""
        tokens, num_sharing = -(-self.num_tokens // self.layout.context), self.layout.guidance * self.layout.context
        return sampling_held(self.weights.dit_config, tokens, residency, dtype_bytes, num_sharing, is_compiled)


def check(config: RunConfig, num_processes: int) -> RenderPlan:
    """Checks everything that can be checked before a weight is read; takes seconds.

    Raises:
        MochiTuneError: anything does not fit.
    """
    if config.sample.latents is not None:
        return _check_saved(config, num_processes)
    [plan] = check_each(config, [config.sample], num_processes)
    return plan


def _check_saved(config: RunConfig, num_processes: int) -> RenderPlan:
    """Returns the plan that only decodes `sample.latents`, by all processes together; checks only the decoder."""
    source, weights = Path(str(config.sample.latents)), WeightsFolder(weights_paths(config))
    states, known = read_latents(source)
    shape = next(iter(states.values())).shape
    request = request_of_latents(config.sample, shape, known)
    if config.memory.tiles is not None:
        check_tiles(config.memory.tiles, request.height, request.width)
    weights.check(["decoder"])
    layout, variants = Layout(context=num_processes), list(states)
    own = {"adapters": [], "dtype": config.model.dtype, "memory": config.memory.model_dump(), "layout": asdict(layout)}
    # What decoding changes; the rest is as the video was sampled.
    size = {key: getattr(request, key) for key in ("prompt", "num_frames", "height", "width", "fps")}
    latents = {"file": str(source), "sha256": file_sha256(source), "decoded_in": config.model.dtype}
    made = {"weights": known.get("weights", {}) | {"decoder": weights.fingerprint("decoder")}, "latents": latents}
    made["memory"] = known.get("memory", {}) | {"tiles": config.memory.tiles}
    record = {key: value for key, value in known.items() if key not in OF_THE_FILE} | size | made
    saved = Sampled(request, states, record)
    return RenderPlan(weights, [request], [], variants, num_tokens(request), layout, own, {}, saved)


def check_each(config: RunConfig, samples: Sequence[SampleConfig], num_processes: int) -> list[RenderPlan]:
    """Checks as `check` the same videos with several adapters; checks the videos and the weights only once.

    Args:
        config: settings of the run.
        samples: settings of the videos, which differ only in the adapter.
        num_processes: number of processes.

    Raises:
        MochiTuneError: anything does not fit.
    """
    weights, sample, run_dir = WeightsFolder(weights_paths(config)), samples[0], Path(config.run_dir)
    requests = read_requests(sample, config.data, config.seed, run_dir)
    if config.memory.tiles is not None:
        for request in requests:
            check_tiles(config.memory.tiles, request.height, request.width)
    starts = starts_of(requests)
    start_sums = check_starts(starts, config.data)
    weights.check(["text_encoder", "dit", "decoder", *(["encoder"] if starts else [])])
    identity, skeleton = weights.base_identity(), weights.dit_skeleton()
    shapes = all_linear_shapes(skeleton)
    of_each = [load_render_adapters(sample, run_dir, shapes, identity) for sample in samples]
    check_schedules((a.schedule for each in of_each for a in each), (request.settings for request in requests))
    tokens = max(map(num_tokens, requests))
    parallel = config.parallel
    asked = {"data": parallel.data, "guidance": parallel.guidance, "context": parallel.context}
    videos = Videos(len(requests), tokens, any(r.is_guided for r in requests))
    layout = choose_layout(num_processes, skeleton.config, videos, asked, card_here())
    if config.memory.dit == "shard" and layout.guidance * layout.context == 1:
        raise ConfigError(f"{SHARD_ALONE}.")
    common = {
        "model": config.model.name,
        "base_fingerprint": identity,
        "dtype": config.model.dtype,
        "memory": config.memory.model_dump(),
        "layout": asdict(layout),
    }
    plans = []
    for adapters in of_each:
        is_adapted = any(adapter.strength for adapter in adapters)
        variants = (["base"] if sample.compare or not is_adapted else []) + (["adapted"] if is_adapted else [])
        own = {"adapters": [adapter.record() for adapter in adapters], "side_by_side": variants}
        plans.append(RenderPlan(weights, requests, adapters, variants, tokens, layout, own | common, start_sums))
    return plans


def lost_tails(plan: RenderPlan) -> list[str]:
    """Returns a line for each prompt that is too long for the text encoder, with the text that is lost."""
    tokenizer, lines = None, []
    for text in filter(may_be_cut, plan.prompts):
        tokenizer = tokenizer or plan.weights.load_tokenizer()
        measured = measure_caption(text, tokenizer)
        if measured.lost_tokens:
            kind = "prompt" if any(text == request.prompt for request in plan.requests) else "negative prompt"
            lines.append(
                f"the {kind} {text[:40]!r}... has {measured.num_tokens} tokens, and only {MAX_TOKENS} are used; "
                f"this is lost: {text[measured.num_read :].strip()!r}"
            )
    return lines


def pays_to_compile(residency: str, requests: list[Request], num_variants: int) -> bool:
    """Whether compiling saves more time in all steps than it takes; estimated for an H200."""
    if residency not in PRECISIONS:
        # In the model's dtype, custom kernels fuse as much.
        return False
    computed = (sum(1 + (s != 1) for s in request.settings.scales) * num_tokens(request) for request in requests)
    return pays_for_tokens(num_variants * sum(computed))


def pays_for_tokens(num_tokens: int) -> bool:
    """Whether compiling 8-bit blocks pays for this many visual tokens in all passes."""
    return num_tokens * COMPILED_SAVES > COMPILE_SECONDS


def num_tokens(request: Request) -> int:
    """Returns the number of visual tokens of a video."""
    return num_visual_tokens(request.num_frames, request.height, request.width)


def choose_residency(config: RunConfig, plan: RenderPlan, device: torch.device, may_compile: bool = True) -> str:
    """Returns where the DiT's weights are during sampling, one of `parallel.memory.RESIDENCIES`.

    Args:
        config: settings of the run.
        plan: the videos.
        device: the device of this process.
        may_compile: whether blocks are compiled where `sample.compile` is true, or null and it pays.

    Raises:
        ConfigError: the GPU has too little free memory for the DiT or for the decoder; names settings that fit.
    """
    asked, free = config.memory.dit, free_bytes(device)
    candidates = ["resident", "offload"] if asked == "auto" else ["offload" if asked == "stream" else asked]
    if free is None:
        return candidates[0]
    check_decoding(config, plan, free)
    dtype_bytes, compiles = DTYPES[config.model.dtype].itemsize, config.sample.compile
    # GPUs that do not multiply in fp8 do not round to it either.
    rounds = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)

    def held(residency: str) -> dict[str, int]:
        # The last process has the fewest videos.
        fewest = plan.requests[plan.layout.data - 1 :: plan.layout.data]
        is_compiled = pays_to_compile(residency, fewest, len(plan.variants)) if compiles is None else compiles
        return plan.held(residency, dtype_bytes, (may_compile and is_compiled) or not rounds)

    for residency in candidates:
        if fits(held(residency), free):
            return residency
    smaller = [name for name in ("24gb", "16gb") if fits(held(SAMPLING[name]), free)]
    advice = (
        " or ".join(f"memory={name}" for name in smaller) or "fewer frames, a smaller height and width, or more GPUs"
    )
    needed = describe(held(candidates[-1]))
    raise ConfigError(f"sampling needs {needed}, and {free / GIB:.1f} GiB are free: use {advice}.")


def check_decoding(config: RunConfig, plan: RenderPlan, free: int | None) -> None:
    """Refuses videos that need more than `free` bytes in the decoder, before time is spent on sampling them.

    Raises:
        ConfigError: the GPU has too little free memory; names settings that fit.
    """
    # The decoder is only estimated at its official size.
    if free is None or plan.weights.decoder_config != DecoderConfig():
        return
    rows, columns = config.memory.tiles or WHOLE
    largest, dtype_bytes = max(plan.requests, key=lambda r: r.height * r.width), DTYPES[config.model.dtype].itemsize
    held = decoding_held(largest.height, largest.width, (rows, columns), dtype_bytes)
    if not fits(held, free):
        advice = for_decoding(largest.height, largest.width, dtype_bytes, free).removeprefix("sample: ")
        raise ConfigError(f"decoding needs {describe(held)}, and {free / GIB:.1f} GiB are free: {advice}.")
