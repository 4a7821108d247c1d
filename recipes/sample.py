"""Renders prompts to videos, with or without adapters, on one or more devices. T5, DiT and VAE take turns."""

import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.lora import all_linear_shapes, switch_adapters
from mochi_tune.adapters.scaling import AdapterScaling
from mochi_tune.config.load import RunConfig, weights_paths
from mochi_tune.errors import CheckpointError, ConfigError, counted
from mochi_tune.files import make_writable_folder
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.latents import num_visual_tokens
from mochi_tune.models.text_encoder import MAX_TOKENS, may_be_cut, measure_caption
from mochi_tune.models.vae_streaming import WHOLE, check_tiles
from mochi_tune.parallel.forecast import GIB, SAMPLING, decoding_held, encoding_held, free_bytes, sampling_held
from mochi_tune.parallel.forecast_context import card_here
from mochi_tune.parallel.memory import PRECISIONS, SHARD_ALONE
from mochi_tune.parallel.mesh import Layout, Mesh, Videos, choose_layout
from mochi_tune.recipes.start_video import Start, check_starts, encode_starts, start_of, starts_of
from mochi_tune.sampling.adapters import RenderAdapter, load_render_adapters
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.record import Usage, file_metadata, noise_of, save_latents, save_settings
from mochi_tune.sampling.render import Setup, choose_guide, decoded_frames, follow_schedules, prepare_dit
from mochi_tune.sampling.requests import Request, read_requests
from mochi_tune.sampling.sampler import add_noise, sample_latents
from mochi_tune.sampling.strengths import check_schedules
from mochi_tune.sampling.video import write_video
from mochi_tune.training.agreement import check_agreement
from mochi_tune.training.interrupts import StopSignal
from mochi_tune.training.memory_plan import describe, fits
from mochi_tune.weights.folder import WeightsFolder

