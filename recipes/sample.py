"""Renders prompts to videos, with or without adapters, on one or more devices. T5, DiT and VAE take turns."""

import contextlib
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.lora import switch_adapters
from mochi_tune.adapters.scaling import AdapterScaling
from mochi_tune.config.load import RunConfig
from mochi_tune.errors import CheckpointError, MochiTuneError, counted, printable
from mochi_tune.files import make_writable_folder, move_to_free_name
from mochi_tune.models.device import DTYPES, find_device, free_memory
from mochi_tune.models.text_encoder import prompt_dtype
from mochi_tune.models.vae_streaming import WHOLE
from mochi_tune.parallel.forecast import encoding_held, free_bytes
from mochi_tune.parallel.forecast_sampling import decoding_held
from mochi_tune.parallel.mesh import Mesh
from mochi_tune.recipes.sample_plan import (
    RenderPlan,
    check,
    check_decoding,
    choose_residency,
    lost_tails,
    pays_to_compile,
)
from mochi_tune.recipes.start_video import Start, encode_starts, start_of, starts_of
from mochi_tune.sampling.prompt_cache import PromptCache
from mochi_tune.sampling.record import Sampled, Usage, describe, file_metadata, noise_of, save_latents, save_settings
from mochi_tune.sampling.render import Setup, choose_guide, decoded_frames, follow_schedules, prepare_dit
from mochi_tune.sampling.requests import Request
from mochi_tune.sampling.sampler import add_noise, sample_latents
from mochi_tune.sampling.video import write_video
from mochi_tune.training.agreement import check_agreement
from mochi_tune.training.interrupts import StopSignal

# Latents that a video starts from, and the report on how its file was cut.
Encoded = tuple[Tensor, dict[str, Any]]


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
    prompt_cache = Path(config.sample.prompt_cache).expanduser()
    for folder in {prompt_cache, *(request.video.parent for request in plan.requests)}:
        make_writable_folder(folder)
    setup, mine = set_up(config, plan, device, num_processes)
    usage = Usage(device, write_line)
    if plan.saved is not None:
        write_line(f"nothing is sampled: {config.sample.latents} is decoded")
        yield from write_videos(plan, config, [plan.saved], setup, usage)
        return
    for line in lost_tails(plan):
        write_line(line)
    write_line("; ".join(map(str, plan.adapters)) or "no adapter: the base")
    if num_processes > 1:
        write_line(f"{num_processes} processes: {plan.layout.in_words}")

    with usage.stage("text"):
        features = encode_prompts(plan, device, prompt_dtype(config.memory.t5_dtype, dtype), prompt_cache)
    encoded = encode_init_videos(plan, config, device, usage)
    finished: list[Sampled] = []
    trouble: Exception | None = None
    stopped_by = 0
    # The first signal during the decoding is only the exit code, so that no sampled video is lost.
    with StopSignal() as stop:
        try:
            with usage.stage("sample", plan.held(setup.residency, dtype.itemsize, setup.is_compiled)):
                stopped_by = render(plan, mine, (features, encoded), setup, finished, stop)
        except Exception as error:
            # With several processes, the others would wait for this one in the decoder.
            if num_processes > 1 or not finished:
                raise
            trouble = error
            kept = "the ones before it are written, then the error"
            write_line(f"video {len(finished) + 1} of {len(mine)} failed; {kept}")
            # The frames of the error keep the model alive.
            traceback.clear_frames(error.__traceback__)
            free_memory()
        yield from write_videos(plan, config, finished, setup, usage)
    if trouble is not None:
        raise trouble
    if stopped_by := stopped_by or stop.received:
        raise KeyboardInterrupt(128 + stopped_by)