# Parts of the weights that each process loads, and entries of `RenderPlan.common` that change what it computes.
PARTS, COMMON = ("dit", "decoder"), ("adapters", "dtype", "memory", "layout")
# Latents that a video starts from, and the report on how its file was cut.
Encoded = tuple[Tensor, dict[str, Any]]
# Seconds that compiling 8-bit blocks saves per pass and visual token, and seconds that compiling takes.
COMPILED_SAVES, COMPILE_SECONDS = 15e-6, 40.0


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
    """

    weights: WeightsFolder
    requests: list[Request]
    adapters: list[RenderAdapter]
    variants: list[str]
    num_tokens: int
    layout: Layout
    common: dict[str, Any]
    start_sums: dict[Path, str]

    def shared_facts(self) -> dict[str, object]:
        """Returns what must be equal on all processes, by its name in errors; reads samples of the weights."""
        facts: dict[str, object] = {
            f"the files of the {part} in model.weights": self.fingerprints[part] for part in PARTS
        }
        facts |= {f"the adapter {each['file']}": each["sha256"] for each in self.common["adapters"]}
        requests = [asdict(replace(request, video=Path())) for request in self.requests]
        return facts | {f"the setting {key}": str(self.common[key]) for key in COMMON} | {"the requests": str(requests)}

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the weights that are used, by part; reads samples of large files, once."""
        parts = ["text_encoder", "dit", "decoder", *(["encoder"] if self.start_sums else [])]
        return {part: self.weights.fingerprint(part) for part in parts}

    @property
    def prompts(self) -> list[str]:
        """The distinct prompts and negative prompts, in order."""
        return list(dict.fromkeys(text for r in self.requests for text in (r.prompt, r.negative_prompt)))

    def held(self, residency: str, dtype_bytes: int) -> dict[str, int]:
        """Returns the bytes on one device while the largest video is sampled, by purpose."""
        layout = self.layout
        tokens = -(-self.num_tokens // layout.context)
        return sampling_held(self.weights.dit_config, tokens, residency, dtype_bytes, layout.guidance * layout.context)


def main(config: RunConfig) -> Iterator[Path]:
    """Renders the videos of `config.sample`; yields each one when it and its .json of settings are written.

    Each of several processes yields the videos that it writes.

    Raises:
        KeyboardInterrupt: a signal stopped it, after the finished videos were written and yielded.
    """
    num_processes = PartialState(cpu=config.device == "cpu").num_processes
    plan, device, dtype = check(config, num_processes), find_device(config.device), DTYPES[config.model.dtype]
    if num_processes > 1:
        check_agreement(plan.shared_facts())
    for line in lost_tails(plan):
        write_line(line)
    prompt_cache = Path(config.sample.prompt_cache).expanduser()
    for folder in {prompt_cache, *(request.video.parent for request in plan.requests)}:
        make_writable_folder(folder)
    parallel, mesh = config.parallel, None
    if num_processes > 1:
        mesh = Mesh(plan.layout, device, parallel.timeout_seconds, parallel.check_inputs)
    mine = plan.requests if mesh is None else plan.requests[mesh.data_rank :: plan.layout.data]
    residency, compiles = choose_residency(config, plan, device), config.sample.compile
    if compiles is None:
        compiles = device.type == "cuda" and pays_to_compile(residency, mine, len(plan.variants))
    setup = Setup(device, dtype, residency, mesh, compiles)
    usage = Usage(device, write_line)
    write_line("; ".join(map(str, plan.adapters)) or "no adapter: the base")
    if mesh is not None:
        write_line(f"{num_processes} processes: {plan.layout.in_words}")

    with usage.stage("text"):
        features = encode_prompts(plan, device, dtype, prompt_cache)
    encoded = encode_init_videos(plan, config, device, usage)
    latents: list[dict[str, Tensor]] = []
    trouble: Exception | None = None
    stopped_by = 0
    try:
        with usage.stage("sample", plan.held(setup.residency, dtype.itemsize)):
            stopped_by = render(plan, mine, (features, encoded), setup, latents)
    except Exception as error:
        # With several processes, the others would wait for this one in the decoder.
        if mesh is not None or not latents:
            raise
        trouble = error
        write_line(f"video {len(latents) + 1} of {len(mine)} failed; the ones before it are written, then the error")
        # The frames of the error keep the model alive.
        traceback.clear_frames(error.__traceback__)
        free_memory()
    rows, columns = config.memory.tiles or WHOLE
    largest = max(plan.requests, key=lambda request: request.height * request.width)
    with usage.stage("decode", decoding_held(largest.height, largest.width, rows * columns, dtype.itemsize)):
        decoder = plan.weights.load_decoder(device, dtype)
        finished = list(zip(mine, latents, strict=False))
        for request, states in tqdm(finished, "decode", leave=False, disable=not PartialState().is_main_process):
            variants = [decoded_frames(decoder, state, mesh, (rows, columns)) for state in states.values()]
            if mesh is not None and len(variants) > 1:
                # Decoding is collective: interleaving the chunks of two videos would deadlock.
                variants = [iter(list(frames)) for frames in variants]
            chunks = side_by_side(variants)
            if mesh is not None and not mesh.is_writer:
                assert not list(chunks), "only the writer has frames"
                continue
            # Another process may have taken the name in the meantime; the other files follow the final name.
            common = plan.common | {"weights": plan.fingerprints} | describe_start(request, plan, encoded)
            metadata = file_metadata(request, common) if config.sample.metadata else {}
            video = write_video(request.video, chunks, may_replace=False, encoding=request.encoding, metadata=metadata)
            request = replace(request, video=video)
            if config.sample.save_latents:
                save_latents(request, states)
            save_settings(request, common, usage)
            yield request.video
    if trouble is not None:
        raise trouble
    if len(finished) < len(mine):
        raise KeyboardInterrupt(128 + stopped_by)


def check(config: RunConfig, num_processes: int) -> RenderPlan:
    """Checks everything that can be checked before a weight is read; takes seconds.

    Raises:
        MochiTuneError: anything does not fit.
    """
    weights = WeightsFolder(weights_paths(config))
    requests = read_requests(config.sample, config.data, config.seed, Path(config.run_dir))
    if config.memory.tiles is not None:
        for request in requests:
            check_tiles(config.memory.tiles, request.height, request.width)
    starts = starts_of(requests)
    start_sums = check_starts(starts, config.data)
    weights.check(["text_encoder", "dit", "decoder", *(["encoder"] if starts else [])])
    identity, skeleton = weights.base_identity(), weights.dit_skeleton()
    adapters = load_render_adapters(config.sample, Path(config.run_dir), all_linear_shapes(skeleton), identity)
    check_schedules((a.schedule for a in adapters), (request.settings for request in requests))
    tokens = max(map(num_tokens, requests))
    parallel = config.parallel
    asked = {"data": parallel.data, "guidance": parallel.guidance, "context": parallel.context}
    videos = Videos(len(requests), tokens, any(r.is_guided for r in requests))
    layout = choose_layout(num_processes, skeleton.config, videos, asked, card_here())
    if config.memory.dit == "shard" and layout.guidance * layout.context == 1:
        raise ConfigError(f"{SHARD_ALONE}.")
    is_adapted = any(adapter.strength for adapter in adapters)
    variants = (["base"] if config.sample.compare or not is_adapted else []) + (["adapted"] if is_adapted else [])
    common = {
        "adapters": [adapter.record() for adapter in adapters],
        "side_by_side": variants,
        "model": config.model.name,
        "base_fingerprint": identity,
        "dtype": config.model.dtype,
        "memory": config.memory.model_dump(),
        "layout": asdict(layout),
    }
    return RenderPlan(weights, requests, adapters, variants, tokens, layout, common, start_sums)


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
    saved = 0.0
    for request in requests:
        passes = sum(1 + (scale != 1) for scale in request.settings.scales)
        saved += num_variants * passes * num_tokens(request) * COMPILED_SAVES
    return saved > COMPILE_SECONDS


def num_tokens(request: Request) -> int:
    """Returns the number of visual tokens of a video."""
    return num_visual_tokens(request.num_frames, request.height, request.width)


def choose_residency(config: RunConfig, plan: RenderPlan, device: torch.device) -> str:
    """Returns where the DiT's weights are during sampling, one of `parallel.memory.RESIDENCIES`.

    Raises:
        ConfigError: the GPU has too little free memory; the error names settings that fit.
    """
    asked, free = config.memory.dit, free_bytes(device)
    candidates = ["resident", "offload"] if asked == "auto" else ["offload" if asked == "stream" else asked]
    if free is None:
        return candidates[0]
    dtype_bytes = DTYPES[config.model.dtype].itemsize
    for residency in candidates:
        if fits(plan.held(residency, dtype_bytes), free):
            return residency
    smaller = [name for name in ("24gb", "16gb") if fits(plan.held(SAMPLING[name], dtype_bytes), free)]
    advice = (
        " or ".join(f"memory={name}" for name in smaller) or "fewer frames, a smaller height and width, or more GPUs"
    )
    held = describe(plan.held(candidates[-1], dtype_bytes))
    raise ConfigError(f"sampling needs {held}, and {free / GIB:.1f} GiB are free: use {advice}.")


def encode_prompts(plan: RenderPlan, device: torch.device, dtype: torch.dtype, cache_folder: Path) -> dict[str, Tensor]:
    """Returns the features of every distinct prompt, on the CPU; the main process encodes those not in the cache."""
    prompts = plan.prompts
    features: dict[str, Tensor] = {}
    if PartialState().is_main_process:
        cache = PromptCache(cache_folder, plan.weights.fingerprint("text_encoder"), dtype)
        features = {prompt: found for prompt in prompts if (found := cache.get(prompt)) is not None}
        new = [prompt for prompt in prompts if prompt not in features]
        if new:
            encoder = plan.weights.load_text_encoder(device, dtype)
            for prompt in tqdm(new, "prompts", leave=False):
                features[prompt] = encoder.encode([prompt])[0].cpu()
                if not bool(features[prompt].isfinite().all()):
                    raise CheckpointError(
                        f"the features of the prompt {prompt[:40]!r} are not finite, so T5's weights are damaged: "
                        "download them again."
                    )
                cache.put(prompt, features[prompt])
            del encoder
            free_memory()
    [features] = broadcast_object_list([features])
    return features


def encode_init_videos(plan: RenderPlan, config: RunConfig, device: torch.device, usage: Usage) -> dict[Start, Encoded]:
    """Returns the encoded init videos of all processes, on the CPU; the main process encodes them."""
    starts, dtype = starts_of(plan.requests), DTYPES[config.model.dtype]
    if not starts:
        return {}
    with usage.stage("encode", encoding_held(*max(start[1:] for start in starts), dtype.itemsize)):
        encoded = {}
        if PartialState().is_main_process:
            encoded = encode_starts(starts, config.data, plan.weights, device, dtype, write_line)
        [encoded] = broadcast_object_list([encoded])
    return encoded


def render(
    plan: RenderPlan,
    requests: list[Request],
    inputs: tuple[dict[str, Tensor], dict[Start, Encoded]],
    setup: Setup,
    finished: list[dict[str, Tensor]],
) -> int:
    """Renders requests to latents; returns the signal that stopped it between two steps, 0 for none.

    Args:
        plan: the plan of all processes.
        requests: the requests of this process.
        inputs: the features of the prompts, and the encoded init videos.
        setup: the setup of this process.
        finished: output: the latents of each request by variant, on the CPU. An error leaves the finished ones.
    """
    features, encoded = inputs
    named = {f"adapter_{i}": a for i, a in enumerate(plan.adapters) if a.strength}
    layers = {name: (a.adapter.layers, a.strength, a.block_strengths) for name, a in named.items()}
    dit = prepare_dit(plan.weights.load_dit, layers, setup, plan.weights.read_fp8)
    guide, mesh, is_quiet = choose_guide(setup), setup.mesh, not PartialState().is_main_process
    is_writer = mesh is None or mesh.is_writer
    schedules = {name: a.schedule for name, a in named.items() if a.schedule}
    scaling = AdapterScaling(dit, schedules)
    with StopSignal() as stop:
        for number, request in enumerate(requests, 1):
            noise = noise_of(request)
            prompt, negative_prompt = features[request.prompt], features[request.negative_prompt]
            settings = request.settings
            if (start := start_of(request)) is not None:
                noise = add_noise(encoded[start][0], noise, settings.start_sigma)
            scheduled = follow_schedules(guide, scaling, settings, schedules)
            # The result if there is no step, with init_strength=0.
            states = dict.fromkeys(plan.variants, noise)
            for variant in plan.variants:
                switch_adapters(dit, variant == "adapted")
                steps = sample_latents(dit, noise, prompt, negative_prompt, settings, scheduled)
                label = f"{number}/{len(requests)}" + (f" {variant}" if len(plan.variants) > 1 else "")
                bar = tqdm(steps, label, len(settings.scales), unit="step", leave=False, disable=is_quiet)
                for state in bar:
                    states[variant] = state
                    if stop_signal := stop.received if mesh is None else mesh.largest(stop.received):
                        by = "" if mesh is None else f" by rank {PartialState().process_index}"
                        if is_writer:
                            kept = f"{len(finished)} of {counted(len(requests), 'video')} finished and kept{by}"
                            tqdm.write(f"stopped: {kept}", file=sys.stderr)
                        return stop_signal
            check_latents(request, states)
            finished.append({variant: state.cpu() for variant, state in states.items()})
    del dit
    free_memory()
    return 0


def check_latents(request: Request, states: Mapping[str, Tensor]) -> None:
    """Refuses latents with values that are not finite, which would be decoded to a video of one colour.

    Raises:
        CheckpointError: a value is not finite.
    """
    if not all(bool(state.isfinite().all()) for state in states.values()):
        raise CheckpointError(
            f"{request.video.name}: the latents are not finite and were not decoded: the weights of the DiT or of an "
            "adapter are damaged, or a strength or the guidance is too large."
        )


def describe_start(request: Request, plan: RenderPlan, encoded: dict[Start, Encoded]) -> dict[str, Any]:
    """Returns the entry on the init video in the .json of a video; empty for pure noise."""
    if (start := start_of(request)) is None:
        return {}
    path, report = start[0], encoded[start][1]
    strength = request.settings.start_sigma
    origin = {"file": str(path), "sha256": plan.start_sums[path], "strength": strength, "sigma": strength}
    return {"init_video": {**origin, "steps": len(request.settings.scales), **report}}


def write_line(text: str) -> None:
    """Writes a line to stderr from the main process, without breaking the progress bars."""
    if PartialState().is_main_process:
        tqdm.write(text, file=sys.stderr)


def side_by_side(videos: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Joins the frames (F, H, W, 3) of several videos of equal length, left to right."""
    for chunks in zip(*videos, strict=True):
        yield torch.cat(chunks, dim=2)