def set_up(
    config: RunConfig, plan: RenderPlan, device: torch.device, num_processes: int
) -> tuple[Setup, list[Request]]:
    """Returns the setup of this process and the requests that it renders.

    Raises:
        ConfigError: the GPU has too little free memory.
    """
    parallel, mesh, mine = config.parallel, None, plan.requests
    if num_processes > 1:
        mesh = Mesh(plan.layout, device, parallel.timeout_seconds, parallel.check_inputs)
        mine = mine[mesh.data_rank :: plan.layout.data]
    if plan.saved is not None:
        check_decoding(config, plan, free_bytes(device))
        return Setup(device, DTYPES[config.model.dtype], mesh=mesh), mine
    residency, compiles = choose_residency(config, plan, device), config.sample.compile
    if compiles is None:
        compiles = device.type == "cuda" and pays_to_compile(residency, mine, len(plan.variants))
    return Setup(device, DTYPES[config.model.dtype], residency, mesh, compiles), mine


def write_videos(
    plan: RenderPlan,
    config: RunConfig,
    finished: Sequence[Sampled],
    setup: Setup,
    usage: Usage,
) -> Iterator[Path]:
    """Decodes what this process has sampled; yields each video when it is written. An error leaves the latents."""
    rows, columns = config.memory.tiles or WHOLE
    largest, mesh = max(plan.requests, key=lambda request: request.height * request.width), setup.mesh
    held = decoding_held(largest.height, largest.width, (rows, columns), setup.dtype.itemsize)
    left = list(finished)
    with naming_latents(left), usage.stage("decode", held):
        decoder = plan.weights.load_decoder(setup.device, setup.dtype)
        for each in tqdm(finished, "decode", leave=False, disable=not PartialState().is_main_process):
            variants = [decoded_frames(decoder, state, mesh, (rows, columns)) for state in each.states.values()]
            if len(variants) > 1:
                # Decoders in turn would each hold their frames on the device. With several processes, which decode
                # together, they would deadlock.
                variants = [iter(list(frames)) for frames in variants]
            chunks = side_by_side(variants)
            if mesh is not None and not mesh.is_writer:
                assert not list(chunks), "only the writer has frames"
                left.pop(0)
                continue
            request, metadata = each.request, file_metadata(each.record) if config.sample.metadata else {}
            video = write_video(
                request.video,
                chunks,
                may_replace=False,
                fps=request.fps,
                encoding=request.encoding,
                metadata=metadata,
            )
            left.pop(0)
            try:
                if plan.saved is None:
                    settle_latents(each, video, config.sample.save_latents)
                save_settings(replace(request, video=video), each.record, usage)
            except OSError as error:
                lost = f"{error.strerror}; {video} is complete, but was written without its settings"
                raise OSError(error.errno, lost, error.filename) from error
            yield video


def settle_latents(each: Sampled, video: Path, are_wanted: bool) -> None:
    """Removes the latents of a complete video, or names them as the video if another process took its name."""
    if not are_wanted:
        if each.latents is not None:
            each.latents.unlink(missing_ok=True)
    elif each.latents is None:
        save_latents(video.with_suffix(".safetensors"), each.states, each.record)
    elif each.latents.stem != video.stem:
        move_to_free_name(each.latents, video.with_suffix(".safetensors"))


@contextlib.contextmanager
def naming_latents(left: Sequence[Sampled]) -> Iterator[None]:
    """Adds to an error which latents are kept, and how to decode them.

    Args:
        left: what is not written yet when the error is raised.
    """
    try:
        yield
    except (OSError, MochiTuneError) as error:
        files = [each.latents for each in left if each.latents is not None]
        if not files:
            raise
        whose = "the latents" if len(files) == 1 else f"the latents of {len(files)} videos"
        again = "the same command" if len(files) == 1 else "for each of them the same command"
        kept = f"{whose} are kept: {again} with {shlex.quote(f'latents={files[0]}')} only decodes"
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{error.strerror} ({kept})", error.filename) from error
        raise type(error)(f"{str(error).removesuffix('.')}; {kept}.") from error


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
    finished: list[Sampled],
    stop: StopSignal,
) -> int:
    """Renders requests to latents, which it keeps on disk; returns the signal that stopped it, 0 for none.

    Args:
        plan: the plan of all processes.
        requests: the requests of this process.
        inputs: the features of the prompts, and the encoded init videos.
        setup: the setup of this process.
        finished: output: the sampled videos. An error leaves the finished ones.
        stop: a signal stops it after the current step.
    """
    features, encoded = inputs
    named = {f"adapter_{i}": a for i, a in enumerate(plan.adapters) if a.strength}
    layers = {name: (a.adapter.layers, a.strength, a.block_strengths) for name, a in named.items()}
    dit = prepare_dit(plan.weights.load_dit, layers, setup, plan.weights.read_fp8)
    guide, mesh, is_quiet = choose_guide(setup), setup.mesh, not PartialState().is_main_process
    is_writer = mesh is None or mesh.is_writer
    schedules = {name: a.schedule for name, a in named.items() if a.schedule}
    scaling = AdapterScaling(dit, schedules)

    def stop_asked() -> int:
        """Returns the signal that a process of the video has received, after a line on what is kept; 0 for none."""
        stop_signal = stop.received if mesh is None else mesh.largest(stop.received)
        if stop_signal and is_writer:
            by = "" if mesh is None else f" by rank {PartialState().process_index}"
            kept = f"{len(finished)} of {counted(len(requests), 'video')} finished and kept{by}"
            tqdm.write(f"stopped: {kept}", file=sys.stderr)
        return stop_signal

    for number, request in enumerate(requests, 1):
        noise = noise_of(request)
        prompt, negative_prompt = features[request.prompt], features[request.negative_prompt]
        settings = request.settings
        if (start := start_of(request)) is not None:
            noise = add_noise(encoded[start][0], noise, settings.start_sigma)
        scheduled = follow_schedules(guide, scaling, settings, schedules)
        # The result if there is no step, with init_strength=0.
        states = dict.fromkeys(plan.variants, noise)
        num_left = len(plan.variants) * len(settings.scales)
        for variant in plan.variants:
            switch_adapters(dit, variant == "adapted")
            steps = sample_latents(dit, noise, prompt, negative_prompt, settings, scheduled)
            label = f"{number}/{len(requests)}" + (f" {variant}" if len(plan.variants) > 1 else "")
            bar = tqdm(steps, label, len(settings.scales), unit="step", leave=False, disable=is_quiet)
            for state in bar:
                states[variant] = state
                num_left -= 1
                # After its last step, a video is finished and kept.
                if num_left and (stop_signal := stop_asked()):
                    return stop_signal
        check_latents(request, states)
        states = {variant: state.cpu() for variant, state in states.items()}
        common = plan.common | {"weights": plan.fingerprints} | describe_start(request, plan, encoded)
        sampled = Sampled(request, states, describe(request, common), request.video.with_suffix(".safetensors"))
        finished.append(keep(sampled) if is_writer else sampled)
        if number < len(requests) and (stop_signal := stop_asked()):
            return stop_signal
    del dit
    free_memory()
    return 0


def keep(sampled: Sampled) -> Sampled:
    """Writes the latents of a video next to its place, so that an error while it is decoded does not lose them.

    Another process may have taken the name in the meantime; the video follows the new one.
    """
    assert sampled.latents is not None
    try:
        latents = save_latents(sampled.latents, sampled.states, sampled.record, may_replace=False)
    except OSError as error:
        # The video may need less room.
        write_line(f"{error.filename}: {error.strerror}: the latents are not on disk until the video is written")
        return replace(sampled, latents=None)
    video = latents.with_suffix(sampled.request.video.suffix)
    return replace(sampled, request=replace(sampled.request, video=video), latents=latents)


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
    """Writes a line, safe for a terminal, to stderr from the main process without breaking the progress bars."""
    if PartialState().is_main_process:
        tqdm.write(printable(text), file=sys.stderr)


def side_by_side(videos: list[Iterator[Tensor]]) -> Iterator[Tensor]:
    """Joins the frames (F, H, W, 3) of several videos of equal length, left to right."""
    for chunks in zip(*videos, strict=True):
        yield torch.cat(chunks, dim=2)
